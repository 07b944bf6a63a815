// The encoder of primitives_avx512.h for AVX-512 with VBMI: the code of r is the number of
// midpoints below it, found for 64 values at a time in tables that live in registers.
//
// As a 16-bit float, cut off and not rounded, r falls into one of 64 segments: its sign and
// exponent. A segment is divided evenly, by the upper bits of the mantissa, into as many cells as
// it takes for no cell to hold two midpoints. A table says how many midpoints lie before each
// cell, and one comparison with the next midpoint, in float32, makes the code exact.
// r is scaled by 2^15, so that values down to 2^-29 have an exponent each.
// The codebooks that there are need 260 to 460 cells. One that needs more than kCells, or that has
// two midpoints in one 16-bit float, is left to the tree.
// Why this shape: 16 operations for 16 values where the tree takes 40, no gathers and no branches.
#pragma once

#include <cstring>
#include <limits>

#include "encoder_tree_avx512.h"

namespace gptj_q8::Q8_ISA {

class Encoder {
 public:
  explicit Encoder(const float* codebook) : tree_(codebook) {
    alignas(64) float middle[kLevels];  // scaled as r will be
    float nearest = 1.0f;               // to 0
    for (int i = 0; i + 1 < kLevels; ++i) {
      const float m = midpoint(codebook[i], codebook[i + 1]);
      const float magnitude = m < 0.0f ? -m : m;
      zero_ = static_cast<uint8_t>(m < 0.0f ? i + 1 : zero_);
      nearest = magnitude < nearest ? magnitude : nearest;
      middle[i] = m * kScale;
    }
    middle[kLevels - 1] = std::numeric_limits<float>::infinity();  // ends every search
    for (int i = 0; i < kLevels; ++i) {
      const uint32_t bits = bits_of(middle[i]);
      for (int b = 0; b < 4; ++b) middle_[b][i] = static_cast<uint8_t>(bits >> 8 * b);
    }
    fits_ = nearest >= kLeast && divide(middle);
  }

  // codes[i] = code of weight[i] / absmax, or of 0 in a block of zeros.
  template <class T>
  void run(const T* weight, int64_t n, float absmax, uint8_t* codes) const {
    if (absmax == 0.0f) {
      std::memset(codes, zero_, static_cast<size_t>(n));
      return;
    }
    if (!fits_ || absmax < kLeast) return tree_.run(weight, n, absmax, codes);
    const __m512 scale = _mm512_set1_ps(absmax / kScale);
    int64_t i = 0;
    for (; i + 64 * kTogether <= n; i += 64 * kTogether) {
      run_groups<kTogether>(weight + i, 64 * kTogether, scale, codes + i);
    }
    for (; i < n; i += 64) run_groups<1>(weight + i, n - i, scale, codes + i);
  }

 private:
  static constexpr int kSegments = 64, kCells = 512;
  static constexpr int kMantissa = 10;  // bits of a 16-bit float below its exponent
  static constexpr int kTogether = 4;
  static constexpr float kScale = 0x1p15f;
  // From here up, scaling rounds nothing: scaled quotients compare with scaled midpoints as the
  // quotients do with the midpoints.
  static constexpr float kLeast = 0x1p-100f;

  template <int G, class T>
  Q8_INLINE void run_groups(const T* weight, int64_t n, __m512 scale, uint8_t* codes) const {
    __m512 r[4 * G];
    __m512i found[G];
    for (int q = 0; q < 4 * G; ++q) {
      r[q] = _mm512_div_ps(load16(weight + 16 * q, first16(n - 16 * q)), scale);
    }
    encode<G>(r, found);
    for (int g = 0; g < G; ++g) {
      _mm512_mask_storeu_epi8(codes + 64 * g, first64(n - 64 * g), found[g]);
    }
  }

  static Q8_INLINE __m256i cut_off(__m512 r) {
    return _mm512_cvtps_ph(r, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }

  // Divides the segments into cells and fills their tables. False where cells do not suffice.
  bool divide(const float (&middle)[kLevels]) {
    alignas(64) uint16_t key[kLevels];
    for (int i = 0; i < kLevels; i += 16) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(key + i), cut_off(_mm512_load_ps(middle + i)));
    }
    int drop[kSegments];  // bits of the mantissa that name no cell
    for (int& each : drop) each = kMantissa;
    for (int i = 1; i + 1 < kLevels; ++i) {
      const unsigned differing = static_cast<unsigned>(key[i] ^ key[i - 1]);
      const int segment = key[i] >> kMantissa;
      if (differing == 0) return false;
      const int highest = 31 - __builtin_clz(differing);
      if (highest < drop[segment]) drop[segment] = highest;
    }
    int cells = 0, passed = 0;  // midpoints before the segment in hand
    bool empty_before = false;
    for (int order = 0; order < kSegments; ++order) {  // in the order of their values
      const bool negative = order < kSegments / 2;
      const int segment = negative ? kSegments - 1 - order : order - kSegments / 2;
      int last = passed;
      while (last + 1 < kLevels && key[last] >> kMantissa == segment) ++last;
      const bool empty = last == passed;
      // Neighbours without a midpoint share a cell.
      const int first = empty && empty_before ? cells - 1 : cells;
      const int count = 1 << (kMantissa - drop[segment]);
      if (first + count > kCells) return false;
      for (int i = 0; i < count; ++i) {
        const int cell = negative ? count - 1 - i : i;
        before_[first + cell] = static_cast<uint8_t>(passed);
        const int place = (key[passed] & ((1 << kMantissa) - 1)) >> drop[segment];
        if (passed < last && place == cell) ++passed;
      }
      drop_[segment] = static_cast<uint16_t>(drop[segment]);
      first_[segment] = static_cast<uint16_t>(first - ((segment << kMantissa) >> drop[segment]));
      cells = first + count;
      empty_before = empty;
    }
    return true;
  }

