// out[j, c] = codebook[codes[ids[j], c]] * absmax[(ids[j] * cols + c) / block] in float32, then one
// rounding to T
//
// ids [count] of int32 or int64, codes [rows, cols], absmax [ceil(rows * cols / block)], out
// [count, cols]; all dense. A block of threads owns kTile columns of one row asked for, a thread 16
// of them. The host has checked sizes; an id out of range ends the context, as in PyTorch.
// `aligned`: codes and out begin at multiples of 16 bytes and cols is a multiple of 16, so that
// runs of 16 are vectors and share a scale.
// Why this shape: a row of GPT-J's 4096 columns is one block of threads, and memory bounds it.
#include "kernels.h"
#include "tile.cuh"

namespace gptj_q8::cuda {

template <class T, class Id>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const Id* ids, const uint8_t* codes, const float* absmax,
                     const float* codebook, int block_shift, int64_t rows, int64_t cols,
                     bool aligned, T* out) {
  float* levels = shared_memory<float>();
  fill_levels(levels, codebook);
  sync_threads();
  const int64_t id = ids[blockIdx.x];
  device_assert(id >= 0 && id < rows, "an id is out of range");
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kTile + threadIdx.x * kRun;
  if (column >= cols) return;
  const int64_t first = id * cols + column;
  const Run<uint8_t> run = load_run(codes + first, cols - column, aligned);
  float scale = absmax[block_of(first, block_shift)];
  Run<T> decoded;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (!aligned && column + i < cols) scale = absmax[block_of(first + i, block_shift)];
    decoded.values[i] = narrow<T>(product(levels[run.values[i]], scale));
  }
  store_run(out + blockIdx.x * cols + column, decoded, cols - column, aligned);
}

cudaError_t embedding(const EmbeddingArgs& a, cudaStream_t stream) {
  const Weight& w = a.weight;
  const dim3 grid(static_cast<unsigned>(a.count), tiles(w.cols));
  cudaError_t error = cudaSuccess;
  with_type(a.dtype, [&](auto* type) {
    auto* out = typed(a.out, type);
    const auto run = [&](auto* ids) {
      using T = std::remove_pointer_t<decltype(out)>;
      using Id = std::remove_const_t<std::remove_pointer_t<decltype(ids)>>;
      return launch(embedding_kernel<T, Id>, grid, kThreads, kLevels * sizeof(float), stream, ids,
                    w.codes, w.absmax, w.codebook, w.block_shift, w.rows, w.cols,
                    are_aligned(w.codes, out) && w.cols % kRun == 0, out);
    };
    error = a.ids_are_wide ? run(static_cast<const int64_t*>(a.ids))
                           : run(static_cast<const int32_t*>(a.ids));
  });
  return error;
}

}  // namespace gptj_q8::cuda
