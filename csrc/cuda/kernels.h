// The CUDA kernels' entry points, one for each op. They include nothing of PyTorch: raw device
// pointers and sizes go in, and the stream that the work is queued on. All pointers are dense, all
// sizes are positive, and the binding file has checked that the arrays have the sizes stated.
// Each returns the first error of its launches and waits for nothing.
#pragma once

#include "../common/arguments.h"
#include "gpu.h"

namespace gptj_q8::cuda {

// y[M, N] = x[M, K] @ W[N, K].T + bias[N]; x and y of one dtype, bias of any or null.
struct LinearArgs {
  const void* x;
  DType dtype;
  int64_t m;
  Weight weight;
  const void* bias;
  DType bias_dtype;
  void* y;
};

struct EmbeddingArgs {
  const void* ids;  // [count] of int64 if they are wide, else of int32
  bool ids_are_wide;
  int64_t count;
  Weight weight;
  void* out;  // [count, cols] of dtype
  DType dtype;
};

cudaError_t quantize(const QuantizeArgs& a, cudaStream_t stream);
// largest: [1], scratch. counts need not be zeros.
cudaError_t histogram(const HistogramArgs& a, float* largest, cudaStream_t stream);
cudaError_t dequantize(const DequantizeArgs& a, cudaStream_t stream);
cudaError_t embedding(const EmbeddingArgs& a, cudaStream_t stream);
cudaError_t adam_step(const AdamArgs& a, cudaStream_t stream);

// Whether `linear` has Hopper's tensor cores: on sm_90, where it was compiled for sm_90a.
bool has_wgmma(const Gpu& gpu);

// The products may need so many floats for partial sums; they are passed as `partial`, else null.
// Fewer than 2^31 - 16384 rows and columns of w, fewer than 2^40 results.
int64_t linear_partials(const LinearArgs& a, const Gpu& gpu);
int64_t linear_grad_input_partials(const LinearGradInputArgs& a, const Gpu& gpu);
cudaError_t linear(const LinearArgs& a, const Gpu& gpu, float* partial, cudaStream_t stream);
cudaError_t linear_grad_input(const LinearGradInputArgs& a, const Gpu& gpu, float* partial,
                              cudaStream_t stream);

}  // namespace gptj_q8::cuda
