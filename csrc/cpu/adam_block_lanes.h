// update_block of adam.h in plain loops, which compilers vectorize for AVX2, NEON and others.
#pragma once

#include <type_traits>

#include "../common/adam.h"
#include "adam_moment.h"
#include "primitives_lanes.h"

namespace gptj_q8::Q8_ISA {

// A function of its own, with the factors by value: else compilers assume that stores change them
// and do not vectorize.
__attribute__((noinline)) inline void update_floats(const AdamFactors f, int64_t n,
                                                    const float* __restrict__ grad,
                                                    float* __restrict__ param,
                                                    float* __restrict__ m, float* __restrict__ v) {
  for (int64_t i = 0; i < n; ++i) {
    float p = param[i], new_m = m[i], new_v = v[i];
    adam_update(f, grad[i], p, new_m, new_v);
    param[i] = p;
    m[i] = new_m;
    v[i] = new_v;
  }
}

// Values as float32: themselves, or a copy in `room`.
template <class T>
Q8_INLINE auto* as_floats(T* values, int64_t n, float* room) {
  if constexpr (std::is_same_v<std::remove_const_t<T>, float>) {
    return values;
  } else {
    convert(values, n, room);
    return room;
  }
}

template <class P, class G>
void update_block(const AdamFactors& f, P* param, const G* grad, const Decoder& m_decoder,
                  const Decoder& v_decoder, Moment& m, Moment& v) {
  alignas(64) float param_room[kMaxBlock];
  alignas(64) float grad_room[kMaxBlock];
  const int64_t n = m.n;
  if (n <= 0) return;  // never so; the compiler then sees that the rooms are filled
  m_decoder.run(m.codes, n, m.scale, m.values);
  v_decoder.run(v.codes, n, v.scale, v.values);
  float* p = as_floats(param, n, param_room);
  update_floats(f, n, as_floats(grad, n, grad_room), p, m.values, v.values);
  if constexpr (!std::is_same_v<P, float>) convert(p, n, param);
  m.largest = max_abs(m.values, n);
  v.largest = max_abs(v.values, n);
}

}  // namespace gptj_q8::Q8_ISA
