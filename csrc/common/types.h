// The three float types as the kernels see them: 16-bit ones as tagged bit patterns, with
// conversions in integer arithmetic, so that flush-to-zero modes do not change them. (On a GPU,
// kernels convert with one instruction each: `widen` and `narrow` of cuda/primitives.cuh.)
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "format.h"

namespace gptj_q8 {

enum class DType { float32, bfloat16, float16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

Q8_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

Q8_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

Q8_INLINE float to_float(float value) {
  return value;
}

Q8_INLINE float to_float(bf16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

Q8_INLINE float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: an integer times 2^-24, a normal float32.
  const uint32_t bits = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | bits);
}

// Rounding to nearest, ties to even, as PyTorch does; overflow gives an infinity.
Q8_INLINE void from_float(float value, float* out) {
  *out = value;
}

Q8_INLINE void from_float(float value, bf16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

Q8_INLINE void from_float(float value, f16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14 and more: normal
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else if (magnitude < 0x33000000u) {  // below 2^-25: zero
    half = 0;
  } else {
    const uint32_t shift = 126u - (magnitude >> 23);  // 14 to 24
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t kept = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1u);
    const uint32_t tie = 1u << (shift - 1u);
    half = kept + ((rest > tie || (rest == tie && (kept & 1u))) ? 1u : 0u);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
Q8_INLINE const T* typed(const void* data, const T*) {
  return static_cast<const T*>(data);
}
template <class T>
Q8_INLINE T* typed(void* data, T*) {
  return static_cast<T*>(data);
}

// Calls f with a null pointer of the type that `dtype` names: one switch for all kernels.
template <class F>
Q8_HOST_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<bf16*>(nullptr));
    case DType::float16:
      return f(static_cast<f16*>(nullptr));
  }
}

// Calls f with std::integral_constant<int, count>, 1 <= count <= Max.
template <int Max, class F>
Q8_HOST_INLINE void with_count(int64_t count, F&& f) {
  if constexpr (Max > 1) {
    if (count < Max) return with_count<Max - 1>(count, f);
  }
  f(std::integral_constant<int, Max>{});
}

}  // namespace gptj_q8
