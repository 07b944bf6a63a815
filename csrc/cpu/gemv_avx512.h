// linear for a few rows of x: y[M, N] = x[M, K] @ W[N, K].T + bias[N].
//
// W is decoded in registers and never written. One piece of work owns whole rows of W and walks
// along one row at a time; sums of a block are scaled by absmax once. x is arranged once for each
// call, padded with zeros to whole registers. product_avx512.h multiplies. The caller has made sure
// that x may_meet_levels.
// Why this shape: at M = 1 the codes stream from memory once and everything else must hide behind
// that: 12 instructions decode 64 codes and 2 multiply them, for each part of x. How many rows of W
// one row of x meets at a time is the caller's choice, AtOnce, for it depends on the machine: one
// row is one stream that runs through memory in order, as a read loop does, and four reached 0.78
// of the read loop where one reached 0.93 (Zen 5, 4096 x 4096, one thread); an Intel Xeon with AMX
// fetches several streams faster, at 1.06 for four, 1.00 for two and 0.64 for one (two threads,
// median ms 0.64, 0.68, 1.07). Columns are taken so many at a time that x stays in the L1 cache.
#pragma once

#include "product_avx512.h"
#include "scratch.h"

namespace gptj_q8::Q8_ISA {

// Bytes of x that are gone through for a strip of rows before the next columns come; half of an L1
// cache of 32 KB. 4096 x 16384, M = 1: 0.79 of the read loop, as much as a read loop in this order;
// all columns at once, x from the L2 cache, 0.51, two or four rows at a time then 0.68 and 0.70.
constexpr int64_t kBytesOfX = 16384;
// How far ahead of the codes in hand to prefetch, rounded up to rows. Zen 5, 4096 x 4096: at
// 4096, 8192, 12288, 16384 bytes 0.88, 0.95, 0.96, 0.96 of the read loop.
constexpr int64_t kAhead = 8192;
constexpr int64_t kStrip = 64;  // rows that share the columns of x in the L1 cache

// Of two blocks of 32 that share a register of codes, each lies in one half of every register of
// levels.
Q8_INLINE __m512 two_scales(const float* scales) {
  return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
}

// Asks for the scales of `count` codes, which may lie past the end of W.
Q8_INLINE void prefetch_scales(const Weight& w, int64_t flat, int64_t count) {
  const auto* scales = reinterpret_cast<const uint8_t*>(w.absmax);
  const int64_t end = block_end(flat + count - 1, w.block_shift) >> w.block_shift;
  for (int64_t i = block_of(flat, w.block_shift); i < end; i += 16) prefetch(scales, 4 * i);
}

// x of M rows as a Product wants it: [M][kParts][stride], zeros past K.
template <class Product>
struct ArrangedX {
  int64_t stride;
  Scratch<typename Product::X> values;

  template <class T>
  ArrangedX(const T* x, int64_t rows, int64_t cols)
      : stride(ceil_div(cols, 64) * 64), values(rows * Product::kParts * stride) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < cols; k += 64) {
        Product::arrange(x + m * cols + k, cols - k, row(m) + k, stride);
      }
    }
  }
  typename Product::X* row(int64_t m) const { return values.data() + m * Product::kParts * stride; }
};

