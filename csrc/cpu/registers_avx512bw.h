// Tables of 256 levels in registers, for AVX-512 without VBMI and BF16 (Skylake to Cascade Lake).
//
// A table of 256 16-bit levels is eight registers: vpermi2w reads two of them with the low six
// bits of 32 words, whatever stands above, and bits 6 and 7 choose among the four results. So the
// even bytes of 64 codes are indices as they stand, and the odd ones after one shift.
#pragma once

#include "intrinsics_avx512.h"
#include "kernels.h"

namespace gptj_q8::Q8_ISA {

struct Table {
  __m512i words[8];

  // entry(codebook[i]) gives the 16 bits of level i.
  template <class F>
  Q8_INLINE Table(const float* codebook, F entry) {
    alignas(64) uint16_t bits[kLevels];
    for (int i = 0; i < kLevels; ++i) bits[i] = static_cast<uint16_t>(entry(codebook[i]));
    for (int i = 0; i < 8; ++i) words[i] = _mm512_load_si512(bits + 32 * i);
  }
};

Q8_INLINE __m512i lookup(const __m512i (&words)[8], __m512i codes) {
  const __mmask32 bit6 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
  const __mmask32 bit7 = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
  const __m512i below =
      _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(words[0], codes, words[1]),
                              _mm512_permutex2var_epi16(words[2], codes, words[3]));
  const __m512i above =
      _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(words[4], codes, words[5]),
                              _mm512_permutex2var_epi16(words[6], codes, words[7]));
  return _mm512_mask_blend_epi16(bit7, below, above);
}

// The 16-bit levels of 64 codes: of the even bytes in `first`, of the odd ones in `second`.
Q8_INLINE void decode64(const Table& table, __m512i codes, __m512i* first, __m512i* second) {
  *first = lookup(table.words, codes);
  *second = lookup(table.words, _mm512_srli_epi16(codes, 8));
}

// The columns of 64 whose levels the even and odd entries of decode64's `first` and `second` are,
// in this order, as sets of bits.
constexpr uint64_t kColumnsOfFloats[4] = {0x1111111111111111, 0x4444444444444444,
                                          0x2222222222222222, 0x8888888888888888};

// Byte order after which the even 16-bit entries of decode64's `first` are levels 0-15, its odd
// ones levels 16-31, and likewise for `second`: bytes i, 32 + i, 16 + i, 48 + i side by side.
Q8_INLINE __m512i order32(__m512i codes) {
  const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m128i bytes = _mm_set_epi8(15, 7, 11, 3, 14, 6, 10, 2, 13, 5, 9, 1, 12, 4, 8, 0);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, codes), _mm512_broadcast_i32x4(bytes));
}

// From the order that transpose_pairs leaves, a lane being row 0 columns 0 and 1, row 1 columns 0
// and 1, ..., row 0 columns 2 and 3, ..., to one in which an even word of `first` and the odd one
// after it are one row's columns 0 and 1, of `second` its columns 2 and 3.
Q8_INLINE __m512i order_pairs(__m512i codes) {
  const __m128i bytes = _mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
  return _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(bytes));
}

}  // namespace gptj_q8::Q8_ISA
