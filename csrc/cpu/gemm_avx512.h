// c[M, cols] = a[M, depth] @ B[depth, cols] in float32, B decoded a panel at a time.
//
// A panel is 64 columns of B times up to P::kSteps steps of the reduction, 128 KB that stay in the
// L2 cache while all M rows of `a` go past it: panel[step][column], each entry 4 bytes, one
// float32 or a pair of bfloat16 that follow each other along the reduction. One piece of work
// owns whole panels, so the order of additions does not depend on the number of threads. The
// caller fills panels (that is where decoding and scaling happen) and stores results; it has made
// `depth` a multiple of P::kWidth and `a` readable to its end.
// Why this shape: 6 rows by 4 registers of columns give 24 accumulators, and each step loads 4
// registers and broadcasts 6 values for 24 multiply-adds, so loads are not the limit.
#pragma once

#include "primitives_avx512.h"
#include "scratch.h"

namespace gptj_q8::Q8_ISA {

constexpr int kColumns = 64;
constexpr int kTileRows = 6;
// Rows of `a` that share one decoding: c then takes 128 KB, next to a panel's 128 KB.
constexpr int64_t kRowsPerPass = 512;

// 16 columns are a group. at() says where a group of a step lies in a panel.
struct FloatPanel {
  using A = float;
  static constexpr int kWidth = 1;
  static constexpr int kSteps = 512;

  static Q8_INLINE uint32_t* at(uint32_t* panel, int64_t step, int group) {
    return panel + step * kColumns + group * 16;
  }

  static Q8_INLINE __m512i broadcast(const float* a) {
    return _mm512_castps_si512(_mm512_set1_ps(*a));
  }
  static Q8_INLINE __m512 multiply_add(__m512 c, __m512i b, __m512i a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(b), _mm512_castsi512_ps(a), c);
  }
};

#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;

struct Bf16Panel {
  using A = bf16;
  static constexpr int kWidth = 2;
  static constexpr int kSteps = 512;

  static Q8_INLINE uint32_t* at(uint32_t* panel, int64_t step, int group) {
    return FloatPanel::at(panel, step, group);
  }

  static Q8_INLINE __m512i broadcast(const bf16* a) {
    int32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_set1_epi32(pair);
  }
  static Q8_INLINE __m512 multiply_add(__m512 c, __m512i b, __m512i a) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
  // 16 pairs of the even and odd values, rounded to bfloat16.
  static Q8_INLINE __m512i pairs(__m512 even, __m512 odd) {
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
  }
};

// Pairs of bfloat16 for bfloat16, float32 for the others.
template <class T>
using PanelOf = std::conditional_t<std::is_same_v<T, bf16>, Bf16Panel, FloatPanel>;
#else
constexpr bool kHasBf16 = false;

template <class T>
using PanelOf = FloatPanel;
#endif

// The reduction elements of one panel.
template <class P>
constexpr int64_t kDepth = int64_t{P::kSteps} * P::kWidth;
template <class P>
constexpr int64_t kPanelEntries = int64_t{P::kSteps} * kColumns;

template <class P, int Rows>
Q8_INLINE void tile(const typename P::A* a, int64_t stride, const uint32_t* panel, int64_t steps,
                    bool first, float* c) {
  __m512 sum[Rows][4];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 4; ++j) {
      sum[i][j] = first ? _mm512_setzero_ps() : _mm512_load_ps(c + i * kColumns + 16 * j);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    __m512i b[4];
    for (int j = 0; j < 4; ++j) b[j] = _mm512_load_si512(panel + s * kColumns + 16 * j);
    for (int i = 0; i < Rows; ++i) {
      const __m512i value = P::broadcast(a + i * stride + s * P::kWidth);
      for (int j = 0; j < 4; ++j) sum[i][j] = P::multiply_add(sum[i][j], b[j], value);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 4; ++j) _mm512_store_ps(c + i * kColumns + 16 * j, sum[i][j]);
  }
}

// All rows of `a` against one panel.
template <class P>
void multiply_panel(const typename P::A* a, int64_t stride, int64_t rows, const uint32_t* panel,
                    int64_t steps, bool first, float* c) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    tile<P, kTileRows>(a + i * stride, stride, panel, steps, first, c + i * kColumns);
  }
  a += i * stride;
  c += i * kColumns;
  if (i == rows) return;
  with_count<kTileRows - 1>(rows - i, [&](auto count) {
    tile<P, decltype(count)::value>(a, stride, panel, steps, first, c);
  });
}

// Where a panel begins in B, or several side by side.
struct Place {
  int64_t column, begin;
  int64_t panels = 1;
};

// fill(place, end, next, panel) decodes B[place.begin:end, place.column:place.column + 64], and as
// much for each further panel; `next` is what comes after, for those who prefetch it.
template <class P, class T, class Fill>
void multiply(const Pool& pool, const typename P::A* a, int64_t rows, int64_t depth, int64_t cols,
              const Fill& fill, const float* bias, T* out) {
  auto run_panels = [&](int64_t begin, int64_t end) {
    Scratch<uint32_t> panel(kPanelEntries<P>);
    Scratch<float> c(rows * kColumns);
    for (int64_t column = begin * kColumns; column < min_of(cols, end * kColumns);
         column += kColumns) {
      for (int64_t r = 0; r < depth; r += kDepth<P>) {
        const int64_t stop = min_of(depth, r + kDepth<P>);
        const Place next = stop < depth ? Place{column, stop} : Place{column + kColumns, 0};
        fill({column, r}, stop, next, panel.data());
        multiply_panel<P>(a + r, depth, rows, panel.data(), (stop - r) / P::kWidth, r == 0,
                          c.data());
      }
      for (int j = 0; j < 4 && column + 16 * j < cols; ++j) {
        const int64_t first = column + 16 * j;
        const __mmask16 mask = first16(cols - first);
        const __m512 add = bias ? load16(bias + first, mask) : _mm512_setzero_ps();
        for (int64_t i = 0; i < rows; ++i) {
          const __m512 sum = _mm512_load_ps(c.data() + i * kColumns + 16 * j);
          store16(out + i * cols + first, mask, _mm512_add_ps(sum, add));
        }
      }
    }
  };
  parallel(pool, ceil_div(cols, kColumns), 1, run_panels);
}

// multiply() for `a` of type T: converts or pads `a` where its own memory will not do.
template <class P, class T, class MakeFill>
void multiply_any(const Pool& pool, const T* a, int64_t rows, int64_t depth, int64_t cols,
                  const MakeFill& make_fill, const float* bias, T* out) {
  using A = typename P::A;
  const int64_t padded = ceil_div(depth, P::kWidth) * P::kWidth;
  const bool direct = std::is_same_v<T, A> && padded == depth;
  Scratch<A> copy(direct ? 0 : min_of(rows, kRowsPerPass) * padded);
  for (int64_t first = 0; first < rows; first += kRowsPerPass) {
    const int64_t count = min_of(rows - first, kRowsPerPass);
    const T* source = a + first * depth;
    const A* input = nullptr;
    if constexpr (std::is_same_v<T, A>) input = source;
    if (!direct) {
      auto copy_rows = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          A* row = copy.data() + i * padded;
          convert(source + i * depth, depth, row);
          for (int64_t k = depth; k < padded; ++k) row[k] = A{};
        }
      };
      parallel(pool, count, 1 + 32768 / padded, copy_rows);
      input = copy.data();
    }
    multiply<P>(pool, input, count, padded, cols, make_fill(P{}), bias, out + first * cols);
  }
}

}  // namespace gptj_q8::Q8_ISA
