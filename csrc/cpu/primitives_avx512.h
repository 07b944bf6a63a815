// Building blocks for AVX-512, with or without VBMI and BF16: registers_avx512.h or
// registers_avx512bw.h, included first, says how 64 codes are looked up in tables that live in
// registers.
// Encoding is a binary search over the 255 midpoints, eight steps, the midpoints that a step may
// need sitting in registers too (vpermi2ps): no gathers.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "scratch.h"

namespace gptj_q8::Q8_ISA {

Q8_INLINE uint32_t upper_half(float level) {
  return bits_of(level) >> 16;
}
Q8_INLINE uint32_t lower_half(float level) {
  return bits_of(level) & 0xffffu;
}
Q8_INLINE uint32_t as_bf16(float level) {
  bf16 rounded;
  from_float(level, &rounded);
  return rounded.bits;
}
// What bfloat16 loses of a level, itself as bfloat16.
Q8_INLINE uint32_t bf16_rest(float level) {
  return as_bf16(level - float_of(as_bf16(level) << 16));
}

// Whether bfloat16 holds every level exactly: then one table is enough for any dtype.
Q8_INLINE bool bf16_exact(const float* codebook) {
  uint32_t rest = 0;
  for (int i = 0; i < kLevels; ++i) rest |= lower_half(codebook[i]);
  return rest == 0;
}

// Even and odd 16-bit halves of each pair as float32, exact: `upper` the top halves of the
// float32 bits, `lower` the bottom halves (ignored unless Wide).
template <bool Wide>
Q8_INLINE void widen(__m512i upper, __m512i lower, __m512* even, __m512* odd) {
  __m512i e = _mm512_slli_epi32(upper, 16);
  __m512i o = _mm512_and_si512(upper, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  if constexpr (Wide) {
    e = _mm512_or_si512(e, _mm512_and_si512(lower, _mm512_set1_epi32(0xffff)));
    o = _mm512_or_si512(o, _mm512_srli_epi32(lower, 16));
  }
  *even = _mm512_castsi512_ps(e);
  *odd = _mm512_castsi512_ps(o);
}

// Float32 levels of a codebook, exact for any codebook.
struct FloatTable {
  Table upper, lower;

  Q8_INLINE explicit FloatTable(const float* codebook)
      : upper(codebook, upper_half), lower(codebook, lower_half) {}

  // Levels 0-15, 16-31, 32-47 and 48-63 of 64 codes that are in order32. Wide = false, if
  // bfloat16 holds every level, leaves out the lower halves.
  template <bool Wide>
  Q8_INLINE void decode(__m512i codes, __m512 (&levels)[4]) const {
    __m512i up[2], down[2] = {};
    decode64(upper, codes, &up[0], &up[1]);
    if constexpr (Wide) decode64(lower, codes, &down[0], &down[1]);
    widen<Wide>(up[0], down[0], &levels[0], &levels[1]);
    widen<Wide>(up[1], down[1], &levels[2], &levels[3]);
  }
};

// Asks for the cache line `bytes` after p, which may lie past the end of the array.
Q8_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes);
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
}

Q8_INLINE __mmask64 first64(int64_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

Q8_INLINE __mmask16 first16(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

Q8_INLINE __m512 widened(__m256i bf16_bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_bits), 16));
}

Q8_INLINE __m512 load16(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
Q8_INLINE __m512 load16(const bf16* p, __mmask16 mask) {
  return widened(_mm256_maskz_loadu_epi16(mask, p));
}
Q8_INLINE __m512 load16(const f16* p, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}

Q8_INLINE void store16(float* p, __mmask16 mask, __m512 v) {
  _mm512_mask_storeu_ps(p, mask, v);
}
Q8_INLINE void store16(bf16* p, __mmask16 mask, __m512 v) {
  // Not vcvtneps2bf16, which flushes subnormals.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i rounded =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(rounded));
}
Q8_INLINE void store16(f16* p, __mmask16 mask, __m512 v) {
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, mask, bits);
}

// out[i] = in[i], rounded where that is needed.
template <class From, class To>
void convert(const From* in, int64_t n, To* out) {
  for (int64_t i = 0; i < n; i += 16) {
    store16(out + i, first16(n - i), load16(in + i, first16(n - i)));
  }
}

// Decodes runs of codes that share one scale: out[i] = codebook[codes[i]] * scale, one rounding.
struct Decoder {
  FloatTable table;
  bool wide;

  explicit Decoder(const float* codebook) : table(codebook), wide(!bf16_exact(codebook)) {}

  template <class T>
  void run(const uint8_t* codes, int64_t n, float scale, T* out) const {
    wide ? run_with<true>(codes, n, scale, out) : run_with<false>(codes, n, scale, out);
  }

 private:
  template <bool Wide, class T>
  void run_with(const uint8_t* codes, int64_t n, float scale, T* out) const {
    const FloatTable local = table;  // registers, not memory that `out` might alias
    const __m512 scales = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += 64) {
      __m512 levels[4];
      const __m512i run = _mm512_maskz_loadu_epi8(first64(n - i), codes + i);
      local.decode<Wide>(order32(run), levels);
      for (int q = 0; q < 4; ++q) {
        store16(out + i + 16 * q, first16(n - i - 16 * q), _mm512_mul_ps(levels[q], scales));
      }
    }
  }
};

// The largest magnitude; a NaN does not count.
template <class T>
float max_abs(const T* weight, int64_t n) {
  __m512 largest[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 32) {
    for (int j = 0; j < 2; ++j) {
      const __m512 w = load16(weight + i + 16 * j, first16(n - i - 16 * j));
      largest[j] = _mm512_max_ps(_mm512_abs_ps(w), largest[j]);
    }
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1]));
}

// The same, by all threads.
template <class T>
float max_abs(const Pool& pool, const T* values, int64_t n) {
  constexpr int64_t kPiece = 1 << 14;
  const int64_t pieces = ceil_div(n, kPiece);
  Scratch<float> largest(pieces);
  auto find = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      largest.data()[i] = max_abs(values + i * kPiece, min_of(n - i * kPiece, kPiece));
    }
  };
  parallel(pool, pieces, 1, find);
  return max_abs(largest.data(), pieces);
}

// w / absmax as a true division; 0 in a block of zeros.
template <class T>
Q8_INLINE __m512 normalized16(const T* weight, __mmask16 mask, float absmax) {
  if (absmax == 0.0f) return _mm512_setzero_ps();
  return _mm512_div_ps(load16(weight, mask), _mm512_set1_ps(absmax));
}

template <class T>
void histogram_bins(const T* weight, int64_t n, float absmax, int64_t bins, int32_t* out) {
  const __m512 half = _mm512_set1_ps(static_cast<float>(bins / 2));
  const __m512 last = _mm512_set1_ps(static_cast<float>(bins - 1));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first16(n - i);
    const __m512 r = normalized16(weight + i, mask, absmax);
    const __m512 position = _mm512_mul_ps(_mm512_add_ps(r, _mm512_set1_ps(1.0f)), half);
    // max(position, 0) returns 0 for a NaN, being its second operand.
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(position, _mm512_setzero_ps()), last);
    _mm512_mask_storeu_epi32(out + i, mask, _mm512_cvttps_epi32(clamped));
  }
}

}  // namespace gptj_q8::Q8_ISA
