// Vectors of eight floats for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace gptj_q8::Q8_ISA {

using Lanes = __m256;
constexpr int kLanes = 8;
// Registers of columns in a tile of 6 rows: 12 sums of 16 registers.
constexpr int kTileColumns = 2;

Q8_INLINE Lanes fill(float value) {
  return _mm256_set1_ps(value);
}
Q8_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return _mm256_fmadd_ps(a, b, c);
}
// Eight loads, not vgatherdps: on Zen 5 gathers take 23 ns for 64 codes, loads 11; and on Intel's
// CPUs before Golden Cove their microcode fix makes gathers slower still.
Q8_INLINE __m128 lookup_four(const float* levels, const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, 4);
  // Hides that these are four bytes: GCC would load each one by itself, early, and spill them.
  __asm__("" : "+r"(four));
  const __m128 low = _mm_insert_ps(_mm_load_ss(levels + (four & 255)),
                                   _mm_load_ss(levels + ((four >> 8) & 255)), 0x10);
  const __m128 high = _mm_insert_ps(_mm_load_ss(levels + ((four >> 16) & 255)),
                                    _mm_load_ss(levels + (four >> 24)), 0x10);
  return _mm_movelh_ps(low, high);
}
Q8_INLINE Lanes lookup(const float* levels, const uint8_t* codes) {
  return _mm256_set_m128(lookup_four(levels, codes + 4), lookup_four(levels, codes));
}
Q8_INLINE float sum(Lanes a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

Q8_INLINE Lanes load(const float* p) {
  return _mm256_loadu_ps(p);
}
Q8_INLINE Lanes load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
Q8_INLINE Lanes load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

Q8_INLINE void store(float* p, Lanes values) {
  _mm256_storeu_ps(p, values);
}
Q8_INLINE void store(bf16* p, Lanes values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i added = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, added), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
Q8_INLINE void store(f16* p, Lanes values) {
  const __m128i bits = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

}  // namespace gptj_q8::Q8_ISA
