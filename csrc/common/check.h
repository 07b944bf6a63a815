// Argument checks of the binding files: only what memory safety needs. The full checks, with the
// exception types that a user sees, are in gptj_q8/ops.py. Host only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "arguments.h"

namespace gptj_q8 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dense(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  // FSDP and others free the memory of tensors that live on.
  int64_t bytes = 0;
  const bool known = aoti_torch_get_storage_size(t.get(), &bytes) == AOTI_TORCH_SUCCESS;
  const int64_t end = (t.storage_offset() + t.numel()) * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(known && (t.numel() == 0 || end <= bytes), op, ": the memory of ", name,
                  " has been freed");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  check_dense(op, name, t);
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
      ": ", name, " must be float32, bfloat16 or float16");
  check_dense(op, name, t);
}

inline void check_numel(const char* op, const char* name, const Tensor& t, int64_t expected) {
  STD_TORCH_CHECK(t.numel() == expected, op, ": ", name, " must have ", expected, " elements, got ",
                  t.numel());
}

// Returns log2(block_size).
inline int check_block_size(const char* op, int64_t block_size) {
  STD_TORCH_CHECK(
      block_size >= kMinBlock && block_size <= kMaxBlock && (block_size & (block_size - 1)) == 0,
      op, ": block_size must be a power of two from ", kMinBlock, " to ", kMaxBlock, ", got ",
      block_size);
  int shift = 0;
  while ((int64_t{1} << shift) < block_size) ++shift;
  return shift;
}

inline void check_codebook(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, ScalarType::Float);
  STD_TORCH_CHECK(t.numel() == kLevels, op, ": ", name, " must have ", kLevels, " levels, got ",
                  t.numel());
}

inline void check_absmax(const char* op, const char* name, const Tensor& t, int64_t numel,
                         int block_shift) {
  check_dtype(op, name, t, ScalarType::Float);
  const int64_t blocks = ceil_div(numel, int64_t{1} << block_shift);
  STD_TORCH_CHECK(t.numel() == blocks, op, ": ", name, " must have ", blocks, " blocks, got ",
                  t.numel());
}

inline DType dtype_of(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16");
  }
}

inline DType check_values(const char* op, const char* name, const Tensor& t) {
  check_float(op, name, t);
  return dtype_of(op, t.scalar_type());
}

// codes as a matrix [rows, cols]; with `flat` as one row, whatever its shape.
inline Weight check_weight(const char* op, const Tensor& codes, const Tensor& absmax,
                           const Tensor& codebook, int64_t block_size, bool flat) {
  check_dtype(op, "codes", codes, ScalarType::Byte);
  check_codebook(op, "codebook", codebook);
  STD_TORCH_CHECK(flat || codes.dim() == 2, op, ": codes must have 2 dimensions, got ",
                  codes.dim());
  STD_TORCH_CHECK(codes.numel() > 0, op, ": codes must not be empty");
  Weight w;
  w.block_shift = check_block_size(op, block_size);
  check_absmax(op, "absmax", absmax, codes.numel(), w.block_shift);
  w.codes = codes.const_data_ptr<uint8_t>();
  w.absmax = absmax.const_data_ptr<float>();
  w.codebook = codebook.const_data_ptr<float>();
  w.rows = flat ? 1 : codes.size(0);
  w.cols = flat ? codes.numel() : codes.size(1);
  return w;
}

// Rows of x [..., width] as one matrix.
inline int64_t check_rows(const char* op, const char* name, const Tensor& x, int64_t width) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == width, op, ": ", name, " must have ",
                  width, " values in its last dimension");
  STD_TORCH_CHECK(x.numel() > 0, op, ": ", name, " must not be empty");
  return x.numel() / width;
}

// The shape of t's first dimensions and one more.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t keep, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < keep; ++i) shape.push_back(t.size(i));
  shape.push_back(last);
  return shape;
}

}  // namespace gptj_q8
