// One moment of one block, which adam.h hands to its parts.
#pragma once

#include <cstdint>

namespace gptj_q8 {

// codes and scale: before the step. values (room for a block) and the largest of their magnitudes:
// after it.
struct Moment {
  uint8_t* codes;
  int64_t n;
  float scale;
  float* values;
  float largest;
};

}  // namespace gptj_q8
