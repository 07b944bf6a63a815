// Binds the CPU kernels as gptj_q8_cpu::*. gptj_q8/backends/cpu.py calls them with arguments that
// gptj_q8/ops.py has checked; here only what memory safety needs is checked again. PyTorch's own
// operators are called for allocation only: others may use threads that a forked child lacks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "isa.h"
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
  QuantizeArgs a;
  a.dtype = check_values("quantize", "weight", weight);
  check_codebook("quantize", "codebook", codebook);
  a.block_shift = check_block_size("quantize", block_size);
  a.numel = weight.numel();
  STD_TORCH_CHECK(a.numel > 0, "quantize: weight must not be empty");
  Tensor codes = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Byte);
  const int64_t blocks[] = {ceil_div(a.numel, block_size)};
  Tensor absmax = torch::stable::new_empty(weight, {blocks, 1}, ScalarType::Float);
  a.weight = weight.const_data_ptr();
  a.codebook = codebook.const_data_ptr<float>();
  a.codes = codes.mutable_data_ptr<uint8_t>();
  a.absmax = absmax.mutable_data_ptr<float>();
  kernels().quantize(a, kTorchPool);
  return {codes, absmax};
}

Tensor histogram(const Tensor& weight, int64_t block_size, int64_t bins) {
  HistogramArgs a;
  a.dtype = check_values("histogram", "weight", weight);
  a.block_shift = check_block_size("histogram", block_size);
  a.numel = weight.numel();
  a.bins = bins;
  STD_TORCH_CHECK(a.numel > 0, "histogram: weight must not be empty");
  STD_TORCH_CHECK(bins >= 2 && bins <= (1 << 24) && (bins & (bins - 1)) == 0,
                  "histogram: bins must be a power of two from 2 to 16777216, got ", bins);
  const int64_t blocks[] = {ceil_div(a.numel, block_size)};
  Tensor absmax = torch::stable::new_empty(weight, {blocks, 1}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(weight, {&bins, 1}, ScalarType::Long);
  a.weight = weight.const_data_ptr();
  a.absmax = absmax.mutable_data_ptr<float>();
  a.counts = counts.mutable_data_ptr<int64_t>();
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
  const char* op = "adam_step_";
  AdamArgs a;
  a.param_dtype = check_values(op, "param", param);
  a.grad_dtype = check_values(op, "grad", grad);
  a.block_shift = check_block_size(op, block_size);
  a.numel = param.numel();
  STD_TORCH_CHECK(a.numel > 0, op, ": param must not be empty");
  check_numel(op, "grad", grad, a.numel);
  check_dtype(op, "m_codes", m_codes, ScalarType::Byte);
  check_numel(op, "m_codes", m_codes, a.numel);
  check_dtype(op, "v_codes", v_codes, ScalarType::Byte);
  check_numel(op, "v_codes", v_codes, a.numel);
  check_absmax(op, "m_absmax", m_absmax, a.numel, a.block_shift);
  check_absmax(op, "v_absmax", v_absmax, a.numel, a.block_shift);
  check_codebook(op, "m_codebook", m_codebook);
  check_codebook(op, "v_codebook", v_codebook);
  a.param = param.mutable_data_ptr();
  a.grad = grad.const_data_ptr();
  a.m_codes = m_codes.mutable_data_ptr<uint8_t>();
  a.m_absmax = m_absmax.mutable_data_ptr<float>();
  a.v_codes = v_codes.mutable_data_ptr<uint8_t>();
  a.v_absmax = v_absmax.mutable_data_ptr<float>();
  a.m_codebook = m_codebook.const_data_ptr<float>();
  a.v_codebook = v_codebook.const_data_ptr<float>();
  a.lr = lr;
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  a.weight_decay = weight_decay;
  a.step = step;
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
  m.def("quantize(Tensor weight, Tensor codebook, int block_size) -> (Tensor, Tensor)");
  m.def("histogram(Tensor weight, int block_size, int bins) -> Tensor");
  m.def(
      "dequantize(Tensor codes, Tensor absmax, Tensor codebook, int block_size, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "embedding(Tensor ids, Tensor codes, Tensor absmax, Tensor codebook, int block_size, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor codes, Tensor absmax, Tensor codebook, Tensor? bias, "
      "int block_size) -> Tensor");
  m.def(
      "linear_grad_input(Tensor dy, Tensor codes, Tensor absmax, Tensor codebook, "
      "int block_size) -> Tensor");
  m.def(
      "adam_step_(Tensor(a!) param, Tensor grad, Tensor(b!) m_codes, Tensor(c!) m_absmax, "
      "Tensor(d!) v_codes, Tensor(e!) v_absmax, Tensor m_codebook, Tensor v_codebook, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, int step, int block_size) -> ()");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> str");
  m.def("usable_isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gptj_q8_cpu, CPU, m) {
  m.impl("quantize", TORCH_BOX(&gptj_q8::quantize));
  m.impl("histogram", TORCH_BOX(&gptj_q8::histogram));
  m.impl("dequantize", TORCH_BOX(&gptj_q8::dequantize));
  m.impl("embedding", TORCH_BOX(&gptj_q8::embedding));
  m.impl("linear", TORCH_BOX(&gptj_q8::linear));
  m.impl("linear_grad_input", TORCH_BOX(&gptj_q8::linear_grad_input));
  m.impl("adam_step_", TORCH_BOX(&gptj_q8::adam_step));
}

STABLE_TORCH_LIBRARY_IMPL(gptj_q8_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&gptj_q8::isa));
  m.impl("set_isa", TORCH_BOX(&gptj_q8::set_isa));
  m.impl("usable_isas", TORCH_BOX(&gptj_q8::usable_isas));
}
