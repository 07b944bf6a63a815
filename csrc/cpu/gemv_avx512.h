// linear for a few rows of x: y[M, N] = x[M, K] @ W[N, K].T + bias[N].
//
// W is decoded in registers and never written. One piece of work owns whole rows of W and walks
// along one row at a time; sums of a block are scaled by absmax once. x is rearranged once for
// each call, into the order in which decode64 emits levels, padded with zeros to whole registers.
// The caller has made sure that scale_can_wait.
// With vdpbf16ps, float32 and float16 x are two bfloat16 parts (high + low, to 2^-18), and the
// levels of a codebook that bfloat16 does not hold are two parts likewise (`Wide`), multiplied by
// the high part of x only. float32 x with such levels, and all without vdpbf16ps, go through
// float32 multiply-adds.
// Why this shape: at M = 1 the codes stream from memory once and everything else must hide behind
// that: 12 instructions decode 64 codes and 2 multiply them, for each part of x. One row at a time
// is one stream that runs through memory in order, as a read loop does; four at a time reached 0.78
// of the read loop here, one 0.93 (Zen 5, 4096 x 4096, one thread). Columns are taken so many at a
// time that x stays in the L1 cache.
#pragma once

#include "primitives_avx512.h"
#include "scratch.h"

namespace gptj_q8::Q8_ISA {

// Bytes of x that are gone through for a strip of rows before the next columns come; half of an L1
// cache of 32 KB. 4096 x 16384, M = 1: 0.79 of the read loop, all columns at once 0.51.
constexpr int64_t kBytesOfX = 16384;
// How far ahead of the codes in hand to prefetch, rounded up to rows. Zen 5, 4096 x 4096: at
// 4096, 8192, 12288, 16384 bytes 0.88, 0.95, 0.96, 0.96 of the read loop.
constexpr int64_t kAhead = 8192;
constexpr int64_t kStrip = 64;  // rows that share the columns of x in the L1 cache

// The columns, of 64, whose levels a register holds, ascending, as a set of bits.
struct Indices16 {
  alignas(64) uint16_t at[32] = {};
  constexpr explicit Indices16(uint64_t columns) {
    for (int k = 0, i = 0; k < 64; ++k) {
      if (columns >> k & 1) at[i++] = static_cast<uint16_t>(k);
    }
  }
};
struct Indices32 {
  alignas(64) uint32_t at[16] = {};
  constexpr explicit Indices32(uint64_t columns) {
    for (int k = 0, i = 0; k < 64; ++k) {
      if (columns >> k & 1) at[i++] = static_cast<uint32_t>(k);
    }
  }
};

// Sums of a run of codes, each in Sets times two registers that do not wait for each other.
template <int R, int M, int Sets>
struct Sums {
  __m512 at[R][M][Sets][2];

  Q8_INLINE Sums() {
    for (auto& row : at) {
      for (auto& of_x : row) {
        for (auto& set : of_x) set[0] = set[1] = _mm512_setzero_ps();
      }
    }
  }
  Q8_INLINE __m512 total(int r, int m) const {
    __m512 sum = _mm512_add_ps(at[r][m][0][0], at[r][m][0][1]);
    for (int s = 1; s < Sets; ++s) {
      sum = _mm512_add_ps(sum, _mm512_add_ps(at[r][m][s][0], at[r][m][s][1]));
    }
    return sum;
  }
};

#if defined(__AVX512BF16__)
// 64 levels meet 64 values of x in bfloat16. kParts: how many bfloat16 values make one of x.
// kPairs: whether the registers hold what two rows of W and a few of x need.
template <int kPartsOfX, bool Wide>
struct Bf16Product {
  using X = bf16;
  static constexpr int kParts = kPartsOfX;
  static constexpr bool kPairs = true;
  Table nearest, rest;

  Q8_INLINE explicit Bf16Product(const float* codebook)
      : nearest(codebook, as_bf16), rest(codebook, bf16_rest) {}

