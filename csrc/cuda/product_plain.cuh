// linear:            y[m, n]  = sum over k of x[m, k] * w[n, k]   (+ bias[n])
// linear_grad_input: dx[m, k] = sum over n of dy[m, n] * w[n, k]
// with w[n, k] = codebook[codes[n, k]] * absmax[(n * K + k) / block], without tensor cores.
//
// x [M, inner], codes [N, K], y [M, outer], all dense, of any size and alignment; T float32,
// bfloat16 or float16. kGrad says which of N and K is summed over (inner). A block owns
// y[16 * kRows, 64] over one of gridDim.y stretches of the sum; a thread kRows by 4 sums in
// float32 registers.
//
// This serves what the other kernels cannot: float32 with many rows (no tensor core keeps its
// promise of 1e-5), bfloat16 on sm_75, and sizes or pointers that 16-byte loads do not fit. w is
// decoded into shared memory, once for all rows of x of the block: with 64 rows about an eighth of
// the instructions.
#pragma once

#include "../common/arguments.h"
#include "primitives.cuh"
#include "results.cuh"

namespace gptj_q8::cuda {

constexpr int kPlainThreads = 256;
constexpr int kPlainOuter = 64;  // outputs of a block along w
constexpr int kPlainInner = 32;  // of the sum, at a time

template <int kRows>
struct PlainTile {
  static constexpr int kM = 16 * kRows;
  // Rows of float32, longer than need be so that lanes that store down a column do not meet.
  static constexpr int kXStride = kM + 4, kWStride = kPlainOuter + 4;
  static constexpr int kSharedBytes =
      4 * (kLevels + kPlainInner * kXStride + kPlainInner * kWStride);
};

template <class T, int kRows, bool kGrad>
__global__ void __launch_bounds__(kPlainThreads)
    product_plain_kernel(const T* x, Weight w, Results<T> out, int m_tiles) {
  using Tile = PlainTile<kRows>;
  float* levels = shared_memory<float>();
  float* x_tile = levels + kLevels;                       // [kPlainInner][kXStride]
  float* w_tile = x_tile + kPlainInner * Tile::kXStride;  // [kPlainInner][kWStride]
  const int thread = threadIdx.x;
  const int inner = static_cast<int>(kGrad ? w.rows : w.cols);
  const int64_t outer = kGrad ? w.cols : w.rows;
  const Stretch stretch = my_stretch((inner + kPlainInner - 1) / kPlainInner);
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * Tile::kM;
  const int64_t first_o = static_cast<int64_t>(blockIdx.x / m_tiles) * kPlainOuter;
  // Neighbouring threads own neighbouring outputs.
  const int my_m = thread / 16 * kRows, my_o = thread % 16 * 4;
  static_assert(kPlainThreads == kLevels);
  levels[thread] = w.codebook[thread];

  float sums[kRows][4] = {};
  for (int step = stretch.first; step < stretch.last; ++step) {
    const int start = step * kPlainInner;
    sync_threads();  // until the tiles have been read; the first time, for the levels
    const int x_at = thread % kPlainInner, x_m = thread / kPlainInner;
#pragma unroll 2
    for (int m = x_m; m < Tile::kM; m += kPlainThreads / kPlainInner) {
      const bool inside = start + x_at < inner && first_m + m < out.rows;
      x_tile[x_at * Tile::kXStride + m] =
          inside ? widen(x[(first_m + m) * inner + (start + x_at)]) : 0.0f;
    }
    // Neighbouring threads read neighbouring columns of w, all at the same distance below.
    constexpr int kAcross = kGrad ? kPlainOuter : kPlainInner;
    constexpr int kDown = kGrad ? kPlainInner : kPlainOuter;
    const int across = thread % kAcross;
    const int64_t k = (kGrad ? first_o : start) + across;
#pragma unroll 2
    for (int down = thread / kAcross; down < kDown; down += kPlainThreads / kAcross) {
      const int64_t n = (kGrad ? start : first_o) + down;
      float weight = 0.0f;
      if (k < w.cols && n < w.rows) {
        const int64_t flat = n * w.cols + k;
        weight = levels[w.codes[flat]] * w.absmax[block_of(flat, w.block_shift)];
      }
      w_tile[(kGrad ? down : across) * Tile::kWStride + (kGrad ? across : down)] = weight;
    }
    sync_threads();
#pragma unroll 8
    for (int at = 0; at < kPlainInner; ++at) {
      const float4 weights = *reinterpret_cast<const float4*>(w_tile + at * Tile::kWStride + my_o);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float value = x_tile[at * Tile::kXStride + my_m + m];
        sums[m][0] = multiply_add(value, weights.x, sums[m][0]);
        sums[m][1] = multiply_add(value, weights.y, sums[m][1]);
        sums[m][2] = multiply_add(value, weights.z, sums[m][2]);
        sums[m][3] = multiply_add(value, weights.w, sums[m][3]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (first_m + my_m + m < out.rows && first_o + my_o + o < outer) {
        out.store(blockIdx.y, first_m + my_m + m, first_o + my_o + o, sums[m][o]);
      }
    }
  }
}

}  // namespace gptj_q8::cuda
