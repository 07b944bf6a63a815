// linear_grad_input: dx[M, K] = dy[M, N] @ W[N, K],  W = codebook[codes] * absmax per block
//
// dy, dx [M, N], [M, K] in one of float32, bfloat16, float16; codes [N, K]; blocks run on across
// rows. The host has checked that all arrays have these sizes. One piece of work owns a range of
// columns of dx and walks down all rows of W, so that the order of additions is fixed. A panel,
// kSteps rows of W by kPanel columns, is decoded to float32 in the L2 cache (128 KB), and all rows
// of dy go past it, up to 6 at a time, columns along the registers.
// Why this shape: rows of W already lie as the sums do; 12 or more sums for each step of a tile
// take a load for each register of columns and one broadcast for each row.
#pragma once

#include "primitives_lanes.h"
#include "scratch.h"
#include "span.h"

namespace gptj_q8::Q8_ISA {
namespace {

constexpr int64_t kPanel = 256, kSteps = 128;
constexpr int64_t kRowsPerPass = 256;  // 256 KB of sums
constexpr int kTileRows = 6;

// c[i, j] += sum over s of dy[i, s] * panel[s, j] for Rows rows and Columns registers of columns.
template <int Rows, int Columns>
Q8_INLINE void tile(const float* dy, int64_t stride, const float* panel, int64_t steps, float* c) {
  Lanes sums[Rows][Columns];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Columns; ++j) sums[i][j] = load(c + i * kPanel + j * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    Lanes right[Columns];
    for (int j = 0; j < Columns; ++j) right[j] = load(panel + s * kPanel + j * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Lanes left = fill(dy[i * stride + s]);
      for (int j = 0; j < Columns; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Columns; ++j) store(c + i * kPanel + j * kLanes, sums[i][j]);
  }
}

// All rows of dy against one panel.
void multiply_panel(const float* dy, int64_t stride, int64_t rows, const float* panel,
                    int64_t steps, float* c) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    with_count<kTileRows>(min_of(kTileRows, rows - i), [&](auto count) {
      constexpr int Rows = decltype(count)::value;
      // One row alone has nobody to share loads with, but needs sums that do not wait.
      constexpr int Columns = Rows < 3 ? 4 : kTileColumns;
      for (int64_t j = 0; j < kPanel; j += Columns * kLanes) {
        tile<Rows, Columns>(dy + i * stride, stride, panel + j, steps, c + i * kPanel + j);
      }
    });
  }
}

// `rows` rows of dy, float32.
template <class T>
void grad_input_pass(const Pool& pool, const float* dy, int64_t rows, const Weight& w, T* dx) {
  auto run_panels = [&](int64_t first_panel, int64_t end_panel) {
    const Decoder decoder(w.codebook);
    Scratch<float> panel(kSteps * kPanel);
    Scratch<float> c(rows * kPanel);
    for (int64_t i = 0; i < kSteps * kPanel; ++i) panel.data()[i] = 0.0f;
    for (int64_t p = first_panel; p < end_panel; ++p) {
      const int64_t begin = p * kPanel;
      const int64_t columns = min_of(w.cols - begin, kPanel);
      for (int64_t i = 0; i < rows * kPanel; ++i) c.data()[i] = 0.0f;
      for (int64_t n = 0; n < w.rows; n += kSteps) {
        const int64_t steps = min_of(kSteps, w.rows - n);
        for (int64_t s = 0; s < steps; ++s) {
          const int64_t flat = (n + s) * w.cols + begin;
          decode_span(decoder, w, flat, flat + columns, panel.data() + s * kPanel);
        }
        multiply_panel(dy + n, w.rows, rows, panel.data(), steps, c.data());
      }
      for (int64_t i = 0; i < rows; ++i) {
        convert(c.data() + i * kPanel, columns, dx + i * w.cols + begin);
      }
    }
  };
  parallel(pool, ceil_div(w.cols, kPanel), 1, run_panels);
}

template <class T>
void grad_input_typed(const LinearGradInputArgs& a, const Pool& pool, const T* dy, T* dx) {
  const Weight& w = a.weight;
  constexpr bool kDirect = std::is_same_v<T, float>;
  Scratch<float> copy(kDirect ? 0 : min_of(a.m, kRowsPerPass) * w.rows);
  for (int64_t first = 0; first < a.m; first += kRowsPerPass) {
    const int64_t rows = min_of(a.m - first, kRowsPerPass);
    const T* source = dy + first * w.rows;
    const float* input = nullptr;
    if constexpr (kDirect) {
      input = source;
    } else {
      convert(source, rows * w.rows, copy.data());
      input = copy.data();
    }
    grad_input_pass(pool, input, rows, w, dx + first * w.cols);
  }
}

}  // namespace

void linear_grad_input(const LinearGradInputArgs& a, const Pool& pool) {
  with_type(a.dtype, [&](auto* t) { grad_input_typed(a, pool, typed(a.dy, t), typed(a.dx, t)); });
}

}  // namespace gptj_q8::Q8_ISA
