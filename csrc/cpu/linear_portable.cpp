// linear: y[M, N] = x[M, K] @ W[N, K].T + bias[N],  W = codebook[codes] * absmax per block
//
// x, y [M, K], [M, N] in one of float32, bfloat16, float16; codes [N, K]; blocks run on across
// rows. The host has checked that all arrays have these sizes. One piece of work owns whole rows
// of W: each is decoded once per pass of rows of x, into K float32, and multiplied with all of
// them, eight sums per product side by side, which any vectorizing compiler turns into registers.
// Why this shape: the plain one that never holds more of W than one row per thread.
#define Q8_ISA portable
#include "primitives_portable.h"

#include "scratch.h"
#include "span.h"

namespace gptj_q8::portable {
namespace {

constexpr int64_t kRowsPerPass = 64;  // rows of x held as float32: 4 MB at K = 16384
constexpr int kLanes = 8;

// out[i] = x[i] . w for Rows rows of x.
template <int Rows>
void dot(const float* x, const float* w, int64_t k, float* out) {
  float sums[Rows][kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    for (int r = 0; r < Rows; ++r) {
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[r][lane] += x[r * k + i + lane] * w[i + lane];
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    float sum = 0.0f;
    for (int64_t rest = i; rest < k; ++rest) sum += x[r * k + rest] * w[rest];
    for (float lane : sums[r]) sum += lane;
    out[r] = sum;
  }
}

template <class T>
void linear_typed(const LinearArgs& a, const Pool& pool, const T* x, T* y) {
  const Weight& w = a.weight;
  Scratch<float> inputs(min_of(a.m, kRowsPerPass) * w.cols);
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    const int64_t rows = min_of(a.m - first, kRowsPerPass);
    const T* source = x + first * w.cols;
    for (int64_t i = 0; i < rows * w.cols; ++i) inputs.data()[i] = to_float(source[i]);
    auto run_rows = [&](int64_t begin, int64_t end) {
      const Decoder decoder(w.codebook);
      Scratch<float> decoded(w.cols);
      for (int64_t n = begin; n < end; ++n) {
        decode_span(decoder, w, n * w.cols, (n + 1) * w.cols, decoded.data());
        float sums[kRowsPerPass];
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4) {
          dot<4>(inputs.data() + m * w.cols, decoded.data(), w.cols, sums + m);
        }
        for (; m < rows; ++m) dot<1>(inputs.data() + m * w.cols, decoded.data(), w.cols, sums + m);
        for (m = 0; m < rows; ++m) {
          const float sum = a.bias ? sums[m] + a.bias[n] : sums[m];
          from_float(sum, &y[(first + m) * w.rows + n]);
        }
      }
    };
    parallel(pool, w.rows, 1 + 16384 / w.cols, run_rows);
  }
}

}  // namespace

void linear(const LinearArgs& a, const Pool& pool) {
  with_type(a.dtype, [&](auto* t) { linear_typed(a, pool, typed(a.x, t), typed(a.y, t)); });
}

}  // namespace gptj_q8::portable
