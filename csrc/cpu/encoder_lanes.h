// The encoder of primitives_lanes.h: the code of r is the number of midpoints below it.
//
// The top bits of a float32 (sign, exponent, six bits of the mantissa) name a cell of values that
// follow each other; a table holds the code of each cell's least value, and comparing with the
// next few midpoints, as many as the fullest cell holds, ends the search. The codebooks that there
// are put up to 3 midpoints in a cell; for one with more than kMostSteps the search is binary.
// Why this shape: at 1 to 3 dependent loads an element instead of 8, it needs no vector registers.
#pragma once

#include <limits>

#include "primitives_lanes.h"

namespace gptj_q8::Q8_ISA {

class Encoder {
 public:
  explicit Encoder(const float* codebook) {
    for (int i = 0; i + 1 < kLevels; ++i) midpoints_[i] = midpoint(codebook[i], codebook[i + 1]);
    // Ends every search: nothing is above it.
    midpoints_[kLevels - 1] = std::numeric_limits<float>::infinity();
    int code = 0;
    for (int32_t c = kCells - 1; c >= 0; --c) code = enter(kCells + c, code, least_negative(c));
    for (int32_t c = 0; c < kCells; ++c) code = enter(c, code, least_positive(c));
    steps_ = kLevels - 1 - code > steps_ ? kLevels - 1 - code : steps_;
  }

  template <class T>
  void run(const T* weight, int64_t n, float absmax, uint8_t* codes) const {
    if (steps_ > kMostSteps) return run_with<0>(weight, n, absmax, codes);
    with_count<kMostSteps>(steps_ < 1 ? 1 : steps_, [&](auto steps) {
      run_with<decltype(steps)::value>(weight, n, absmax, codes);
    });
  }

 private:
  static constexpr int kKept = 17;  // a cell's values differ in these low bits only
  static constexpr int32_t kFirst = (127 - 24) << (23 - kKept);    // up to 2^-24: one cell
  static constexpr int32_t kCells = 24 * (1 << (23 - kKept)) + 1;  // the last one begins at 1
  static constexpr int kMostSteps = 4;

  // The least values of cell c and of its mirror image below zero.
  static float least_positive(int32_t c) {
    return c == 0 ? 0.0f : float_of(static_cast<uint32_t>(c + kFirst) << kKept);
  }
  static float least_negative(int32_t c) {
    if (c == kCells - 1) return -std::numeric_limits<float>::infinity();
    return -float_of((static_cast<uint32_t>(c + 1 + kFirst) << kKept) - 1);
  }

  // Notes where the search starts in a cell that follows another one, which started at `code`.
  int enter(int32_t cell, int code, float least) {
    const int before = code;
    while (code < kLevels - 1 && midpoints_[code] < least) ++code;
    steps_ = code - before > steps_ ? code - before : steps_;
    start_[cell] = static_cast<uint8_t>(code);
    return code;
  }

  template <int Steps, class T>
  void run_with(const T* weight, int64_t n, float absmax, uint8_t* codes) const {
    constexpr int64_t kRun = 256;
    float r[kRun];
    int32_t cell[kRun];
    for (int64_t begin = 0; begin < n; begin += kRun) {
      const int64_t count = min_of(kRun, n - begin);
      normalize_run(weight + begin, count, absmax, r);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(r[i]);
        int32_t c = static_cast<int32_t>((bits & 0x7fffffffu) >> kKept) - kFirst;
        c = c < 0 ? 0 : c;
        c = c > kCells - 1 ? kCells - 1 : c;
        cell[i] = c + static_cast<int32_t>(bits >> 31) * kCells;
      }
      for (int64_t i = 0; i < count; ++i) {
        codes[begin + i] = static_cast<uint8_t>(search<Steps>(r[i], start_[cell[i]]));
      }
    }
  }

  template <int Steps>
  Q8_INLINE int search(float r, int code) const {
    if constexpr (Steps > 0) {
      for (int s = 0; s < Steps; ++s) code += static_cast<int>(midpoints_[code] < r);
    } else {
      code = 0;
      for (int step = kLevels / 2; step > 0; step /= 2) {
        code += step * static_cast<int>(midpoints_[code + step - 1] < r);
      }
    }
    return code;
  }

  float midpoints_[kLevels];
  uint8_t start_[2 * kCells];
  int steps_ = 0;
};

}  // namespace gptj_q8::Q8_ISA
