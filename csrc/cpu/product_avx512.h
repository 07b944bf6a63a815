// 64 levels of W, decoded in registers, meet 64 values of each of a few rows of x.
//
// A Product says how: `arrange` brings x into the order in which decode64 emits levels, once for
// each call, and `multiply_add` adds the products of R rows of W and M rows of x to R x M sums.
// With vdpbf16ps, float32 and float16 x are two bfloat16 parts (high + low, to 2^-18), and the
// levels of a codebook that bfloat16 does not hold are two parts likewise (`Wide`), multiplied by
// the high part of x only. float32 x with such levels, and all without vdpbf16ps, go through
// float32 multiply-adds.
#pragma once

#include "primitives_avx512.h"

namespace gptj_q8::Q8_ISA {

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

}  // namespace gptj_q8::Q8_ISA
