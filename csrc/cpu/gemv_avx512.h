// linear for a few rows of x: y[M, N] = x[M, K] @ W[N, K].T + bias[N].
//
// W is decoded in registers and never written. One piece of work owns whole rows of W; four (or
// two, or one) at a time share the loads of x. bfloat16 x goes through vdpbf16ps, with levels that
// bfloat16 does not hold split into two parts; float32 x (and float16 x, converted) through
// float32 multiply-adds on the exact levels. Sums of a block are scaled by absmax once.
// Why this shape: at M = 1 the codes stream from memory once and everything else must hide behind
// that: 13 instructions decode 64 codes and 2 (bfloat16) or 8 (float32) multiply them. Rows are
// taken several at a time so that a core sees several streams and independent sums.
#pragma once

#include "primitives_avx512.h"
#include "scratch.h"

namespace gptj_q8::Q8_ISA {

template <bool Full>
Q8_INLINE __m512i load_codes(const uint8_t* codes, __mmask64 mask) {
  if constexpr (Full) return _mm512_loadu_si512(codes);
  return _mm512_maskz_loadu_epi8(mask, codes);
}

#if defined(__AVX512BF16__)
// How 64 values of x meet 64 levels: bfloat16.
template <bool Wide>
struct Bf16Product {
  using X = bf16;
  // More rows of x than this spill sums out of the registers.
  static constexpr int kMaxRows = Wide ? 4 : 6;
  // Up to here decoding again for each pass beats writing panels: Zen 5, 4096 x 4096, one
  // thread, 12 rows in two passes about 1.9 ms, in panels 2.1.
  static constexpr int64_t kFewRows = Wide ? 4 : 12;
  Table nearest, rest;
  struct Input {
    __m512i half[2];
  };

  Q8_INLINE explicit Bf16Product(const float* codebook)
      : nearest(codebook, as_bf16), rest(codebook, bf16_rest) {}

  template <bool Full>
  static Q8_INLINE Input load(const bf16* x, int64_t n) {
    if constexpr (Full) return {{_mm512_loadu_si512(x), _mm512_loadu_si512(x + 32)}};
    const __mmask64 mask = first64(n);
    const __mmask32 low = static_cast<__mmask32>(mask);
    if (n <= 32) return {{_mm512_maskz_loadu_epi16(low, x), _mm512_setzero_si512()}};
    const __mmask32 high = static_cast<__mmask32>(mask >> 32);
    return {{_mm512_maskz_loadu_epi16(low, x), _mm512_maskz_loadu_epi16(high, x + 32)}};
  }

  // sums[0][m] += levels of the codes . x[m]; of two Parts, sums[1] takes the last 32 of 64.
  template <int M, int Parts>
  Q8_INLINE void multiply_add(__m512i codes, const Input (&x)[M], __m512 (&sums)[Parts][M]) const {
    codes = order16(codes);
    add(nearest, codes, x, sums);
    if constexpr (Wide) add(rest, codes, x, sums);
  }

 private:
  template <int M, int Parts>
  static Q8_INLINE void add(const Table& table, __m512i codes, const Input (&x)[M],
                            __m512 (&sums)[Parts][M]) {
    __m512i levels[2];
    decode64(table, codes, &levels[0], &levels[1]);
    for (int h = 0; h < 2; ++h) {
      for (int m = 0; m < M; ++m) {
        __m512& sum = sums[h % Parts][m];
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(levels[h]),
                               reinterpret_cast<__m512bh>(x[m].half[h]));
      }
    }
  }
};

#endif

// How 64 values of x meet 64 levels: float32.
template <bool Wide>
struct FloatProduct {
  using X = float;
  static constexpr int kMaxRows = 4;
  static constexpr int64_t kFewRows = Wide ? 3 : 4;  // 1.4 ms; 5 rows in panels 1.9, as above
  FloatTable table;
  struct Input {
    __m512 quarter[4];
  };

  Q8_INLINE explicit FloatProduct(const float* codebook) : table(codebook) {}

  template <bool Full>
  static Q8_INLINE Input load(const float* x, int64_t n) {
    Input input;
    for (int q = 0; q < 4; ++q) {
      const int64_t left = Full ? 16 : n - 16 * q;
      input.quarter[q] = left <= 0 ? _mm512_setzero_ps() : load16(x + 16 * q, first16(left));
    }
    return input;
  }

  template <int M, int Parts>
  Q8_INLINE void multiply_add(__m512i codes, const Input (&x)[M], __m512 (&sums)[Parts][M]) const {
    __m512 levels[4];
    table.decode<Wide>(order32(codes), levels);
    for (int q = 0; q < 4; ++q) {
      for (int m = 0; m < M; ++m) {
        __m512& sum = sums[q / 2 % Parts][m];
        sum = _mm512_fmadd_ps(levels[q], x[m].quarter[q], sum);
      }
    }
  }
};

#if defined(__AVX512BF16__)
template <class T, bool Wide>
using ProductOf =
    std::conditional_t<std::is_same_v<T, bf16>, Bf16Product<Wide>, FloatProduct<Wide>>;
#else
template <class T, bool Wide>
using ProductOf = FloatProduct<Wide>;
#endif

// Bytes of each row to prefetch ahead. Zen 5, M = 1, bfloat16, one thread: 4096 x 4096 streams at
// 0.48, 0.62, 0.72, 0.76, 0.74 of the read loop with 256, 1024, 2048, 4096, 8192; 4096 x 16384 at
// 0.57, 0.65, 0.76, 0.73, 0.65 (16384, the row below: 0.68).
constexpr int64_t kAhead = 4096;

