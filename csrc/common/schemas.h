// The ops' schemas, one for the binding file of every device.
#pragma once

#include <torch/csrc/stable/library.h>

namespace gptj_q8 {

template <class Library>
void define_ops(Library& m) {
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
}

}  // namespace gptj_q8

// Registers the functions gptj_q8::quantize and so on, which stand above in the binding file.
#define Q8_IMPLEMENT_OPS(m)                                            \
  m.impl("quantize", TORCH_BOX(&gptj_q8::quantize));                   \
  m.impl("histogram", TORCH_BOX(&gptj_q8::histogram));                 \
  m.impl("dequantize", TORCH_BOX(&gptj_q8::dequantize));               \
  m.impl("embedding", TORCH_BOX(&gptj_q8::embedding));                 \
  m.impl("linear", TORCH_BOX(&gptj_q8::linear));                       \
  m.impl("linear_grad_input", TORCH_BOX(&gptj_q8::linear_grad_input)); \
  m.impl("adam_step_", TORCH_BOX(&gptj_q8::adam_step))
