// Building blocks in plain C++ for any CPU. Every instruction set that offers the same names can
// instantiate quantize.h, dequantize.h and adam.h.
#pragma once

#include <cmath>

#include "kernels.h"

namespace gptj_q8::portable {

// Decodes runs of codes that share one scale: out[i] = codebook[codes[i]] * scale, one rounding.
struct Decoder {
  const float* levels;
  explicit Decoder(const float* codebook) : levels(codebook) {}

  template <class T>
  void run(const uint8_t* codes, int64_t n, float scale, T* out) const {
    for (int64_t i = 0; i < n; ++i) from_float(levels[codes[i]] * scale, &out[i]);
  }
};

// Encodes runs that share one scale. The code of r is the number of midpoints below it.
struct Encoder {
  float midpoints[kLevels];  // the last one is never read

  explicit Encoder(const float* codebook) {
    for (int i = 0; i + 1 < kLevels; ++i) midpoints[i] = midpoint(codebook[i], codebook[i + 1]);
    midpoints[kLevels - 1] = 0.0f;
  }

  template <class T>
  void run(const T* weight, int64_t n, float absmax, uint8_t* codes) const {
    constexpr int kTogether = 8;  // searches whose loads overlap
    for (int64_t i = 0; i < n; i += kTogether) {
      const int count = static_cast<int>(min_of(kTogether, n - i));
      float r[kTogether] = {};
      int code[kTogether] = {};
      for (int j = 0; j < count; ++j) r[j] = normalize(to_float(weight[i + j]), absmax);
      for (int step = kLevels / 2; step > 0; step /= 2) {
        for (int j = 0; j < kTogether; ++j) {
          code[j] += step * static_cast<int>(midpoints[code[j] + step - 1] < r[j]);
        }
      }
      for (int j = 0; j < count; ++j) codes[i + j] = static_cast<uint8_t>(code[j]);
    }
  }
};

// out[i] = in[i], rounded where that is needed.
template <class From, class To>
void convert(const From* in, int64_t n, To* out) {
  for (int64_t i = 0; i < n; ++i) from_float(to_float(in[i]), &out[i]);
}

template <class T>
float max_abs(const T* weight, int64_t n) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = float_of(bits_of(to_float(weight[i])) & 0x7fffffffu);
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest;
}

template <class T>
void histogram_bins(const T* weight, int64_t n, float absmax, int64_t bins, int32_t* out) {
  const float half = static_cast<float>(bins / 2);
  const float last = static_cast<float>(bins - 1);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = histogram_bin(normalize(to_float(weight[i]), absmax), half, last);
  }
}

}  // namespace gptj_q8::portable
