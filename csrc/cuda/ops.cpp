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
#include <torch/headeronly/util/shim_utils.h>  // for the macro's name before 2.13

#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/prepare.h"
#include "../common/schemas.h"
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
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
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

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& codebook,
                                    int64_t block_size) {
  const Queue queue("quantize", {&weight, &codebook});
  auto [a, codes, absmax] = prepare_quantize(weight, codebook, block_size);
  check_launch("quantize", cuda::quantize(a, queue.stream));
  return {codes, absmax};
}

Tensor histogram(const Tensor& weight, int64_t block_size, int64_t bins) {
  const Queue queue("histogram", {&weight});
  auto [a, counts, absmax] = prepare_histogram(weight, block_size, bins);
  const int64_t one = 1;
  Tensor largest = torch::stable::new_empty(weight, {&one, 1}, ScalarType::Float);
  check_launch("histogram", cuda::histogram(a, largest.mutable_data_ptr<float>(), queue.stream));
  return counts;
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

Tensor embedding(const Tensor& ids, const Tensor& codes, const Tensor& absmax,
                 const Tensor& codebook, int64_t block_size, ScalarType dtype) {
  const char* op = "embedding";
  cuda::EmbeddingArgs a;
  a.dtype = dtype_of(op, dtype);
  a.weight = check_weight(op, codes, absmax, codebook, block_size, false);
  a.ids_are_wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(a.ids_are_wide || ids.scalar_type() == ScalarType::Int, op,
                  ": ids must be int32 or int64");
  check_dense(op, "ids", ids);
  a.count = ids.numel();
  STD_TORCH_CHECK(a.count > 0, op, ": ids must not be empty");
  const Queue queue(op, {&ids, &codes, &absmax, &codebook});
  const std::vector<int64_t> shape = with_last(ids, ids.dim(), a.weight.cols);
  Tensor out = torch::stable::new_empty(codes, {shape.data(), shape.size()}, dtype);
  a.ids = ids.const_data_ptr();
  a.out = out.mutable_data_ptr();
  check_launch(op, cuda::embedding(a, queue.stream));
  return out;
}

void adam_step(Tensor& param, const Tensor& grad, Tensor& m_codes, Tensor& m_absmax,
               Tensor& v_codes, Tensor& v_absmax, const Tensor& m_codebook,
               const Tensor& v_codebook, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, int64_t block_size) {
  const Queue queue("adam_step_", {&param, &grad, &m_codes, &m_absmax, &v_codes, &v_absmax,
                                   &m_codebook, &v_codebook});
  const AdamArgs a =
      prepare_adam(param, grad, m_codes, m_absmax, v_codes, v_absmax, m_codebook, v_codebook, lr,
                   beta1, beta2, eps, weight_decay, step, block_size);
  check_launch("adam_step_", cuda::adam_step(a, queue.stream));
}

// Limits that the products' kernels count on.
void check_product(const char* op, const Weight& w, int64_t m, int64_t outer) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 16384;  // a step past the end is an int still
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

bool has_wgmma(const Tensor& like) {
  const Queue queue("has_wgmma", {&like});
  cuda::Gpu gpu;
  check_launch("has_wgmma", cuda::current_gpu(&gpu));
  return cuda::has_wgmma(gpu);
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
  gptj_q8::define_ops(m);
  m.def("has_wgmma(Tensor like) -> bool");
}

Q8_IMPLEMENT(Q8_LIBRARY, Q8_DEVICE, m) {
  Q8_IMPLEMENT_OPS(m);
  m.impl("has_wgmma", TORCH_BOX(&gptj_q8::has_wgmma));
}
