// The CUDA kernels' entry points, one for each op. They include nothing of PyTorch: raw device
// pointers and sizes go in, and the stream that the work is queued on. All pointers are dense, all
// sizes are positive, and the binding file has checked that the arrays have the sizes stated.
// Each returns the first error of its launches and waits for nothing.
#pragma once

#include "../common/arguments.h"
#include "platform.h"

namespace gptj_q8::cuda {

cudaError_t dequantize(const DequantizeArgs& a, cudaStream_t stream);

}  // namespace gptj_q8::cuda
