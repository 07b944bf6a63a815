// Binds the CPU kernels as gptj_q8_cpu::*. gptj_q8/backends/cpu.py calls them with arguments that
// gptj_q8/ops.py has checked; here only what memory safety needs is checked again. PyTorch's own
// operators are called for allocation only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/prepare.h"
#include "../common/schemas.h"
#include "isa.h"
#include "pages.h"
#include "pool.h"

namespace gptj_q8 {
namespace {

// A small tensor of any float dtype as float32.
std::vector<float> float_values(const char* op, const char* name, const Tensor& t) {
  check_dense(op, name, t);
  std::vector<float> values(t.numel());
  const void* data = t.const_data_ptr();
  if (t.scalar_type() == ScalarType::Double) {
    std::copy_n(static_cast<const double*>(data), values.size(), values.begin());
    return values;
  }
  with_type(check_values(op, name, t), [&](auto* type) {
    const auto* source = typed(data, type);
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_float(source[i]);
  });
  return values;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const Tensor& codebook,
                                    int64_t block_size) {
  auto [a, codes, absmax] = prepare_quantize(weight, codebook, block_size);
  advise_huge_pages(a.codes, codes.numel());
  kernels().quantize(a, kTorchPool);
  return {codes, absmax};
}

Tensor histogram(const Tensor& weight, int64_t block_size, int64_t bins) {
  auto [a, counts, absmax] = prepare_histogram(weight, block_size, bins);
  std::fill_n(a.counts, bins, int64_t{0});
  kernels().histogram(a, kTorchPool);
  return counts;
}

Tensor dequantize(const Tensor& codes, const Tensor& absmax, const Tensor& codebook,
                  int64_t block_size, ScalarType dtype) {
  DequantizeArgs a;
  a.dtype = dtype_of("dequantize", dtype);
  a.weight = check_weight("dequantize", codes, absmax, codebook, block_size, true);
  Tensor out = torch::stable::new_empty(codes, codes.sizes(), dtype);
  a.out = out.mutable_data_ptr();
  kernels().dequantize(a, kTorchPool);
  return out;
}

Tensor embedding(const Tensor& ids, const Tensor& codes, const Tensor& absmax,
                 const Tensor& codebook, int64_t block_size, ScalarType dtype) {
  EmbeddingArgs a;
  a.dtype = dtype_of("embedding", dtype);
  a.weight = check_weight("embedding", codes, absmax, codebook, block_size, false);
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int,
                  "embedding: ids must be int32 or int64");
  check_dense("embedding", "ids", ids);
  a.count = ids.numel();
  std::vector<int64_t> widened;
  if (wide) {
    a.ids = ids.const_data_ptr<int64_t>();
  } else {
    const int32_t* narrow = ids.const_data_ptr<int32_t>();
    widened.assign(narrow, narrow + a.count);
    a.ids = widened.data();
  }
  for (int64_t i = 0; i < a.count; ++i) {
    STD_TORCH_CHECK(a.ids[i] >= 0 && a.ids[i] < a.weight.rows, "embedding: id ", a.ids[i],
                    " is out of range for ", a.weight.rows, " rows");
  }
  Tensor out = torch::stable::new_empty(codes, with_last(ids, ids.dim(), a.weight.cols), dtype);
  a.out = out.mutable_data_ptr();
  if (a.count > 0) kernels().embedding(a, kTorchPool);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& absmax, const Tensor& codebook,
              const std::optional<Tensor>& bias, int64_t block_size) {
  LinearArgs a;
  a.dtype = check_values("linear", "x", x);
  a.weight = check_weight("linear", codes, absmax, codebook, block_size, false);
  a.m = check_rows("linear", "x", x, a.weight.cols);
  std::vector<float> addend;
  if (bias.has_value()) {
    check_numel("linear", "bias", *bias, a.weight.rows);
    addend = float_values("linear", "bias", *bias);
  }
  a.bias = bias.has_value() ? addend.data() : nullptr;
  Tensor y = torch::stable::new_empty(x, with_last(x, x.dim() - 1, a.weight.rows));
  a.x = x.const_data_ptr();
  a.y = y.mutable_data_ptr();
  kernels().linear(a, kTorchPool);
  return y;
}

Tensor linear_grad_input(const Tensor& dy, const Tensor& codes, const Tensor& absmax,
                         const Tensor& codebook, int64_t block_size) {
  LinearGradInputArgs a;
  a.dtype = check_values("linear_grad_input", "dy", dy);
  a.weight = check_weight("linear_grad_input", codes, absmax, codebook, block_size, false);
  a.m = check_rows("linear_grad_input", "dy", dy, a.weight.rows);
  Tensor dx = torch::stable::new_empty(dy, with_last(dy, dy.dim() - 1, a.weight.cols));
  a.dy = dy.const_data_ptr();
  a.dx = dx.mutable_data_ptr();
  kernels().linear_grad_input(a, kTorchPool);
  return dx;
}

void adam_step(Tensor& param, const Tensor& grad, Tensor& m_codes, Tensor& m_absmax,
               Tensor& v_codes, Tensor& v_absmax, const Tensor& m_codebook,
               const Tensor& v_codebook, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, int64_t block_size) {
  const AdamArgs a =
      prepare_adam(param, grad, m_codes, m_absmax, v_codes, v_absmax, m_codebook, v_codebook, lr,
                   beta1, beta2, eps, weight_decay, step, block_size);
  kernels().adam_step(a, kTorchPool);
}

// Chooses the instruction set ("auto": the best) and returns the name of the one in use.
std::string set_isa(std::string name) {
  STD_TORCH_CHECK(select_isa(name.c_str()), "set_isa: this CPU or build has no instruction set ",
                  name);
  return kernels().name;
}

// The names this CPU can run, best first, separated by spaces.
std::string usable_isas() {
  std::string names;
  for (int i = 0; usable_isa(i) != nullptr; ++i) {
    if (i > 0) names += ' ';
    names += usable_isa(i);
  }
  return names;
}

std::string isa() {
  return kernels().name;
}

}  // namespace
}  // namespace gptj_q8

STABLE_TORCH_LIBRARY(gptj_q8_cpu, m) {
  gptj_q8::define_ops(m);
  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
  m.def("usable_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gptj_q8_cpu, CPU, m) {
  Q8_IMPLEMENT_OPS(m);
}

STABLE_TORCH_LIBRARY_IMPL(gptj_q8_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&gptj_q8::isa));
  m.impl("set_isa", TORCH_BOX(&gptj_q8::set_isa));
  m.impl("usable_isas", TORCH_BOX(&gptj_q8::usable_isas));
}
