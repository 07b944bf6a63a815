// One step of Adam with decoupled weight decay, for one element, in float32:
//   m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//   param = param (1 - lr weight_decay)
//           - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
// with the new m and v before they are encoded again. The last fraction is computed as
// rate m / (sqrt(v) + eps'), whose numbers hold sqrt(1 - beta2^step) already: one division less.
// An element whose g^2 is not finite keeps param, m and v: an infinite v would spoil the scale of
// its block. Every operation is rounded by itself, so that all backends give the same.
#pragma once

#include <cmath>

#include "arguments.h"

namespace gptj_q8 {

struct AdamFactors {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, eps;

  Q8_HOST_INLINE explicit AdamFactors(const AdamArgs& a)
      : beta1(static_cast<float>(a.beta1)),
        one_minus_beta1(static_cast<float>(1.0 - a.beta1)),
        beta2(static_cast<float>(a.beta2)),
        one_minus_beta2(static_cast<float>(1.0 - a.beta2)),
        decay(static_cast<float>(1.0 - a.lr * a.weight_decay)) {
    const double step = static_cast<double>(a.step);
    const double root = std::sqrt(1.0 - std::pow(a.beta2, step));
    rate = static_cast<float>(a.lr * root / (1.0 - std::pow(a.beta1, step)));
    eps = static_cast<float>(a.eps * root);
  }
};

Q8_INLINE void adam_update(const AdamFactors& f, float g, float& param, float& m, float& v) {
  const float square = product(g, g);
  const bool finite = square <= 3.40282347e38f;  // the largest float32; false for NaN
  const float new_m = product(f.beta1, m) + product(f.one_minus_beta1, g);
  const float new_v = product(f.beta2, v) + product(f.one_minus_beta2, square);
  const float step = product(f.rate, new_m / (std::sqrt(new_v) + f.eps));
  m = finite ? new_m : m;
  v = finite ? new_v : v;
  param = finite ? product(param, f.decay) - step : param;
}

}  // namespace gptj_q8
