// absmax[b] = max |w| over block b of the format
// codes[i]  = number of midpoints of the codebook below w[i] / absmax[b]
//
// weight [numel], codes [numel], absmax [ceil(numel / block)], codebook [256]; all dense. A block
// of threads owns a tile (tile.cuh). The host has checked sizes; a NaN gives some valid code.
// `aligned`: weight and codes begin at multiples of 16 bytes.
// Why this shape: the weights stay in registers between the two uses, so memory is read once. The
// search takes about 10 turns of shared memory for 32 elements, 3 elements for each clock and
// multiprocessor, of which an H100 at full bandwidth could use 5: an estimate.
#include "kernels.h"
#include "tile.cuh"

namespace gptj_q8::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const T* weight, const float* codebook, int block_shift, int64_t numel,
                    bool aligned, uint8_t* codes, float* absmax) {
  float* tree = shared_memory<float>();
  float* maxima = tree + kLevels;
  fill_tree(tree, codebook);
  const int64_t first = run_begin();
  const Run<T> run = load_run(weight + first, numel - first, aligned);
  float scale[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kRun; ++i) scale[0] = fmaxf(scale[0], fabsf(widen(run.values[i])));
  block_max(scale, block_shift, maxima);
  sync_threads();
  if (begins_block(first, numel, block_shift)) absmax[block_of(first, block_shift)] = scale[0];
  Run<uint8_t> encoded;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    encoded.values[i] = nearest(tree, normalize(widen(run.values[i]), scale[0]));
  }
  store_run(codes + first, encoded, numel - first, aligned);
}

cudaError_t quantize(const QuantizeArgs& a, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_type(a.dtype, [&](auto* type) {
    const auto* weight = typed(a.weight, type);
    error = launch(quantize_kernel<std::remove_pointer_t<decltype(type)>>, tiles(a.numel), kThreads,
                   (kLevels + kWarps) * sizeof(float), stream, weight, a.codebook, a.block_shift,
                   a.numel, are_aligned(weight, a.codes), a.codes, a.absmax);
  });
  return error;
}

}  // namespace gptj_q8::cuda
