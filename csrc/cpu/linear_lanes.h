// linear: y[M, N] = x[M, K] @ W[N, K].T + bias[N],  W = codebook[codes] * absmax per block
//
// x, y [M, K], [M, N] in one of float32, bfloat16, float16; codes [N, K]; blocks run on across
// rows. The host has checked that all arrays have these sizes. One piece of work owns whole rows
// of W. A strip of rows of W, kDepth columns of each, is decoded to float32 in a cache, and all
// rows of x go past it, 4 rows of x and 3 of W at a time, sums along the registers. Few rows of x
// meet the levels in registers instead, and the scale of a block meets its sum, if it can wait.
// Why this shape: x and W both lie along K as the products want them, so nothing is transposed;
// 12 sums take 7 loads. For few rows a store and a load of each level would cost a third more.
#pragma once

#include "primitives_lanes.h"
#include "scratch.h"
#include "span.h"

namespace gptj_q8::Q8_ISA {
namespace {

constexpr int64_t kDepth = 1024;
constexpr int64_t kRowsPerPass = 256;  // rows of x held as float32: 16 MB at K = 16384
constexpr int kTileX = 4, kTileW = 3;
constexpr int kFewRows = 4;  // estimate: 8 sums, what the registers hold beside levels

// sums[i] = x[i] . W[n], M rows of x.
template <int M>
Q8_INLINE void dot_row(const Weight& w, int64_t n, const float* x, int64_t stride,
                       float (&sums)[M]) {
  constexpr int kApart = 2;  // sums of each row of x that do not wait for each other
  Lanes total[M];
  float rest[M] = {};
  for (Lanes& each : total) each = fill(0.0f);
  for (int64_t k = 0; k < w.cols;) {
    const int64_t flat = n * w.cols + k;
    const int64_t stop = min_of(w.cols, k + block_end(flat, w.block_shift) - flat);
    const float scale = w.absmax[block_of(flat, w.block_shift)];
    const uint8_t* codes = w.codes + n * w.cols;
    Lanes block[kApart][M];
    for (auto& row : block) {
      for (Lanes& each : row) each = fill(0.0f);
    }
    for (; k + kApart * kLanes <= stop; k += kApart * kLanes) {
      for (int j = 0; j < kApart; ++j) {
        const Lanes levels = lookup(w.codebook, codes + k + j * kLanes);
        for (int i = 0; i < M; ++i) {
          block[j][i] = multiply_add(levels, load(x + i * stride + k + j * kLanes), block[j][i]);
        }
      }
    }
    for (int i = 0; i < M; ++i) {
      total[i] = multiply_add(block[0][i] + block[1][i], fill(scale), total[i]);
    }
    for (; k < stop; ++k) {
      const float level = w.codebook[codes[k]] * scale;
      for (int i = 0; i < M; ++i) rest[i] += level * x[i * stride + k];
    }
  }
  for (int i = 0; i < M; ++i) sums[i] = sum(total[i]) + rest[i];
}

// c[i, j] += x[i] . w[j] over `depth` values, a multiple of kLanes. X rows of x, W rows of w.
template <int X, int W>
Q8_INLINE void dot_tile(const float* x, int64_t x_stride, const float* w, int64_t depth, float* c,
                        int64_t c_stride) {
  Lanes sums[X][W];
  for (auto& row : sums) {
    for (Lanes& each : row) each = fill(0.0f);
  }
  for (int64_t k = 0; k < depth; k += kLanes) {
    Lanes right[W];
    for (int j = 0; j < W; ++j) right[j] = load(w + j * kDepth + k);
    for (int i = 0; i < X; ++i) {
      const Lanes left = load(x + i * x_stride + k);
      for (int j = 0; j < W; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < X; ++i) {
    for (int j = 0; j < W; ++j) c[i * c_stride + j] += sum(sums[i][j]);
  }
}

// All rows of x against `count` decoded rows of W; c has `count` columns.
void multiply_strip(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t count,
                    int64_t depth, float* c) {
  for (int64_t j = 0; j < count; j += kTileW) {
    with_count<kTileW>(min_of(kTileW, count - j), [&](auto in_tile) {
      constexpr int W = decltype(in_tile)::value;
      int64_t i = 0;
      for (; i + kTileX <= rows; i += kTileX) {
        dot_tile<kTileX, W>(x + i * x_stride, x_stride, w + j * kDepth, depth, c + i * count + j,
                            count);
      }
      for (; i < rows; ++i) {
        dot_tile<1, W>(x + i * x_stride, x_stride, w + j * kDepth, depth, c + i * count + j, count);
      }
    });
  }
}

template <int M, class T>
void linear_few(const Pool& pool, const float* x, int64_t stride, const Weight& w,
                const float* bias, T* y) {
  auto run_rows = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float sums[M];
      dot_row<M>(w, n, x, stride, sums);
      for (int i = 0; i < M; ++i) {
        from_float(bias ? sums[i] + bias[n] : sums[i], &y[i * w.rows + n]);
      }
    }
  };
  parallel(pool, w.rows, 1 + 16384 / w.cols, run_rows);
}

// `rows` rows of x, float32 and readable to `stride`, a multiple of kLanes; zeros past K.
template <class T>
void linear_pass(const Pool& pool, const float* x, int64_t stride, int64_t rows, const Weight& w,
                 const float* bias, T* y) {
  if (rows <= kFewRows && may_meet_levels(max_abs(x, rows * stride))) {
    return with_count<kFewRows>(
        rows, [&](auto m) { linear_few<decltype(m)::value>(pool, x, stride, w, bias, y); });
  }
  // Rows of x read from the L2 cache are worth a larger strip, read fewer times.
  const int64_t strip = 16 * kTileW;
  auto run_rows = [&](int64_t begin, int64_t end) {
    const Decoder decoder(w.codebook);
    Scratch<float> decoded(strip * kDepth);
    Scratch<float> c(rows * strip);
    for (int64_t n = begin; n < end; n += strip) {
      const int64_t count = min_of(strip, end - n);
      for (int64_t i = 0; i < rows * count; ++i) c.data()[i] = 0.0f;
      for (int64_t k = 0; k < w.cols; k += kDepth) {
        const int64_t depth = min_of(kDepth, w.cols - k);
        const int64_t padded = ceil_div(depth, kLanes) * kLanes;
        for (int64_t j = 0; j < count; ++j) {
          float* row = decoded.data() + j * kDepth;
          const int64_t flat = (n + j) * w.cols + k;
          decode_span(decoder, w, flat, flat + depth, row);
          for (int64_t i = depth; i < padded; ++i) row[i] = 0.0f;
        }
        multiply_strip(x + k, stride, rows, decoded.data(), count, padded, c.data());
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < count; ++j) {
          const float each = c.data()[i * count + j];
          from_float(bias ? each + bias[n + j] : each, &y[i * w.rows + n + j]);
        }
      }
    }
  };
  parallel(pool, w.rows, 1 + 16384 / w.cols, run_rows);
}

template <class T>
void linear_typed(const LinearArgs& a, const Pool& pool, const T* x, T* y) {
  const Weight& w = a.weight;
  const int64_t stride = ceil_div(w.cols, kLanes) * kLanes;
  const bool direct = std::is_same_v<T, float> && stride == w.cols;
  Scratch<float> copy(direct ? 0 : min_of(a.m, kRowsPerPass) * stride);
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    const int64_t rows = min_of(a.m - first, kRowsPerPass);
    const T* source = x + first * w.cols;
    const float* input = nullptr;
    if constexpr (std::is_same_v<T, float>) input = source;
    if (!direct) {
      auto copy_rows = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float* row = copy.data() + i * stride;
          convert(source + i * w.cols, w.cols, row);
          for (int64_t k = w.cols; k < stride; ++k) row[k] = 0.0f;
        }
      };
      parallel(pool, rows, 1 + 32768 / stride, copy_rows);
      input = copy.data();
    }
    linear_pass(pool, input, stride, rows, w, a.bias, y + first * w.rows);
  }
}

}  // namespace

void linear(const LinearArgs& a, const Pool& pool) {
  with_type(a.dtype, [&](auto* t) { linear_typed(a, pool, typed(a.x, t), typed(a.y, t)); });
}

}  // namespace gptj_q8::Q8_ISA
