// linear_grad_input: dx[M, K] = dy[M, N] @ W[N, K],  W = codebook[codes] * absmax per block
//
// dy, dx [M, N], [M, K] in one of float32, bfloat16, float16; codes [N, K]; blocks run on across
// rows. The host has checked that all arrays have these sizes. One piece of work owns a range of
// columns of dx and walks down all rows of W, so that the order of additions is fixed.
// Why this shape: float32 sums for a tile of dx stay in the L2 cache, and each piece of a row of
// W is decoded once per tile.
#define Q8_ISA portable
#include "primitives_portable.h"

#include "scratch.h"
#include "span.h"

namespace gptj_q8::portable {
namespace {

constexpr int64_t kTileRows = 64, kTileColumns = 256;  // 64 KB of sums

template <class T>
void grad_input_typed(const LinearGradInputArgs& a, const Pool& pool, const T* dy, T* dx) {
  const Weight& w = a.weight;
  auto run_tiles = [&](int64_t first_tile, int64_t end_tile) {
    const Decoder decoder(w.codebook);
    Scratch<float> sums(kTileRows * kTileColumns);
    float decoded[kTileColumns];
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      const int64_t begin = tile * kTileColumns;
      const int64_t columns = min_of(w.cols - begin, kTileColumns);
      for (int64_t first = 0; first < a.m; first += kTileRows) {
        const int64_t rows = min_of(a.m - first, kTileRows);
        for (int64_t i = 0; i < rows * kTileColumns; ++i) sums.data()[i] = 0.0f;
        for (int64_t n = 0; n < w.rows; ++n) {
          const int64_t flat = n * w.cols + begin;
          decode_span(decoder, w, flat, flat + columns, decoded);
          for (int64_t m = 0; m < rows; ++m) {
            const float factor = to_float(dy[(first + m) * w.rows + n]);
            float* sum = sums.data() + m * kTileColumns;
            for (int64_t k = 0; k < columns; ++k) sum[k] += factor * decoded[k];
          }
        }
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t k = 0; k < columns; ++k) {
            from_float(sums.data()[m * kTileColumns + k], &dx[(first + m) * w.cols + begin + k]);
          }
        }
      }
    }
  };
  parallel(pool, ceil_div(w.cols, kTileColumns), 1, run_tiles);
}

}  // namespace

void linear_grad_input(const LinearGradInputArgs& a, const Pool& pool) {
  with_type(a.dtype, [&](auto* t) { grad_input_typed(a, pool, typed(a.dy, t), typed(a.dx, t)); });
}

}  // namespace gptj_q8::portable
