// out[i] = codebook[codes[i]] * absmax[i / block] in float32, then one rounding to T
//
// codes [numel], absmax [ceil(numel / block)], codebook [256], out [numel]; all dense. A block of
// threads owns kTile codes, a thread 16 that follow each other and share a scale. The host has
// checked sizes; pointers that are not aligned to 16 bytes take the form with single accesses.
// Why this shape: memory bounds it (1 byte in, 2 or 4 out); one table in shared memory gives about
// 11 lookups for each clock and multiprocessor, of which an H100 at full bandwidth needs 5.
#include "kernels.h"
#include "tile.cuh"

namespace gptj_q8::cuda {

constexpr int kThreads = 256;
constexpr int kTile = kThreads * kRun;

template <class T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const float* absmax, const float* codebook,
                      int block_shift, int64_t numel, T* out) {
  float* levels = shared_memory<float>();
  static_assert(kThreads == kLevels);
  levels[threadIdx.x] = codebook[threadIdx.x];
  sync_threads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kRun;
  if (first >= numel) return;
  const Run<uint8_t> run = load_run<Aligned>(codes + first, numel - first);
  const float scale = absmax[block_of(first, block_shift)];
  Run<T> decoded;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    decoded.values[i] = narrow<T>(multiply(levels[run.values[i]], scale));
  }
  store_run<Aligned>(out + first, decoded, numel - first);
}

cudaError_t dequantize(const DequantizeArgs& a, cudaStream_t stream) {
  const Weight& w = a.weight;
  const bool aligned = is_aligned(w.codes) && is_aligned(a.out);
  const dim3 grid(static_cast<unsigned>(ceil_div(w.cols, kTile)));
  cudaError_t error = cudaSuccess;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = aligned ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
    error = launch(kernel, grid, kThreads, kLevels * sizeof(float), stream, w.codes, w.absmax,
                   w.codebook, w.block_shift, w.cols, static_cast<T*>(a.out));
  });
  return error;
}

}  // namespace gptj_q8::cuda
