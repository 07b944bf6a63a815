// How the products hand on what they summed: y itself, or partial sums that a second kernel adds.
#pragma once

#include "../common/types.h"
#include "primitives.cuh"

namespace gptj_q8::cuda {

// bias [N] of any of the three float types, or null.
struct Bias {
  const void* data;
  DType dtype;
};

__device__ __forceinline__ float bias_at(const Bias& bias, int64_t n) {
  if (bias.data == nullptr) return 0.0f;
  if (bias.dtype == DType::float32) return static_cast<const float*>(bias.data)[n];
  if (bias.dtype == DType::float16) return widen(static_cast<const f16*>(bias.data)[n]);
  return widen(static_cast<const bf16*>(bias.data)[n]);
}

// Where a product's sums go: y [rows, width], bias added, where partial is null; else float32
// partial [splits, rows, width], as they are.
template <class T>
struct Results {
  T* y;
  float* partial;
  Bias bias;
  int64_t rows, width;

  __device__ __forceinline__ void store(int split, int64_t row, int64_t column, float sum) const {
    const int64_t place = row * width + column;
    if (partial != nullptr) {
      partial[split * rows * width + place] = sum;
    } else {
      y[place] = narrow<T>(sum + bias_at(bias, column));
    }
  }
};

// The block's steps of the sum, where it is split over gridDim.y blocks. At most 16 share fewer
// than 2^26 steps.
struct Stretch {
  int first, last;
};
__device__ __forceinline__ Stretch my_stretch(int steps) {
  const int splits = static_cast<int>(gridDim.y), split = static_cast<int>(blockIdx.y);
  return {steps * split / splits, steps * (split + 1) / splits};
}

constexpr int kSumThreads = 256;

// y[i] = sum over s of partial[s, i] + bias[i % width], rounded once. A thread owns one element.
// Always in the order of s, without atomics, so that the same call gives the same bits.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(Results<T> out, int splits) {
  const int64_t numel = out.rows * out.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= numel) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += out.partial[s * numel + i];
  out.y[i] = narrow<T>(sum + bias_at(out.bias, i % out.width));
}

template <class T>
cudaError_t sum_partials(const Results<T>& out, int splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(out.rows * out.width, kSumThreads)));
  return launch(sum_partials_kernel<T>, grid, kSumThreads, 0, stream, out, splits);
}

}  // namespace gptj_q8::cuda
