// Vectors of four floats for NEON, which every arm64 CPU has.
#pragma once

#include <arm_neon.h>

#include "kernels.h"

namespace gptj_q8::Q8_ISA {

using Lanes = float32x4_t;
constexpr int kLanes = 4;
// Registers of columns in a tile of 6 rows: 24 sums of 32 registers.
constexpr int kTileColumns = 4;

Q8_INLINE Lanes fill(float value) {
  return vdupq_n_f32(value);
}
Q8_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return vfmaq_f32(c, a, b);
}
Q8_INLINE Lanes lookup(const float* levels, const uint8_t* codes) {
  Lanes values = vdupq_n_f32(0.0f);
  values = vld1q_lane_f32(levels + codes[0], values, 0);
  values = vld1q_lane_f32(levels + codes[1], values, 1);
  values = vld1q_lane_f32(levels + codes[2], values, 2);
  return vld1q_lane_f32(levels + codes[3], values, 3);
}
Q8_INLINE float sum(Lanes a) {
  return vaddvq_f32(a);
}

Q8_INLINE Lanes load(const float* p) {
  return vld1q_f32(p);
}
Q8_INLINE Lanes load(const bf16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
Q8_INLINE Lanes load(const f16* p) {
  const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

Q8_INLINE void store(float* p, Lanes values) {
  vst1q_f32(p, values);
}
Q8_INLINE void store(bf16* p, Lanes values) {
  const uint32x4_t bits = vreinterpretq_u32_f32(values);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t number = vceqq_f32(values, values);
  const uint32x4_t chosen = vbslq_u32(number, vshrq_n_u32(sum, 16), vdupq_n_u32(0x7fc0));
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(chosen));
}
Q8_INLINE void store(f16* p, Lanes values) {
  const uint16x4_t bits = vreinterpret_u16_f16(vcvt_f16_f32(values));
  vst1_u16(reinterpret_cast<uint16_t*>(p), bits);
}

}  // namespace gptj_q8::Q8_ISA
