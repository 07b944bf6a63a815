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
#include <optional>
#include <vector>

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

// Limits that the products' kernels count on.
void check_product(const char* op, const Weight& w, int64_t m, int64_t outer) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 4096;
  STD_TORCH_CHECK(w.rows < kMost && w.cols < kMost, op, ": codes must have less than ", kMost,
                  " rows and columns, got ", w.rows, " x ", w.cols);
  STD_TORCH_CHECK(m < (int64_t{1} << 40) / outer, op, ": ", m, " x ", outer,
                  " results are too many");
}

// Memory for partial sums, and the GPU that they are planned for.
template <class Args>
cudaError_t run_product(const char* op, const Args& a, const Tensor& like, cudaStream_t stream,
                        int64_t (*partials)(const Args&, const cuda::Gpu&),
                        cudaError_t (*product)(const Args&, const cuda::Gpu&, float*,
                                               cudaStream_t)) {
  cuda::Gpu gpu;
  check_launch(op, cuda::current_gpu(&gpu));
  const int64_t floats = partials(a, gpu);
  if (floats == 0) return product(a, gpu, nullptr, stream);
  Tensor partial = torch::stable::new_empty(like, {&floats, 1}, ScalarType::Float);
  return product(a, gpu, partial.mutable_data_ptr<float>(), stream);
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& absmax, const Tensor& codebook,
              const std::optional<Tensor>& bias, int64_t block_size) {
  const char* op = "linear";
  cuda::LinearArgs a;
  a.dtype = check_values(op, "x", x);
  a.weight = check_weight(op, codes, absmax, codebook, block_size, false);
  a.m = check_rows(op, "x", x, a.weight.cols);
  check_product(op, a.weight, a.m, a.weight.rows);
  a.bias = nullptr;
  a.bias_dtype = a.dtype;
  if (bias) {
    a.bias_dtype = check_values(op, "bias", *bias);
    check_numel(op, "bias", *bias, a.weight.rows);
    a.bias = bias->const_data_ptr();
  }
  const Queue queue(op, {&x, &codes, &absmax, &codebook, bias ? &*bias : &x});
  const std::vector<int64_t> shape = with_last(x, x.dim() - 1, a.weight.rows);
  Tensor y = torch::stable::new_empty(x, {shape.data(), shape.size()});
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  check_launch(op, run_product(op, a, x, queue.stream, cuda::linear_partials, cuda::linear));
  return y;
}

Tensor linear_grad_input(const Tensor& dy, const Tensor& codes, const Tensor& absmax,
                         const Tensor& codebook, int64_t block_size) {
  const char* op = "linear_grad_input";
  LinearGradInputArgs a;
  a.dtype = check_values(op, "dy", dy);
  a.weight = check_weight(op, codes, absmax, codebook, block_size, false);
  a.m = check_rows(op, "dy", dy, a.weight.rows);
  check_product(op, a.weight, a.m, a.weight.cols);
  const Queue queue(op, {&dy, &codes, &absmax, &codebook});
  const std::vector<int64_t> shape = with_last(dy, dy.dim() - 1, a.weight.cols);
  Tensor dx = torch::stable::new_empty(dy, {shape.data(), shape.size()});
  a.dy = dy.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  check_launch(op, run_product(op, a, dy, queue.stream, cuda::linear_grad_input_partials,
                               cuda::linear_grad_input));
  return dx;
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
  m.def(
      "linear(Tensor x, Tensor codes, Tensor absmax, Tensor codebook, Tensor? bias, "
      "int block_size) -> Tensor");
  m.def(
      "linear_grad_input(Tensor dy, Tensor codes, Tensor absmax, Tensor codebook, "
      "int block_size) -> Tensor");
}

Q8_IMPLEMENT(Q8_LIBRARY, Q8_DEVICE, m) {
  m.impl("dequantize", TORCH_BOX(&gptj_q8::dequantize));
  m.impl("linear", TORCH_BOX(&gptj_q8::linear));
  m.impl("linear_grad_input", TORCH_BOX(&gptj_q8::linear_grad_input));
}
