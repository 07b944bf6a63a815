// linear: y[M, N] = x[M, K] @ W[N, K].T + bias[N],  W = codebook[codes] * absmax per block
//
// x, y [M, K], [M, N] in one of float32, bfloat16, float16; codes [N, K]; blocks run on across
// rows. The host has checked that all arrays have these sizes.
// Few rows of x: gemv_avx512.h, decoding in registers, if x may_meet_levels. Else: the panels of
// gemm_avx512.h, filled by fill_rows_avx512.h.
#pragma once

#include "fill_rows_avx512.h"
#include "gemv_avx512.h"

namespace gptj_q8::Q8_ISA {
namespace {

// Up to how many rows of x decoding W again for each pass beats writing panels. Zen 5, 4096 x 4096,
// two threads, ms: bfloat16, 12 rows 0.85 in passes and 1.56 in panels, 16 rows 1.14 and 1.10, with
// levels in two parts 6 rows 0.88, 8 rows 1.09 and 0.97; float32, 8 rows 1.04 and 1.16, 10
// rows 1.38 and 1.24.
template <class T, bool Wide>
constexpr int kFewRows = kHasBf16 && std::is_same_v<T, bf16> ? (Wide ? 6 : 15)
                         : kHasBf16 && !Wide                 ? 8
                                                             : 4;

template <bool Wide, class T>
void linear_typed(const LinearArgs& a, const Pool& pool, const T* x, T* y) {
  const Weight& w = a.weight;
  const auto make_fill = [&](auto panel) { return FillRows<decltype(panel), Wide>(w); };
  if (a.m > kFewRows<T, Wide>) {
    return multiply_any<PanelOf<T>>(pool, x, a.m, w.cols, w.rows, make_fill, a.bias, y);
  }
  if (!may_meet_levels(max_abs(x, a.m * w.cols))) {
    return multiply_any<FloatPanel>(pool, x, a.m, w.cols, w.rows, make_fill, a.bias, y);
  }
  linear_few<1, Wide>(a, pool, x, y);
}

}  // namespace

void linear(const LinearArgs& a, const Pool& pool) {
  const bool exact = bf16_exact(a.weight.codebook);
  with_type(a.dtype, [&](auto* t) {
    const auto* x = typed(a.x, t);
    auto* y = typed(a.y, t);
    exact ? linear_typed<false>(a, pool, x, y) : linear_typed<true>(a, pool, x, y);
  });
}

}  // namespace gptj_q8::Q8_ISA
