// Decoding of a stretch of the flat weight that may cross blocks.
//
// Included after an instruction set has defined Q8_ISA and its Decoder.
#pragma once

#include "kernels.h"

namespace gptj_q8::Q8_ISA {

// out[i - begin] = codebook[codes[i]] * absmax[i / block], begin <= i < end.
template <class T>
void decode_span(const Decoder& decoder, const Weight& w, int64_t begin, int64_t end, T* out) {
  for (int64_t i = begin; i < end;) {
    const int64_t stop = min_of(end, block_end(i, w.block_shift));
    decoder.run(w.codes + i, stop - i, w.absmax[block_of(i, w.block_shift)], out + (i - begin));
    i = stop;
  }
}

}  // namespace gptj_q8::Q8_ISA
