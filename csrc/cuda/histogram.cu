// A = max_b absmax[b],   counts[bin(w[i] / absmax[b])] += rint(2^30 * (absmax[b] / A)^2)
//
// weight [numel], counts [bins], absmax [ceil(numel / block)] and largest [1] scratch; all dense.
// Two kernels, for every block of the format needs the largest scale of all. A block of threads
// owns a tile (tile.cuh). The host has checked sizes and set counts and largest to zero; a NaN
// gives some valid bin. `aligned`: weight begins at a multiple of 16 bytes.
// Why this shape: counts are integers, so the order in which atomics add them changes nothing.
// They go to L2 directly, since 2^16 counts of 8 bytes do not fit in shared memory.
#include "kernels.h"
#include "tile.cuh"

namespace gptj_q8::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads)
    absmax_kernel(const T* weight, int block_shift, int64_t numel, bool aligned, float* absmax,
                  float* largest) {
  const int64_t first = run_begin();
  const Run<T> run = load_run(weight + first, numel - first, aligned);
  float scale[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < kRun; ++i) scale[0] = fmaxf(scale[0], fabsf(widen(run.values[i])));
  block_max(scale, block_shift, shared_memory<float>());
  if (begins_block(first, numel, block_shift)) {
    absmax[block_of(first, block_shift)] = scale[0];
    atomic_max_positive(largest, scale[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const T* weight, const float* absmax, const float* largest, int block_shift,
                     int64_t numel, bool aligned, float half_bins, float last_bin,
                     int64_t* counts) {
  const int64_t first = run_begin();
  if (first >= numel) return;
  const float scale = absmax[block_of(first, block_shift)];
  if (scale == 0.0f) return;
  const float relative = scale / *largest;
  const int64_t count = round_to_integer(product(relative, relative) * kHistogramUnit);
  const Run<T> run = load_run(weight + first, numel - first, aligned);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (first + i >= numel) return;
    const float r = normalize(widen(run.values[i]), scale);
    atomic_add(counts + histogram_bin(r, half_bins, last_bin), count);
  }
}

cudaError_t histogram(const HistogramArgs& a, float* largest, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(a.counts, 0, a.bins * sizeof(int64_t), stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(largest, 0, sizeof(float), stream);
  if (error != cudaSuccess) return error;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* weight = typed(a.weight, type);
    const bool aligned = are_aligned(weight);
    error = launch(absmax_kernel<T>, tiles(a.numel), kThreads, kWarps * sizeof(float), stream,
                   weight, a.block_shift, a.numel, aligned, a.absmax, largest);
    if (error != cudaSuccess) return;
    error = launch(histogram_kernel<T>, tiles(a.numel), kThreads, 0, stream, weight, a.absmax,
                   largest, a.block_shift, a.numel, aligned, static_cast<float>(a.bins / 2),
                   static_cast<float>(a.bins - 1), a.counts);
  });
  return error;
}

}  // namespace gptj_q8::cuda
