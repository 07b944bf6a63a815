// An encoder for any codebook: the code of r is the number of midpoints below it.
//
// A search tree of eight levels over the 255 sorted midpoints: level l holds 2^l of them, and a
// value's path so far is its index there. Levels 0 to 4 fit one register each (vpermps), levels
// 5, 6 and 7 take two, four and eight (vpermi2ps, then blends on the upper index bits).
#pragma once

#include "primitives_avx512.h"

namespace gptj_q8::Q8_ISA {

struct TreeEncoder {
  __m512 small[5];  // levels 0 to 4, unused entries 0
  __m512 level5[2], level6[4], level7[8];

  explicit TreeEncoder(const float* codebook) {
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

  // Several vectors side by side: one search is a chain of some 100 cycles, and a CPU's schedulers
  // hold too little of the code after it to begin the next ones by themselves. Zen 5, 16.8 M
  // float32 on one thread: 20 ms one at a time (measured apart, 2026-11-24).
  template <int V>
  Q8_INLINE void encode(const __m512 (&r)[V], __m512i (&index)[V]) const {
    for (__m512i& each : index) each = _mm512_setzero_si512();
    const auto descend_all = [&](auto middle) __attribute__((always_inline)) {
      for (int v = 0; v < V; ++v) index[v] = descend(index[v], r[v], middle(index[v]));
    };
    for (int l = 0; l < 5; ++l) {
      descend_all([&](__m512i i) __attribute__((always_inline)) {
        return _mm512_permutexvar_ps(i, small[l]);
      });
    }
    descend_all([&](__m512i i) __attribute__((always_inline)) {
      return _mm512_permutex2var_ps(level5[0], i, level5[1]);
    });
    descend_all([&](__m512i i) __attribute__((always_inline)) {
      return pick(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), i, level6);
    });
    descend_all([&](__m512i i) __attribute__((always_inline)) {
      const __mmask16 low5 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
      const __mmask16 bit6 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
      return _mm512_mask_blend_ps(bit6, pick(low5, i, level7), pick(low5, i, level7 + 4));
    });
  }

  template <class T>
  void run(const T* weight, int64_t n, float absmax, uint8_t* codes) const {
    const TreeEncoder local = *this;  // registers, not memory that `codes` might alias
    constexpr int kTogether = 4;
    for (int64_t i = 0; i < n; i += 16 * kTogether) {
      __m512 r[kTogether];
      __m512i code[kTogether];
      for (int v = 0; v < kTogether; ++v) {
        r[v] = normalized16(weight + i + 16 * v, first16(n - i - 16 * v), absmax);
      }
      local.encode(r, code);
      for (int v = 0; v < kTogether; ++v) {
        const __mmask16 mask = first16(n - i - 16 * v);
        _mm_mask_storeu_epi8(codes + i + 16 * v, mask, _mm512_cvtepi32_epi8(code[v]));
      }
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
