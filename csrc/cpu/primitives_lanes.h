// Building blocks for instruction sets without a byte table in registers: AVX2, NEON, portable.
// lanes_<isa>.h, included first, defines their vector type and its few operations.
//
// Decoding loads each level from a table of 256 floats in the L1 cache, exact for any codebook.
#pragma once

#include <cmath>

#include "kernels.h"

namespace gptj_q8::Q8_ISA {

// Decodes runs of codes that share one scale: out[i] = codebook[codes[i]] * scale, one rounding.
struct Decoder {
  const float* levels;
  explicit Decoder(const float* codebook) : levels(codebook) {}

  template <class T>
  void run(const uint8_t* codes, int64_t n, float scale, T* out) const {
    const Lanes scales = fill(scale);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, lookup(levels, codes + i) * scales);
    for (; i < n; ++i) from_float(levels[codes[i]] * scale, &out[i]);
  }
};

// out[i] = in[i], rounded where that is needed.
template <class From, class To>
void convert(const From* in, int64_t n, To* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  for (; i < n; ++i) from_float(to_float(in[i]), &out[i]);
}

// As integers, magnitudes are ordered as the floats are, subnormals too where the CPU flushes them.
template <class T>
float max_abs(const T* weight, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(to_float(weight[i])) & 0x7fffffffu;
    largest = largest < magnitude ? magnitude : largest;
  }
  return float_of(largest);
}

// out[i] = weight[i] / absmax, a true division; zeros in a block of zeros.
template <class T>
Q8_INLINE void normalize_run(const T* weight, int64_t n, float absmax, float* out) {
  int64_t i = 0;
  if (absmax != 0.0f) {
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(weight + i) / fill(absmax));
  }
  for (; i < n; ++i) out[i] = normalize(to_float(weight[i]), absmax);
}

template <class T>
void histogram_bins(const T* weight, int64_t n, float absmax, int64_t bins, int32_t* out) {
  constexpr int64_t kRun = 256;
  const float half = static_cast<float>(bins / 2);
  const float last = static_cast<float>(bins - 1);
  float r[kRun];
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = min_of(kRun, n - begin);
    normalize_run(weight + begin, count, absmax, r);
    for (int64_t i = 0; i < count; ++i) out[begin + i] = histogram_bin(r[i], half, last);
  }
}

}  // namespace gptj_q8::Q8_ISA