// sums[r][m] = x[m] . W[n + r] for R rows of W whose blocks end at the same columns.
template <int R, int M, class Product>
Q8_INLINE void dot_rows(const Product& product, const Weight& w, int64_t n,
                        const typename Product::X* x, __m512 (&sums)[R][M]) {
  const uint8_t* codes = w.codes + n * w.cols;
  const int64_t distance = min_of(w.cols, kAhead);
  for (auto& row : sums) {
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < w.cols;) {
    const int64_t flat = n * w.cols + k;
    const int64_t stop = min_of(w.cols, k + block_end(flat, w.block_shift) - flat);
    __m512 block[R][1][M];
    for (auto& row : block) {
      for (__m512& sum : row[0]) sum = _mm512_setzero_ps();
    }
    auto chunk = [&](auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      typename Product::Input input[M];
      for (int m = 0; m < M; ++m) {
        input[m] = Product::template load<kFull>(x + m * w.cols + k, stop - k);
      }
      // On in this row, then in the one that its place in the next group of rows holds.
      const int64_t ahead = k + distance < w.cols ? distance : distance + (R - 1) * w.cols;
      for (int r = 0; r < R; ++r) {
        const uint8_t* row = codes + r * w.cols + k;
        prefetch(row, ahead);
        product.multiply_add(load_codes<kFull>(row, first64(stop - k)), input, block[r]);
      }
    };
    for (; k + 64 <= stop; k += 64) chunk(std::true_type{});
    if (k < stop) chunk(std::false_type{});
    k = stop;
    for (int r = 0; r < R; ++r) {
      const float scale = w.absmax[block_of(flat + r * w.cols, w.block_shift)];
      for (int m = 0; m < M; ++m) {
        sums[r][m] = _mm512_fmadd_ps(block[r][0][m], _mm512_set1_ps(scale), sums[r][m]);
      }
    }
  }
}

// The same for blocks of 32 where rows are whole registers of 64 codes: each register is two
// blocks.
template <int R, int M, class Product>
Q8_INLINE void dot_rows_of_32(const Product& product, const Weight& w, int64_t n,
                              const typename Product::X* x, __m512 (&sums)[R][M]) {
  for (auto& row : sums) {
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < w.cols; k += 64) {
    typename Product::Input input[M];
    for (int m = 0; m < M; ++m) input[m] = Product::template load<true>(x + m * w.cols + k, 64);
    for (int r = 0; r < R; ++r) {
      const int64_t flat = (n + r) * w.cols + k;
      prefetch(w.codes + flat, R * w.cols);
      __m512 block[2][M];
      for (auto& half : block) {
        for (__m512& sum : half) sum = _mm512_setzero_ps();
      }
      product.multiply_add(_mm512_loadu_si512(w.codes + flat), input, block);
      for (int half = 0; half < 2; ++half) {
        const __m512 scale = _mm512_set1_ps(w.absmax[flat / 32 + half]);
        for (int m = 0; m < M; ++m) {
          sums[r][m] = _mm512_fmadd_ps(block[half][m], scale, sums[r][m]);
        }
      }
    }
  }
}

// y[0:M, begin:end], y and x rows N and K apart.
template <int M, class Product, class T>
void few_pass(const Product& product, const typename Product::X* x, const Weight& w,
              const float* bias, int64_t begin, int64_t end, T* y) {
  constexpr int kGroup = M <= 2 ? 4 : M <= 4 ? 2 : 1;  // what the registers hold beside tables
  const auto finish = [&](int64_t n, const __m512(&sums)[M]) {
    for (int m = 0; m < M; ++m) {
      const float sum = _mm512_reduce_add_ps(sums[m]);
      from_float(bias ? sum + bias[n] : sum, &y[m * w.rows + n]);
    }
  };
  int64_t n = begin;
  const bool of_32 = w.block_shift == 5 && w.cols % 64 == 0;
  if (w.cols % (int64_t{1} << w.block_shift) == 0) {
    for (; n + kGroup <= end; n += kGroup) {
      __m512 sums[kGroup][M];
      of_32 ? dot_rows_of_32(product, w, n, x, sums) : dot_rows(product, w, n, x, sums);
      for (int r = 0; r < kGroup; ++r) finish(n + r, sums[r]);
    }
  }
  for (; n < end; ++n) {
    __m512 sums[1][M];
    // The same function as for a group, so that a row's bits do not depend on its place.
    of_32 ? dot_rows_of_32(product, w, n, x, sums) : dot_rows(product, w, n, x, sums);
    finish(n, sums[0]);
  }
}

// Passes of about equal size, each with at most Product::kMaxRows rows of x; a strip of W that
// fits the L2 cache sees all of them before the next strip comes.
template <class Product, class T>
void linear_few(const Pool& pool, const typename Product::X* x, int64_t rows, const Weight& w,
                const float* bias, T* y) {
  const int64_t size = ceil_div(rows, ceil_div(rows, Product::kMaxRows));
  auto run_rows = [&](int64_t begin, int64_t end) {
    const Product product(w.codebook);
    const int64_t strip = 1 + 262144 / w.cols;
    for (int64_t n = begin; n < end; n += strip) {
      const int64_t stop = min_of(end, n + strip);
      for (int64_t m = 0; m < rows; m += size) {
        const auto pass = [&](auto count) {
          few_pass<decltype(count)::value>(product, x + m * w.cols, w, bias, n, stop,
                                           y + m * w.rows);
        };
        with_count<Product::kMaxRows>(min_of(size, rows - m), pass);
      }
    }
  };
  parallel(pool, w.rows, 1 + 65536 / w.cols, run_rows);
}

}  // namespace gptj_q8::Q8_ISA
