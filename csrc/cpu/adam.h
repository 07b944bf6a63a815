// One step of Adam, as common/adam.h says, with both moments in the 8-bit format: decoded, updated
// and encoded again. A v above 0 never takes the level 0: beside an m that is not 0 it would make
// the next step divide by eps alone.
//
// param, grad, m_codes, v_codes [numel]; m_absmax, v_absmax [ceil(numel / block)]; all dense.
// One piece of work owns a range of blocks. The host has checked sizes.
// Why this shape: one block's m and v (at most 2 x 16 KB) stay in the L1 and L2 caches between
// decoding, update and encoding; the update is a plain loop that compilers vectorize.
//
// Included by one file per instruction set, which defines Q8_ISA and its building blocks first.
#pragma once

#include <type_traits>

#include "../common/adam.h"
#include "kernels.h"

namespace gptj_q8::Q8_ISA {

// A function of its own, with the factors by value: else compilers assume that stores change them
// and do not vectorize.
__attribute__((noinline)) inline void update_block(const AdamFactors f, int64_t n,
                                                   const float* __restrict__ grad,
                                                   float* __restrict__ param, float* __restrict__ m,
                                                   float* __restrict__ v) {
  for (int64_t i = 0; i < n; ++i) {
    float p = param[i], new_m = m[i], new_v = v[i];
    adam_update(f, grad[i], p, new_m, new_v);
    param[i] = p;
    m[i] = new_m;
    v[i] = new_v;
  }
}

// Takes the level 0 away from values above 0.
__attribute__((noinline)) inline void lift_zeros(const float* __restrict__ v, int64_t n,
                                                 uint8_t smallest_positive,
                                                 uint8_t* __restrict__ codes) {
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t least = v[i] > 0.0f ? smallest_positive : uint8_t{0};
    const uint8_t code = codes[i];
    codes[i] = code < least ? least : code;
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
void adam_typed(const AdamArgs& a, const Pool& pool, P* param, const G* grad) {
  const AdamFactors factors(a);
  int smallest_positive = 0;
  while (smallest_positive < kLevels - 1 && !(a.v_codebook[smallest_positive] > 0.0f)) {
    ++smallest_positive;
  }
  auto update_blocks = [&](int64_t begin, int64_t end) {
    alignas(64) float m[kMaxBlock];
    alignas(64) float v[kMaxBlock];
    alignas(64) float param_room[kMaxBlock];
    alignas(64) float grad_room[kMaxBlock];
    const Decoder m_decoder(a.m_codebook), v_decoder(a.v_codebook);
    const Encoder m_encoder(a.m_codebook), v_encoder(a.v_codebook);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b << a.block_shift;
      const int64_t n = min_of(a.numel - first, int64_t{1} << a.block_shift);
      uint8_t* m_codes = a.m_codes + first;
      uint8_t* v_codes = a.v_codes + first;
      m_decoder.run(m_codes, n, a.m_absmax[b], m);
      v_decoder.run(v_codes, n, a.v_absmax[b], v);
      float* p = as_floats(param + first, n, param_room);
      update_block(factors, n, as_floats(grad + first, n, grad_room), p, m, v);
      if constexpr (!std::is_same_v<P, float>) convert(p, n, param + first);
      a.m_absmax[b] = max_abs(m, n);
      a.v_absmax[b] = max_abs(v, n);
      m_encoder.run(m, n, a.m_absmax[b], m_codes);
      v_encoder.run(v, n, a.v_absmax[b], v_codes);
      lift_zeros(v, n, static_cast<uint8_t>(smallest_positive), v_codes);
    }
  };
  const int64_t blocks = ceil_div(a.numel, int64_t{1} << a.block_shift);
  const int64_t grain = 1 + (8192 >> a.block_shift);  // about 10 microseconds of work
  parallel(pool, blocks, grain, update_blocks);
}

void adam_step(const AdamArgs& a, const Pool& pool) {
  with_type(a.param_dtype, [&](auto* p) {
    with_type(a.grad_dtype,
              [&](auto* g) { adam_typed(a, pool, typed(a.param, p), typed(a.grad, g)); });
  });
}

}  // namespace gptj_q8::Q8_ISA