// sums[r][m] += x[m] . W[n + r] over columns begin to end, R rows of W whose blocks end at the same
// columns. The codes to come, from element `ahead` of W, are prefetched in step, their scales at
// once: of rows gone through in parts, no two parts have their scales side by side, and the
// hardware does not foresee them (4096 x 16384: 3 % at M = 1, 4 % at M = 4).
// Whole: K is a multiple of 64, so that no block ends inside 64 codes, but for blocks of 32: of two
// such, each lies in one half of every register of sums.
template <int R, int M, bool Whole, class Product>
Q8_INLINE void add_rows(const Product& product, const Weight& w, int64_t n, int64_t begin,
                        int64_t end, const typename Product::X* x, int64_t stride, int64_t ahead,
                        __m512 (*sums)[M]) {
  constexpr int kSets = R * M == 1 ? 2 * Product::kParts : 1;
  const uint8_t* codes = w.codes + n * w.cols;
  const bool halves = Whole && w.block_shift == 5;
  __m512 total[R][M];  // in registers
  for (int r = 0; r < R; ++r) {
    prefetch_scales(w, ahead + r * w.cols, end - begin);
    for (int m = 0; m < M; ++m) total[r][m] = sums[r][m];
  }
  for (int64_t k = begin; k < end;) {
    const int64_t flat = n * w.cols + k;
    const int64_t last = halves ? k + 64 : k + block_end(flat, w.block_shift) - flat;
    const int64_t stop = min_of(end, last);
    Sums<R, M, kSets> run;
    __m512i raw[R];
    if constexpr (Whole) {
      const auto chunk = [&](int set) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          prefetch(w.codes, ahead + r * w.cols + k - begin);
          raw[r] = _mm512_loadu_si512(codes + r * w.cols + k);
        }
        product.template multiply_add<true>(raw, ~__mmask64{0}, x + k, stride, set, run);
        k += 64;
      };
      while (k + 128 <= stop) {
        chunk(0);
        chunk(Product::kParts);
      }
      if (k < stop) chunk(0);
    } else {
      while (k < stop) {
        const int64_t base = k / 64 * 64;
        const int64_t next = min_of(stop, base + 64);
        const __mmask64 mask = first64(next - base) & ~first64(k - base);
        for (int r = 0; r < R; ++r) {
          prefetch(w.codes, ahead + r * w.cols + base - begin);
          raw[r] = _mm512_maskz_loadu_epi8(mask, codes + r * w.cols + base);
        }
        product.template multiply_add<false>(raw, mask, x + base, stride, 0, run);
        k = next;
      }
    }
    for (int r = 0; r < R; ++r) {
      const float* scale = w.absmax + block_of(flat + r * w.cols, w.block_shift);
      const __m512 scales = halves ? two_scales(scale) : _mm512_set1_ps(*scale);
      for (int m = 0; m < M; ++m) {
        total[r][m] = _mm512_fmadd_ps(run.total(r, m), scales, total[r][m]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = total[r][m];
  }
}

// y[0:M, begin:end], y rows N apart; at most kStrip rows of W.
template <int AtOnce, int M, bool Whole, class Product, class T>
void few_strip(const Product& in_memory, const typename Product::X* x, int64_t stride,
               const Weight& w, const float* bias, int64_t begin, int64_t end, T* y) {
  const Product product = in_memory;  // in registers
  constexpr int64_t kElement = sizeof(typename Product::X) * Product::kParts * M;
  constexpr int64_t kColumnsAtOnce =
      kBytesOfX / kElement < 4096 ? 4096 : kBytesOfX / kElement / 4096 * 4096;
  // Two rows of W share the loads of several rows of x, as long as the registers hold it all.
  constexpr int R = M > 4 || !Product::kPairs ? 1 : M > 1 ? 2 : AtOnce;
  const bool in_step = Whole && w.cols % (int64_t{1} << w.block_shift) == 0;
  const int64_t ahead = ceil_div(kAhead, min_of(w.cols, kColumnsAtOnce) * R) * R;
  const int64_t count = end - begin;
  __m512 sums[kStrip][M];
  for (int64_t i = 0; i < count; ++i) {
    for (__m512& sum : sums[i]) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < w.cols; k += kColumnsAtOnce) {
    const int64_t stop = min_of(w.cols, k + kColumnsAtOnce);
    const auto add = [&](int64_t i, auto rows) __attribute__((always_inline)) {
      // Past the strip: its first rows again, further along, or the rows below.
      const bool inside = i + ahead < count, further = !inside && stop < w.cols;
      const int64_t row = begin + i + ahead - (further ? count : 0);
      const int64_t column = inside ? k : further ? stop : 0;
      add_rows<decltype(rows)::value, M, Whole>(product, w, begin + i, k, stop, x, stride,
                                                row * w.cols + column, sums + i);
    };
    int64_t i = 0;
    if (R > 1 && in_step) {
      for (; i + R <= count; i += R) add(i, std::integral_constant<int, R>{});
    }
    for (; i < count; ++i) add(i, std::integral_constant<int, 1>{});
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int m = 0; m < M; ++m) {
      const float sum = _mm512_reduce_add_ps(sums[i][m]);
      from_float(bias ? sum + bias[begin + i] : sum, &y[m * w.rows + begin + i]);
    }
  }
}

// Passes of about equal size, each with at most kMaxRows rows of x; a strip of W that fits the L2
// cache sees all of them before the next strip comes.
template <int AtOnce, class Product, int kMaxRows, class T>
void few_rows(const Pool& pool, const T* x, int64_t rows, const Weight& w, const float* bias,
              T* y) {
  const ArrangedX<Product> arranged(x, rows, w.cols);
  const int64_t size = ceil_div(rows, ceil_div(rows, kMaxRows));
  const bool whole = w.cols % 64 == 0;
  // In groups of AtOnce, so that the same rows meet x together on any number of threads.
  auto run_rows = [&](int64_t begin, int64_t end) {
    const Product product(w.codebook);
    const int64_t strip = ceil_div(min_of(kStrip, 1 + 262144 / w.cols), AtOnce) * AtOnce;
    const int64_t last = min_of(w.rows, end * AtOnce);
    for (int64_t n = begin * AtOnce; n < last; n += strip) {
      const int64_t stop = min_of(last, n + strip);
      for (int64_t m = 0; m < rows; m += size) {
        with_count<kMaxRows>(min_of(size, rows - m), [&](auto count) {
          constexpr int M = decltype(count)::value;
          const auto strip_of = whole ? few_strip<AtOnce, M, true, Product, T>
                                      : few_strip<AtOnce, M, false, Product, T>;
          strip_of(product, arranged.row(m), arranged.stride, w, bias, n, stop, y + m * w.rows);
        });
      }
    }
  };
  parallel(pool, ceil_div(w.rows, AtOnce), 1 + 65536 / w.cols / AtOnce, run_rows);
}

// By the Product that is fastest for T and the levels, and exact enough.
template <int AtOnce, bool Wide, class T>
void linear_few(const LinearArgs& a, const Pool& pool, const T* x, T* y) {
#if defined(__AVX512BF16__)
  if constexpr (!(std::is_same_v<T, float> && Wide)) {  // that would miss 1e-5
    constexpr int kParts = std::is_same_v<T, bf16> ? 1 : 2;
    using Product = Bf16Product<kParts, Wide>;
    return few_rows<AtOnce, Product, kParts == 1 ? 4 : 3>(pool, x, a.m, a.weight, a.bias, y);
  }
#endif
  few_rows<AtOnce, FloatProduct<Wide>, 4>(pool, x, a.m, a.weight, a.bias, y);
}

}  // namespace gptj_q8::Q8_ISA
