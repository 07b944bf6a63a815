// One step of Adam, as common/adam.h says, with both moments in the 8-bit format: decoded, updated
// and encoded again. A v above 0 never takes the level 0: beside an m that is not 0 it would make
// the next step divide by eps alone.
//
// param, grad, m_codes, v_codes [numel]; m_absmax, v_absmax [ceil(numel / block)]; all dense.
// One piece of work owns a range of blocks. The host has checked sizes.
// Why this shape: one block's m and v (at most 2 x 16 KB) stay in the L1 and L2 caches between
// update and encoding. adam_block_<kind>.h decodes and updates.
//
// Included by one file per instruction set, which defines Q8_ISA and its building blocks first.
#pragma once

#include "../common/adam.h"
#include "adam_moment.h"
#include "kernels.h"

namespace gptj_q8::Q8_ISA {

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

template <class P, class G>
void adam_typed(const AdamArgs& a, const Pool& pool, P* param, const G* grad) {
  const AdamFactors factors(a);
  int smallest_positive = 0;
  while (smallest_positive < kLevels - 1 && !(a.v_codebook[smallest_positive] > 0.0f)) {
    ++smallest_positive;
  }
  const Decoder m_decoder(a.m_codebook), v_decoder(a.v_codebook);
  const Encoder m_encoder(a.m_codebook), v_encoder(a.v_codebook);
  auto update_blocks = [&](int64_t begin, int64_t end) {
    alignas(64) float room[2][2][kMaxBlock];
    Moment m[2], v[2];
    const auto update = [&](int64_t b) {
      const int64_t first = b << a.block_shift;
      const int64_t n = min_of(a.numel - first, int64_t{1} << a.block_shift);
      m[b & 1] = {a.m_codes + first, n, a.m_absmax[b], room[b & 1][0], 0.0f};
      v[b & 1] = {a.v_codes + first, n, a.v_absmax[b], room[b & 1][1], 0.0f};
      update_block(factors, param + first, grad + first, m_decoder, v_decoder, m[b & 1], v[b & 1]);
    };
    const auto encode = [&](int64_t b) {
      const Moment &new_m = m[b & 1], &new_v = v[b & 1];
      a.m_absmax[b] = new_m.largest;
      a.v_absmax[b] = new_v.largest;
      m_encoder.run(new_m.values, new_m.n, new_m.largest, new_m.codes);
      v_encoder.run(new_v.values, new_v.n, new_v.largest, new_v.codes);
      lift_zeros(new_v.values, new_v.n, static_cast<uint8_t>(smallest_positive), new_v.codes);
    };
    update(begin);
    for (int64_t b = begin + 1; b < end; ++b) {
      update(b);
      encode(b - 1);
    }
    encode(end - 1);
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
