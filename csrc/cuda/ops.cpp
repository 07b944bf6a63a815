// Binds the CUDA kernels as gptj_q8_cuda::*. gptj_q8/backends/cuda.py calls them with arguments
// that gptj_q8/ops.py has checked; here only what memory safety needs is checked again. Nothing
// here waits for the GPU.
//
// Compiled with Q8_CUDA_ON_CPU it binds the same kernels, run by tests/cuda_on_cpu, for CPU tensors
// as gptj_q8_cuda_on_cpu::*.
#if !defined(Q8_CUDA_ON_CPU)
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>

#include "../common/check.h"
#include "kernels.h"

namespace gptj_q8 {
namespace {

#if defined(Q8_CUDA_ON_CPU)
struct Queue {
  explicit Queue(const char*, std::initializer_list<const Tensor*>) {}
  cudaStream_t stream = nullptr;
};
#else
// While it lives, the tensors' device is the current one; `stream` is PyTorch's current stream.
class Queue {
 public:
  Queue(const char* op, std::initializer_list<const Tensor*> tensors)
      : guard_((*tensors.begin())->get_device_index()) {
    const int32_t device = (*tensors.begin())->get_device_index();
    for (const Tensor* t : tensors) {
      STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == device, op,
                      ": all tensors must be on one CUDA device");
    }
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

Tensor dequantize(const Tensor& codes, const Tensor& absmax, const Tensor& codebook,
                  int64_t block_size, ScalarType dtype) {
  const char* op = "dequantize";
  DequantizeArgs a;
  a.dtype = dtype_of(op, dtype);
  a.weight = check_weight(op, codes, absmax, codebook, block_size, true);
  const Queue queue(op, {&codes, &absmax, &codebook});
  Tensor out = torch::stable::new_empty(codes, codes.sizes(), dtype);
  a.out = out.mutable_data_ptr();
  check_launch(op, cuda::dequantize(a, queue.stream));
  return out;
}

}  // namespace
}  // namespace gptj_q8

#if defined(Q8_CUDA_ON_CPU)
#define Q8_LIBRARY gptj_q8_cuda_on_cpu
#define Q8_DEVICE CPU
#else
#define Q8_LIBRARY gptj_q8_cuda
#define Q8_DEVICE CUDA
#endif
// The macros paste their arguments, which must be expanded first.
#define Q8_DECLARE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define Q8_IMPLEMENT(library, device, m) STABLE_TORCH_LIBRARY_IMPL(library, device, m)

Q8_DECLARE(Q8_LIBRARY, m) {
  m.def(
      "dequantize(Tensor codes, Tensor absmax, Tensor codebook, int block_size, "
      "ScalarType dtype) -> Tensor");
}

Q8_IMPLEMENT(Q8_LIBRARY, Q8_DEVICE, m) {
  m.impl("dequantize", TORCH_BOX(&gptj_q8::dequantize));
}
