// out[i] = codebook[codes[i]] * absmax[i / block] in float32, then one rounding to T
//
// codes [numel], absmax [ceil(numel / block)], codebook [256], out [numel]; all dense. A block of
// threads owns a tile (tile.cuh). The host has checked sizes; `aligned`: codes and out begin at
// multiples of 16 bytes.
// Why this shape: memory bounds it (1 byte in, 2 or 4 out); one table in shared memory gives about
// 11 lookups for each clock and multiprocessor, of which an H100 at full bandwidth needs 5.
#include "kernels.h"
#include "tile.cuh"

namespace gptj_q8::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const float* absmax, const float* codebook,
                      int block_shift, int64_t numel, bool aligned, T* out) {
  float* levels = shared_memory<float>();
  fill_levels(levels, codebook);
  sync_threads();
  const int64_t first = run_begin();
  if (first >= numel) return;
  const Run<uint8_t> run = load_run(codes + first, numel - first, aligned);
  const float scale = absmax[block_of(first, block_shift)];
  Run<T> decoded;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    decoded.values[i] = narrow<T>(product(levels[run.values[i]], scale));
  }
  store_run(out + first, decoded, numel - first, aligned);
}

cudaError_t dequantize(const DequantizeArgs& a, cudaStream_t stream) {
  const Weight& w = a.weight;
  cudaError_t error = cudaSuccess;
  with_type(a.dtype, [&](auto* type) {
    auto* out = typed(a.out, type);
    error = launch(dequantize_kernel<std::remove_pointer_t<decltype(out)>>, tiles(w.cols), kThreads,
                   kLevels * sizeof(float), stream, w.codes, w.absmax, w.codebook, w.block_shift,
                   w.cols, are_aligned(w.codes, out), out);
  });
  return error;
}

}  // namespace gptj_q8::cuda