  // 64 values -> 64 of each part, `stride` apart.
  template <class T>
  static Q8_INLINE void arrange(const T* x, int64_t n, bf16* out, int64_t stride) {
    __m512i halves[kParts][2];
    for (int h = 0; h < 2; ++h) {
      const __mmask32 mask = static_cast<__mmask32>(first64(n) >> (32 * h));
      if constexpr (kParts == 1) {
        halves[0][h] = _mm512_maskz_loadu_epi16(mask, x + 32 * h);
      } else {
        const __m512 low = load16(x + 32 * h, static_cast<__mmask16>(mask));
        const __m512 high = load16(x + 32 * h + 16, static_cast<__mmask16>(mask >> 16));
        halves[0][h] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        __m512 even, odd;  // of 32: the first 16 and the last 16
        even = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(halves[0][h])));
        odd = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(halves[0][h], 1)));
        halves[1][h] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
      }
    }
    for (int p = 0; p < kParts; ++p) {
      for (int h = 0; h < 2; ++h) {
        static constexpr Indices16 kOrder[2] = {Indices16(kColumnsOf[0]), Indices16(kColumnsOf[1])};
        const __m512i order = _mm512_load_si512(kOrder[h].at);
        _mm512_store_si512(out + p * stride + 32 * h,
                           _mm512_permutex2var_epi16(halves[p][0], order, halves[p][1]));
      }
    }
  }

  // sums[r][m] += levels of codes[r] . x[m] over the columns in `mask`. x: parts `stride` apart.
  template <bool Full, int R, int M, int Sets>
  Q8_INLINE void multiply_add(const __m512i (&codes)[R], __mmask64 mask, const bf16* x,
                              int64_t stride, int set, Sums<R, M, Sets>& sums) const {
    __m512i level[R][2], other[R][2];
    for (int r = 0; r < R; ++r) {
      decode64(nearest, codes[r], &level[r][0], &level[r][1]);
      if constexpr (Wide) decode64(rest, codes[r], &other[r][0], &other[r][1]);
    }
    for (int h = 0; h < 2; ++h) {
      const __mmask32 columns = static_cast<__mmask32>(_pext_u64(mask, kColumnsOf[h]));
      for (int m = 0; m < M; ++m) {
        for (int p = 0; p < kParts; ++p) {
          const bf16* source = x + (m * kParts + p) * stride + 32 * h;
          const __m512i value =
              Full ? _mm512_load_si512(source) : _mm512_maskz_loadu_epi16(columns, source);
          for (int r = 0; r < R; ++r) {
            add(level[r][h], value, &sums.at[r][m][(set + p) % Sets][h]);
            if constexpr (Wide) {
              if (p == 0) add(other[r][h], value, &sums.at[r][m][(set + 1) % Sets][h]);
            }
          }
        }
      }
    }
  }

 private:
  static Q8_INLINE __m512 widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Q8_INLINE void add(__m512i level, __m512i x, __m512* sum) {
    *sum = _mm512_dpbf16_ps(*sum, reinterpret_cast<__m512bh>(level), reinterpret_cast<__m512bh>(x));
  }
};
#endif

// 64 levels meet 64 values of x in float32.
template <bool Wide>
struct FloatProduct {
  using X = float;
  static constexpr int kParts = 1;
  static constexpr bool kPairs = !Wide;
  FloatTable table;

  Q8_INLINE explicit FloatProduct(const float* codebook) : table(codebook) {}

  template <class T>
  static Q8_INLINE void arrange(const T* x, int64_t n, float* out, int64_t) {
    __m512 in[4];
    for (int q = 0; q < 4; ++q) in[q] = load16(x + 16 * q, first16(n - 16 * q));
    for (int q = 0; q < 4; ++q) {
      static constexpr Indices32 kOrder[4] = {
          Indices32(kColumnsOfFloats[0]), Indices32(kColumnsOfFloats[1]),
          Indices32(kColumnsOfFloats[2]), Indices32(kColumnsOfFloats[3])};
      const __m512i order = _mm512_load_si512(kOrder[q].at);
      const __m512 low = _mm512_permutex2var_ps(in[0], order, in[1]);
      const __m512 high = _mm512_permutex2var_ps(in[2], order, in[3]);
      const __mmask16 upper = _mm512_test_epi32_mask(order, _mm512_set1_epi32(32));
      _mm512_store_ps(out + 16 * q, _mm512_mask_blend_ps(upper, low, high));
    }
  }

