// Tables of 256 levels in registers, for AVX-512 with VBMI and BF16.
//
// A table of 256 bytes is four registers: vpermi2b reads two of them with the low seven bits of 64
// codes, and the top bit of a code chooses between the two results. A 16-bit level is two such
// tables.
#pragma once

#include "intrinsics_avx512.h"
#include "kernels.h"

namespace gptj_q8::Q8_ISA {

// 256 16-bit entries as two tables of bytes, each in four registers.
struct Table {
  __m512i low[4], high[4];

  // entry(codebook[i]) gives the 16 bits of level i.
  template <class F>
  Q8_INLINE Table(const float* codebook, F entry) {
    alignas(64) uint8_t bytes[2][kLevels];
    for (int i = 0; i < kLevels; ++i) {
      const uint32_t bits = entry(codebook[i]);
      bytes[0][i] = static_cast<uint8_t>(bits);
      bytes[1][i] = static_cast<uint8_t>(bits >> 8);
    }
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
  }
};

Q8_INLINE __m512i lookup(const __m512i (&bytes)[4], __m512i codes, __mmask64 top) {
  const __m512i below = _mm512_permutex2var_epi8(bytes[0], codes, bytes[1]);
  const __m512i above = _mm512_permutex2var_epi8(bytes[2], codes, bytes[3]);
  return _mm512_mask_blend_epi8(top, below, above);
}

// The 16-bit levels of 64 codes. Bytes 0-7 of each 128-bit lane of codes go to that lane of
// `first`, bytes 8-15 to that lane of `second`.
Q8_INLINE void decode64(const Table& table, __m512i codes, __m512i* first, __m512i* second) {
  const __mmask64 top = _mm512_movepi8_mask(codes);
  const __m512i low = lookup(table.low, codes, top);
  const __m512i high = lookup(table.high, codes, top);
  *first = _mm512_unpacklo_epi8(low, high);
  *second = _mm512_unpackhi_epi8(low, high);
}

// The columns of 64 whose levels decode64 gives in `first` and `second`, in this order, as sets of
// bits; and those of the even and odd entries of each.
constexpr uint64_t kColumnsOf[2] = {0x00ff00ff00ff00ff, 0xff00ff00ff00ff00};
constexpr uint64_t kColumnsOfFloats[4] = {0x0055005500550055, 0x00aa00aa00aa00aa,
                                          0x5500550055005500, 0xaa00aa00aa00aa00};

// Byte order after which the even 16-bit entries of `first` are levels 0-15, its odd ones levels
// 16-31, and likewise for `second`: the order that widening to float32 by shifts wants.
alignas(64) constexpr uint8_t kOrder32[64] = {
    0,  16, 1,  17, 2,  18, 3,  19, 32, 48, 33, 49, 34, 50, 35, 51,  //
    4,  20, 5,  21, 6,  22, 7,  23, 36, 52, 37, 53, 38, 54, 39, 55,  //
    8,  24, 9,  25, 10, 26, 11, 27, 40, 56, 41, 57, 42, 58, 43, 59,  //
    12, 28, 13, 29, 14, 30, 15, 31, 44, 60, 45, 61, 46, 62, 47, 63};

Q8_INLINE __m512i reorder(const uint8_t (&order)[64], __m512i codes) {
  return _mm512_permutexvar_epi8(_mm512_load_si512(order), codes);
}

Q8_INLINE __m512i order32(__m512i codes) {
  return reorder(kOrder32, codes);
}
// The order of pairs of columns that transpose_pairs leaves is decode64's own.
Q8_INLINE __m512i order_pairs(__m512i codes) {
  return codes;
}

}  // namespace gptj_q8::Q8_ISA