  static Q8_INLINE __m512i load(const void* p) { return _mm512_load_si512(p); }

  // Entry `index` of 256 bytes; `top` holds the top bits of the indices.
  static Q8_INLINE __m512i entry(const uint8_t* bytes, __m512i index, __mmask64 top) {
    const __m512i parts[4] = {load(bytes), load(bytes + 64), load(bytes + 128), load(bytes + 192)};
    return lookup(parts, index, top);
  }

  // Codes of 64 values in each of G groups. Step by step over all groups: one alone is a chain of
  // some 100 cycles, and a CPU's schedulers hold too little of the code after it.
  template <int G>
  Q8_INLINE void encode(const __m512 (&r)[4 * G], __m512i (&codes)[G]) const {
    __m512i cell[2 * G], before[G];
    __mmask64 above[G];
    for (int h = 0; h < 2 * G; ++h) cell[h] = cell_of(r[2 * h], r[2 * h + 1]);
    for (int g = 0; g < G; ++g) before[g] = passed_before(cell[2 * g], cell[2 * g + 1]);
    for (int g = 0; g < G; ++g) above[g] = above_middle(before[g], &r[4 * g]);
    for (int g = 0; g < G; ++g) {
      codes[g] = _mm512_mask_sub_epi8(before[g], above[g], before[g], _mm512_set1_epi8(-1));
    }
  }

  // The cells of 32 values, 16 bits each.
  Q8_INLINE __m512i cell_of(__m512 first16, __m512 last16) const {
    const __m512i key =
        _mm512_inserti64x4(_mm512_castsi256_si512(cut_off(first16)), cut_off(last16), 1);
    const __m512i segment = _mm512_srli_epi16(key, kMantissa);
    const __m512i drop = _mm512_permutex2var_epi16(load(drop_), segment, load(drop_ + 32));
    const __m512i first = _mm512_permutex2var_epi16(load(first_), segment, load(first_ + 32));
    return _mm512_add_epi16(_mm512_srlv_epi16(key, drop), first);
  }

  // How many midpoints lie before the cells of 64 values.
  Q8_INLINE __m512i passed_before(__m512i first32, __m512i last32) const {
    const __m512i low = _mm512_permutex2var_epi8(first32, load(kEvenBytes), last32);
    const __mmask64 bit7 = _mm512_movepi8_mask(low);
    const __m512i bit = _mm512_set1_epi16(256);
    const __mmask64 bit8 =
        _mm512_kunpackd(_mm512_test_epi16_mask(last32, bit), _mm512_test_epi16_mask(first32, bit));
    return _mm512_mask_blend_epi8(bit8, entry(before_, low, bit7), entry(before_ + 256, low, bit7));
  }

  // Which of 64 values are above midpoint index[i].
  Q8_INLINE __mmask64 above_middle(__m512i index, const __m512* r) const {
    // Byte by byte; interleaving the bytes undoes this transposition of 4 x 4 words.
    const __m512i words = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    index = _mm512_permutexvar_epi32(words, index);
    const __mmask64 top = _mm512_movepi8_mask(index);
    __m512i byte[4];
    for (int b = 0; b < 4; ++b) byte[b] = entry(middle_[b], index, top);
    const __m512i lower[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]),
                              _mm512_unpackhi_epi8(byte[0], byte[1])};
    const __m512i upper[2] = {_mm512_unpacklo_epi8(byte[2], byte[3]),
                              _mm512_unpackhi_epi8(byte[2], byte[3])};
    __mmask32 above[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 even = _mm512_castsi512_ps(_mm512_unpacklo_epi16(lower[h], upper[h]));
      const __m512 odd = _mm512_castsi512_ps(_mm512_unpackhi_epi16(lower[h], upper[h]));
      above[h] = _mm512_kunpackw(_mm512_cmp_ps_mask(odd, r[2 * h + 1], _CMP_LT_OQ),
                                 _mm512_cmp_ps_mask(even, r[2 * h], _CMP_LT_OQ));
    }
    return _mm512_kunpackd(above[1], above[0]);
  }

  alignas(64) static constexpr uint8_t kEvenBytes[64] = {
      0,  2,  4,   6,   8,   10,  12,  14,  16,  18,  20,  22,  24,  26,  28,  30,  //
      32, 34, 36,  38,  40,  42,  44,  46,  48,  50,  52,  54,  56,  58,  60,  62,  //
      64, 66, 68,  70,  72,  74,  76,  78,  80,  82,  84,  86,  88,  90,  92,  94,  //
      96, 98, 100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};

  alignas(64) uint16_t drop_[kSegments] = {};   // bits of a key that name no cell
  alignas(64) uint16_t first_[kSegments] = {};  // its first cell, less the key's bits above it
  alignas(64) uint8_t before_[kCells] = {};     // midpoints before a cell
  alignas(64) uint8_t middle_[4][kLevels];      // bytes of the scaled midpoints
  TreeEncoder tree_;
  uint8_t zero_ = 0;  // the code of 0
  bool fits_;         // whether the cells suffice
};

}  // namespace gptj_q8::Q8_ISA