  template <bool Full, int R, int M, int Sets>
  Q8_INLINE void multiply_add(const __m512i (&codes)[R], __mmask64 mask, const float* x,
                              int64_t stride, int set, Sums<R, M, Sets>& sums) const {
    __m512 level[R][4];
    for (int r = 0; r < R; ++r) table.decode<Wide>(codes[r], level[r]);
    for (int q = 0; q < 4; ++q) {
      const __mmask16 columns = static_cast<__mmask16>(_pext_u64(mask, kColumnsOfFloats[q]));
      for (int m = 0; m < M; ++m) {
        const float* source = x + m * stride + 16 * q;
        const __m512 value = Full ? _mm512_load_ps(source) : _mm512_maskz_loadu_ps(columns, source);
        for (int r = 0; r < R; ++r) {
          __m512& sum = sums.at[r][m][(set + q / 2) % Sets][q % 2];
          sum = _mm512_fmadd_ps(level[r][q], value, sum);
        }
      }
    }
  }
};

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
// columns. `ahead` holds the codes to come, prefetched in step. Whole: K is a multiple of 64, so
// that no block ends inside 64 codes, but for blocks of 32: of two such, each lies in one half of
// every register of sums.
template <int R, int M, bool Whole, class Product>
Q8_INLINE void add_rows(const Product& product, const Weight& w, int64_t n, int64_t begin,
                        int64_t end, const typename Product::X* x, int64_t stride,
                        const uint8_t* ahead, __m512 (*sums)[M]) {
  constexpr int kSets = R * M == 1 ? 2 * Product::kParts : 1;
  const uint8_t* codes = w.codes + n * w.cols;
  const bool halves = Whole && w.block_shift == 5;
  __m512 total[R][M];  // in registers
  for (int r = 0; r < R; ++r) {
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
          prefetch(ahead, r * w.cols + k - begin);
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
          prefetch(ahead, r * w.cols + base - begin);
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
template <int M, bool Whole, class Product, class T>
void few_strip(const Product& in_memory, const typename Product::X* x, int64_t stride,
               const Weight& w, const float* bias, int64_t begin, int64_t end, T* y) {
  const Product product = in_memory;  // in registers
  constexpr int64_t kElement = sizeof(typename Product::X) * Product::kParts * M;
  constexpr int64_t kColumnsAtOnce =
      kBytesOfX / kElement < 4096 ? 4096 : kBytesOfX / kElement / 4096 * 4096;
  // Two rows of W share the loads of several rows of x, as long as the registers hold it all.
  constexpr int R = M > 1 && M <= 4 && Product::kPairs ? 2 : 1;
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
                                                w.codes + row * w.cols + column, sums + i);
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
template <class Product, int kMaxRows, class T>
void linear_few(const Pool& pool, const T* x, int64_t rows, const Weight& w, const float* bias,
                T* y) {
  const ArrangedX<Product> arranged(x, rows, w.cols);
  const int64_t size = ceil_div(rows, ceil_div(rows, kMaxRows));
  const bool whole = w.cols % 64 == 0;
  auto run_rows = [&](int64_t begin, int64_t end) {
    const Product product(w.codebook);
    const int64_t strip = min_of(kStrip, 1 + 262144 / w.cols);
    for (int64_t n = begin; n < end; n += strip) {
      const int64_t stop = min_of(end, n + strip);
      for (int64_t m = 0; m < rows; m += size) {
        with_count<kMaxRows>(min_of(size, rows - m), [&](auto count) {
          constexpr int M = decltype(count)::value;
          const auto strip_of =
              whole ? few_strip<M, true, Product, T> : few_strip<M, false, Product, T>;
          strip_of(product, arranged.row(m), arranged.stride, w, bias, n, stop, y + m * w.rows);
        });
      }
    }
  };
  parallel(pool, w.rows, 1 + 65536 / w.cols, run_rows);
}

}  // namespace gptj_q8::Q8_ISA
