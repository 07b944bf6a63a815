// linear_grad_input: dx[M, K] = dy[M, N] @ W[N, K],  W = codebook[codes] * absmax per block
//
// dy, dx [M, N], [M, K] in one of float32, bfloat16, float16; codes [N, K]; blocks run on across
// rows. The host has checked that all arrays have these sizes.
// One piece of work owns a range of columns of dx and walks down all rows of W, so that no two
// threads add into one element and the order of additions is fixed.
// Few rows: rows of W are decoded in registers, four at a time, and added with dy * absmax as their
// factor to float32 sums in the L1 cache (all dtypes alike, exact products), unless such a factor
// could overflow. More: the panels of gemm_avx512.h, filled by fill_columns_avx512.h.
#pragma once

#include <cmath>

#include "fill_columns_avx512.h"

namespace gptj_q8::Q8_ISA {
namespace {

constexpr int64_t kSumElements = 4096;  // 16 KB of sums: half of a 32 KB L1 cache

// sums[m][k - k0] += sum over r of factor[r][m] * level(n + r, k), k0 <= k < k1.
template <int R, int M, bool Wide>
Q8_INLINE void add_rows(const FloatTable& table, const uint8_t* codes, int64_t stride, int64_t n,
                        const float (&factor)[R][M], float* sums, int64_t sum_stride) {
  auto chunk = [&](int64_t k, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    const auto mask = [&](int q) { return kFull ? __mmask16{0xffff} : first16(n - k - 16 * q); };
    __m512 sum[M][4];
    for (int m = 0; m < M; ++m) {
      for (int q = 0; q < 4; ++q) sum[m][q] = load16(sums + m * sum_stride + k + 16 * q, mask(q));
    }
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = codes + r * stride + k;
      __m512i raw;
      if constexpr (kFull) {
        raw = _mm512_loadu_si512(row);
      } else {
        raw = _mm512_maskz_loadu_epi8(first64(n - k), row);
      }
      __m512 level[4];
      table.decode<Wide>(order32(raw), level);
      for (int m = 0; m < M; ++m) {
        const __m512 f = _mm512_set1_ps(factor[r][m]);
        for (int q = 0; q < 4; ++q) sum[m][q] = _mm512_fmadd_ps(level[q], f, sum[m][q]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int q = 0; q < 4; ++q) store16(sums + m * sum_stride + k + 16 * q, mask(q), sum[m][q]);
    }
  };
  int64_t k = 0;
  for (; k + 64 <= n; k += 64) chunk(k, std::true_type{});
  if (k < n) chunk(k, std::false_type{});
}

// Adds rows n to n + R - 1 of W, whose blocks end at the same columns, to sums of columns
// begin to end.
template <int R, int M, bool Wide, class T>
Q8_INLINE void add_runs(const FloatTable& table, const Weight& w, const T* dy, int64_t n,
                        int64_t begin, int64_t end, float* sums, int64_t sum_stride) {
  for (int64_t k = begin; k < end;) {
    const int64_t flat = n * w.cols + k;
    const int64_t stop = min_of(end, k + block_end(flat, w.block_shift) - flat);
    float factor[R][M];
    for (int r = 0; r < R; ++r) {
      const float scale = w.absmax[block_of(flat + r * w.cols, w.block_shift)];
      for (int m = 0; m < M; ++m) factor[r][m] = to_float(dy[m * w.rows + n + r]) * scale;
    }
    add_rows<R, M, Wide>(table, w.codes + flat, w.cols, stop - k, factor, sums + (k - begin),
                         sum_stride);
    k = stop;
  }
}

template <int M, bool Wide, class T>
void few_typed(const Pool& pool, const Weight& w, const T* dy, T* dx) {
  constexpr int kGroup = 4;
  constexpr int64_t kWidth = kSumElements / M / 64 * 64;
  const bool aligned = w.cols % (int64_t{1} << w.block_shift) == 0;
  auto run_columns = [&](int64_t first_unit, int64_t end_unit) {
    const FloatTable table(w.codebook);
    alignas(64) float sums[M * kWidth];
    const int64_t last = min_of(w.cols, end_unit * 64);
    for (int64_t begin = first_unit * 64; begin < last; begin += kWidth) {
      const int64_t end = min_of(last, begin + kWidth);
      for (float& sum : sums) sum = 0.0f;
      int64_t n = 0;
      if (aligned) {
        for (; n + kGroup <= w.rows; n += kGroup) {
          add_runs<kGroup, M, Wide>(table, w, dy, n, begin, end, sums, kWidth);
        }
      }
      for (; n < w.rows; ++n) {
        add_runs<1, M, Wide>(table, w, dy, n, begin, end, sums, kWidth);
      }
      for (int m = 0; m < M; ++m) {
        for (int64_t k = begin; k < end; ++k) {
          from_float(sums[m * kWidth + k - begin], &dx[m * w.cols + k]);
        }
      }
    }
  };
  parallel(pool, ceil_div(w.cols, 64), 1 + 1024 / w.rows, run_columns);
}

template <bool Wide, class T>
void grad_input(const LinearGradInputArgs& a, const Pool& pool, const T* dy, T* dx) {
  const Weight& w = a.weight;
  if (are_few(a.m, w) && std::isfinite(largest_scaled(pool, dy, a.m, w))) {
    return with_count<kFewRows>(
        a.m, [&](auto m) { few_typed<decltype(m)::value, Wide>(pool, w, dy, dx); });
  }
  const auto make_fill = [&](auto panel) { return FillColumns<decltype(panel), Wide>{w}; };
  multiply_any<PanelOf<T>>(pool, dy, a.m, w.rows, w.cols, make_fill, nullptr, dx);
}

}  // namespace

void linear_grad_input(const LinearGradInputArgs& a, const Pool& pool) {
  const bool exact = bf16_exact(a.weight.codebook);
  with_type(a.dtype, [&](auto* t) {
    const auto* dy = typed(a.dy, t);
    auto* dx = typed(a.dx, t);
    exact ? grad_input<false>(a, pool, dy, dx) : grad_input<true>(a, pool, dy, dx);
  });
}

}  // namespace gptj_q8::Q8_ISA
