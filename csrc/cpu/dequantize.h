// dequantize: out[i] = codebook[codes[i]] * absmax[i / block], in float32, then one rounding
// embedding:  out[j, :] = row ids[j] of the same
//
// codes [rows, cols], absmax [ceil(rows * cols / block)], ids [count], out as codes or
// [count, cols]; all dense. One piece of work owns a range of blocks, or a range of ids. The host
// has checked sizes and that ids are in range.
// Why this shape: both walk runs of codes that share a scale; a row may start inside a block.
//
// Included by one file per instruction set, which defines Q8_ISA and its building blocks first.
#pragma once

#include "span.h"

namespace gptj_q8::Q8_ISA {

void dequantize(const DequantizeArgs& a, const Pool& pool) {
  // Pieces are whole largest blocks, whatever the block size: 4096 codes, a microsecond of work.
  const int64_t pieces = ceil_div(a.weight.cols, kMaxBlock);
  with_type(a.dtype, [&](auto* t) {
    auto* out = typed(a.out, t);
    auto decode_pieces = [&](int64_t begin, int64_t end) {
      const Decoder decoder(a.weight.codebook);
      const int64_t first = begin * kMaxBlock;
      decode_span(decoder, a.weight, first, min_of(a.weight.cols, end * kMaxBlock), out + first);
    };
    parallel(pool, pieces, 16, decode_pieces);
  });
}

void embedding(const EmbeddingArgs& a, const Pool& pool) {
  const int64_t cols = a.weight.cols;
  with_type(a.dtype, [&](auto* t) {
    auto* out = typed(a.out, t);
    auto decode_rows = [&](int64_t begin, int64_t end) {
      const Decoder decoder(a.weight.codebook);
      for (int64_t j = begin; j < end; ++j) {
        decode_span(decoder, a.weight, a.ids[j] * cols, (a.ids[j] + 1) * cols, out + j * cols);
      }
    };
    parallel(pool, a.count, 1 + 65536 / cols, decode_rows);
  });
}

}  // namespace gptj_q8::Q8_ISA
