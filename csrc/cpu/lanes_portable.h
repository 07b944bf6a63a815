// Vectors of four floats that any compiler turns into what its CPU has, or into plain code.
#pragma once

#include "kernels.h"

namespace gptj_q8::Q8_ISA {

typedef float Lanes __attribute__((vector_size(16)));
constexpr int kLanes = 4;
// Registers of columns in a tile of 6 rows: 12 sums of the 16 registers that x86-64 has.
constexpr int kTileColumns = 2;

Q8_INLINE Lanes fill(float value) {
  return Lanes{value, value, value, value};
}
Q8_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
  return a * b + c;
}
Q8_INLINE Lanes lookup(const float* levels, const uint8_t* codes) {
  return Lanes{levels[codes[0]], levels[codes[1]], levels[codes[2]], levels[codes[3]]};
}
Q8_INLINE float sum(Lanes a) {
  return (a[0] + a[1]) + (a[2] + a[3]);
}

template <class T>
Q8_INLINE Lanes load(const T* p) {
  return Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
Q8_INLINE Lanes load(const float* p) {
  Lanes values;
  std::memcpy(&values, p, sizeof(values));
  return values;
}

template <class T>
Q8_INLINE void store(T* p, Lanes values) {
  for (int i = 0; i < kLanes; ++i) from_float(values[i], &p[i]);
}
Q8_INLINE void store(float* p, Lanes values) {
  std::memcpy(p, &values, sizeof(values));
}

}  // namespace gptj_q8::Q8_ISA
