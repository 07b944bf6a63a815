// What the binding files have in common beside checks: tensors that come in become the arguments of
// kernels, and tensors that go out are allocated. Host only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "check.h"

namespace gptj_q8 {

inline Tensor new_blocks(const Tensor& like, int64_t numel, int64_t block_size) {
  const int64_t blocks[] = {ceil_div(numel, block_size)};
  return torch::stable::new_empty(like, {blocks, 1}, ScalarType::Float);
}

// The arguments, codes and absmax.
inline std::tuple<QuantizeArgs, Tensor, Tensor> prepare_quantize(const Tensor& weight,
                                                                 const Tensor& codebook,
                                                                 int64_t block_size) {
  const char* op = "quantize";
  QuantizeArgs a;
  a.dtype = check_values(op, "weight", weight);
  check_codebook(op, "codebook", codebook);
  a.block_shift = check_block_size(op, block_size);
  a.numel = weight.numel();
  STD_TORCH_CHECK(a.numel > 0, op, ": weight must not be empty");
  Tensor codes = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Byte);
  Tensor absmax = new_blocks(weight, a.numel, block_size);
  a.weight = weight.const_data_ptr();
  a.codebook = codebook.const_data_ptr<float>();
  a.codes = codes.mutable_data_ptr<uint8_t>();
  a.absmax = absmax.mutable_data_ptr<float>();
  return {a, codes, absmax};
}

// The arguments, counts, which are not set to zero, and absmax.
inline std::tuple<HistogramArgs, Tensor, Tensor> prepare_histogram(const Tensor& weight,
                                                                   int64_t block_size,
                                                                   int64_t bins) {
  const char* op = "histogram";
  HistogramArgs a;
  a.dtype = check_values(op, "weight", weight);
  a.block_shift = check_block_size(op, block_size);
  a.numel = weight.numel();
  a.bins = bins;
  STD_TORCH_CHECK(a.numel > 0, op, ": weight must not be empty");
  STD_TORCH_CHECK(bins >= 2 && bins <= (1 << 24) && (bins & (bins - 1)) == 0, op,
                  ": bins must be a power of two from 2 to 16777216, got ", bins);
  Tensor absmax = new_blocks(weight, a.numel, block_size);
  Tensor counts = torch::stable::new_empty(weight, {&bins, 1}, ScalarType::Long);
  a.weight = weight.const_data_ptr();
  a.absmax = absmax.mutable_data_ptr<float>();
  a.counts = counts.mutable_data_ptr<int64_t>();
  return {a, counts, absmax};
}

inline AdamArgs prepare_adam(Tensor& param, const Tensor& grad, Tensor& m_codes, Tensor& m_absmax,
                             Tensor& v_codes, Tensor& v_absmax, const Tensor& m_codebook,
                             const Tensor& v_codebook, double lr, double beta1, double beta2,
                             double eps, double weight_decay, int64_t step, int64_t block_size) {
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
  return a;
}

}  // namespace gptj_q8
