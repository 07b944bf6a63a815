// update_block of adam.h for AVX-512.
//
// A group of 64 elements is decoded and its moments are updated; then the parameters of the group
// before it take their step. Why this shape: decoding, square root and division are a chain of
// some 100 cycles for a group, and a CPU's schedulers hold little more than a group; with the two
// halves of neighbours side by side they find work (Zen 5: 15.9 cycles for 16 elements without).
#pragma once

#include <limits>
#include <type_traits>

#include "../common/adam.h"
#include "adam_moment.h"
#include "primitives_avx512.h"

namespace gptj_q8::Q8_ISA {

template <class P, class G>
class BlockUpdate {
 public:
  BlockUpdate(const AdamFactors& f, P* param, const G* grad, const Decoder& m_decoder,
              const Decoder& v_decoder, Moment& m, Moment& v)
      : f_(f),
        n_(m.n),
        param_(param),
        grad_(grad),
        m_table_(m_decoder.table),
        v_table_(v_decoder.table),
        m_(m),
        v_(v) {}

  Q8_INLINE void run() {
    const int64_t full = n_ & ~int64_t{63};
    if (full > 0) moments<true>(0);
    for (int64_t i = 64; i < full; i += 64) {
      moments<true>(i);
      parameters<true>(i - 64);
    }
    if (full > 0) parameters<true>(full - 64);
    if (full < n_) {
      moments<false>(full);
      parameters<false>(full);
    }
    m_.largest = _mm512_reduce_max_ps(m_largest_);
    v_.largest = _mm512_reduce_max_ps(v_largest_);
  }

 private:
  template <bool Full>
  Q8_INLINE __mmask16 inside(int64_t at) const {
    return Full ? __mmask16{0xffff} : first16(n_ - at);
  }

  // Elements i to i + 63, all of them there if Full.
  template <bool Full>
  Q8_INLINE void moments(int64_t i) {
    constexpr int kAbsolute = 11;  // of vrangeps: the larger magnitude, as a positive number
    const __mmask64 all = Full ? ~__mmask64{0} : first64(n_ - i);
    __m512 m_levels[4], v_levels[4];
    m_table_.template decode<true>(order32(_mm512_maskz_loadu_epi8(all, m_.codes + i)), m_levels);
    v_table_.template decode<true>(order32(_mm512_maskz_loadu_epi8(all, v_.codes + i)), v_levels);
    const __m512 m_scale = _mm512_set1_ps(m_.scale), v_scale = _mm512_set1_ps(v_.scale);
    for (int q = 0; q < 4; ++q) {
      const int64_t at = i + 16 * q;
      const __mmask16 mask = inside<Full>(at);
      const __m512 g = load16(grad_ + at, mask);
      const __m512 square = _mm512_mul_ps(g, g);
      const __mmask16 finite = is_finite(square);
      const __m512 old_m = _mm512_maskz_mul_ps(mask, m_levels[q], m_scale);
      const __m512 old_v = _mm512_maskz_mul_ps(mask, v_levels[q], v_scale);
      const __m512 new_m =
          _mm512_mask_add_ps(old_m, finite, _mm512_mul_ps(_mm512_set1_ps(f_.beta1), old_m),
                             _mm512_mul_ps(_mm512_set1_ps(f_.one_minus_beta1), g));
      const __m512 new_v =
          _mm512_mask_add_ps(old_v, finite, _mm512_mul_ps(_mm512_set1_ps(f_.beta2), old_v),
                             _mm512_mul_ps(_mm512_set1_ps(f_.one_minus_beta2), square));
      _mm512_store_ps(m_.values + at, new_m);
      _mm512_store_ps(v_.values + at, new_v);
      m_largest_ = _mm512_range_ps(m_largest_, new_m, kAbsolute);
      v_largest_ = _mm512_range_ps(v_largest_, new_v, kAbsolute);
    }
  }

  template <bool Full>
  Q8_INLINE void parameters(int64_t i) const {
    for (int q = 0; q < 4; ++q) {
      const int64_t at = i + 16 * q;
      const __mmask16 mask = inside<Full>(at);
      const __m512 g = load16(grad_ + at, mask), old = load16(param_ + at, mask);
      const __m512 root = _mm512_sqrt_ps(_mm512_load_ps(v_.values + at));
      const __m512 below = _mm512_add_ps(root, _mm512_set1_ps(f_.eps));
      const __m512 step = _mm512_mul_ps(_mm512_set1_ps(f_.rate),
                                        _mm512_div_ps(_mm512_load_ps(m_.values + at), below));
      const __m512 decayed = _mm512_mul_ps(old, _mm512_set1_ps(f_.decay));
      const __mmask16 finite = is_finite(_mm512_mul_ps(g, g));
      store16(param_ + at, mask, _mm512_mask_sub_ps(old, finite, decayed, step));
    }
  }

  static Q8_INLINE __mmask16 is_finite(__m512 square) {
    const __m512 most = _mm512_set1_ps(std::numeric_limits<float>::max());
    return _mm512_cmp_ps_mask(square, most, _CMP_LE_OQ);  // false for NaN
  }

  const AdamFactors f_;
  const int64_t n_;
  P* const param_;
  const G* const grad_;
  const FloatTable& m_table_;
  const FloatTable& v_table_;
  Moment& m_;
  Moment& v_;
  __m512 m_largest_ = _mm512_setzero_ps(), v_largest_ = _mm512_setzero_ps();
};

template <class P, class G>
void update_block(const AdamFactors& f, P* param, const G* grad, const Decoder& m_decoder,
                  const Decoder& v_decoder, Moment& m, Moment& v) {
  BlockUpdate<P, G>(f, param, grad, m_decoder, v_decoder, m, v).run();
}

}  // namespace gptj_q8::Q8_ISA
