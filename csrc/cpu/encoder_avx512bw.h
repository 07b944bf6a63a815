// The encoder of primitives_avx512.h for AVX-512 without VBMI.
#pragma once

#include "encoder_tree_avx512.h"

namespace gptj_q8::Q8_ISA {

using Encoder = TreeEncoder;

}  // namespace gptj_q8::Q8_ISA
