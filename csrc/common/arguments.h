// What every backend's kernels take: raw pointers and sizes. All pointers are dense, all sizes are
// positive, and the binding file has checked that the arrays have the sizes stated here.
#pragma once

#include <cstdint>

#include "types.h"

namespace gptj_q8 {

// A quantized matrix. As a flat array it has one row.
struct Weight {
  const uint8_t* codes;   // [rows, cols]
  const float* absmax;    // [ceil(rows * cols / block)]
  const float* codebook;  // [256]
  int block_shift;
  int64_t rows, cols;
};

struct QuantizeArgs {
  const void* weight;  // [numel] of dtype
  DType dtype;
  int64_t numel;
  int block_shift;
  const float* codebook;  // [256], ascending
  uint8_t* codes;         // [numel], out
  float* absmax;          // [blocks], out
};

struct HistogramArgs {
  const void* weight;  // [numel] of dtype
  DType dtype;
  int64_t numel;
  int block_shift;
  int64_t bins;     // a power of two, at most 2^24
  float* absmax;    // [blocks], scratch
  int64_t* counts;  // [bins], zeros on entry, out
};

struct DequantizeArgs {
  Weight weight;  // one row
  void* out;      // [cols] of dtype
  DType dtype;
};

// dx[M, K] = dy[M, N] @ W[N, K]
struct LinearGradInputArgs {
  const void* dy;
  DType dtype;
  int64_t m;
  Weight weight;
  void* dx;
};

struct AdamArgs {
  void* param;  // [numel], in place
  DType param_dtype;
  const void* grad;  // [numel]
  DType grad_dtype;
  int64_t numel;
  int block_shift;
  uint8_t* m_codes;  // [numel], in place, as the next three
  float* m_absmax;   // [blocks]
  uint8_t* v_codes;
  float* v_absmax;
  const float* m_codebook;  // [256]
  const float* v_codebook;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
};

}  // namespace gptj_q8
