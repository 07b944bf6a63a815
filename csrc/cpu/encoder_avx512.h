// The encoder of primitives_avx512.h: the code of r is the number of midpoints below it.
//
// A search tree of eight levels over the 255 sorted midpoints: level l holds 2^l of them, and a
// value's path so far is its index there. Levels 0 to 4 fit one register each (vpermps), levels
// 5, 6 and 7 take two, four and eight (vpermi2ps, then blends on the upper index bits).
#pragma once

#include "primitives_avx512.h"

namespace gptj_q8::Q8_ISA {

struct Encoder {
  __m512 small[5];  // levels 0 to 4, unused entries 0
  __m512 level5[2], level6[4], level7[8];

  explicit Encoder(const float* codebook) {
    alignas(64) float tree[8][128] = {};
    for (int level = 0; level < 8; ++level) {
      const int stride = 128 >> level;
      for (int i = 0; i < 1 << level; ++i) {
        const int below = 2 * stride * i + stride - 1;
        tree[level][i] = midpoint(codebook[below], codebook[below + 1]);
      }
    }
    for (int l = 0; l < 5; ++l) small[l] = _mm512_load_ps(tree[l]);
    for (int i = 0; i < 2; ++i) level5[i] = _mm512_load_ps(tree[5] + 16 * i);
    for (int i = 0; i < 4; ++i) level6[i] = _mm512_load_ps(tree[6] + 16 * i);
    for (int i = 0; i < 8; ++i) level7[i] = _mm512_load_ps(tree[7] + 16 * i);
  }

  Q8_INLINE __m512i encode16(__m512 r) const {
    __m512i index = _mm512_setzero_si512();
    for (int l = 0; l < 5; ++l) index = descend(index, r, _mm512_permutexvar_ps(index, small[l]));
    index = descend(index, r, _mm512_permutex2var_ps(level5[0], index, level5[1]));
    const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    index = descend(index, r, pick(bit5, index, level6));
    const __mmask16 low5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    const __m512 below = pick(low5, index, level7);
    const __m512 above = pick(low5, index, level7 + 4);
    return descend(index, r, _mm512_mask_blend_ps(bit6, below, above));
  }

  template <class T>
  void run(const T* weight, int64_t n, float absmax, uint8_t* codes) const {
    const Encoder local = *this;  // registers, not memory that `codes` might alias
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = first16(n - i);
      const __m512i code = local.encode16(normalized16(weight + i, mask, absmax));
      _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtepi32_epi8(code));
    }
  }

 private:
  static Q8_INLINE __m512i descend(__m512i index, __m512 r, __m512 middle) {
    const __mmask16 right = _mm512_cmp_ps_mask(middle, r, _CMP_LT_OQ);
    const __m512i twice = _mm512_add_epi32(index, index);
    return _mm512_mask_add_epi32(twice, right, twice, _mm512_set1_epi32(1));
  }

  // Entry `index` mod 64 of four registers; bit5 says where it is in the upper half.
  static Q8_INLINE __m512 pick(__mmask16 bit5, __m512i index, const __m512* t) {
    return _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(t[0], index, t[1]),
                                _mm512_permutex2var_ps(t[2], index, t[3]));
  }
};

}  // namespace gptj_q8::Q8_ISA
