// y[m, n] = sum over k of x[m, k] * codebook[codes[n, k]] * absmax[(n * K + k) / block] + bias[n]
// on tensor cores, w decoded inside the product.
//
// x [M, K], codes [N, K], y [M, N], all dense; T bfloat16 or float16. A block owns y[8 * kM8, 128]
// over one of gridDim.y stretches of k: its warps take 16 or 32 rows of w each, and where they are
// 32, two warps share the rows and take 64 columns each of a step's 128. The host has checked that
// K is a multiple of 16 and that x and codes are aligned to 16 bytes.
//
// Each weight is decoded once for up to 64 rows of x, by the lane that multiplies it: 16 codes of
// a row that follow each other (one load, one scale), which are its part of four products of the
// tensor core. Codes take their turn in shared memory only to be on their way early (each lane
// reads what it copied itself); decoded weights never go there.
#pragma once

#include "tensor.cuh"

namespace gptj_q8::cuda {

constexpr int kLinearTileN = 128;  // rows of w of a block
constexpr int kWarpK = 64;         // columns of w that a warp takes in a step: 16 for each lane

// kNarrow: for sm_75, whose shared memory holds one warp's step of k.
template <class T, int kM8, bool kNarrow>
struct LinearTile {
  static constexpr int kN16 = kNarrow ? 1 : 2;  // a warp's rows of w, in sixteens
  static constexpr int kParts = kN16;           // warps that share rows of w
  static constexpr int kRuns = 2 * kN16;        // rows of w that a lane decodes from
  static constexpr int kStep = kWarpK * kParts;
  using X = RowTile<T, kM8, kStep, 16>;
  static constexpr int kCodeBytes = kTensorThreads * kRuns * 16;
  static constexpr int kStageBytes = X::kBytes + kCodeBytes;
  static_assert(16 * kN16 * kTensorWarps / kParts == kLinearTileN);
  static_assert(2 * kStageBytes >= kTensorThreads / 2 * kN16 * kM8 * 16, "room for add_parts");
};

template <class T, int kM8, bool kNarrow>
__global__ void __launch_bounds__(kTensorThreads, kM8 <= 4 ? 2 : 1)
    linear_tensor_kernel(const T* x, Weight w, Results<T> out, int m_tiles, int stages) {
  using Tile = LinearTile<T, kM8, kNarrow>;
  constexpr int kN16 = Tile::kN16, kRuns = Tile::kRuns, kParts = Tile::kParts;
  float* table = shared_memory<float>();
  unsigned char* ring = shared_memory<unsigned char>() + kTableBytes;
  const int thread = threadIdx.x, lane = thread % kLanes, warp = uniform_warp();
  const int owner = warp / kParts, part = warp % kParts;
  const int group = lane / 4, quad = lane % 4;
  const uint32_t lane_bytes = 4 * lane;
  const int columns = static_cast<int>(w.cols), steps = (columns + Tile::kStep - 1) / Tile::kStep;
  const Stretch stretch = my_stretch(steps);
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * 8 * kM8;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x / m_tiles) * kLinearTileN +
                          owner * 16 * kN16 + group;  // the lane's rows: this, 8 more, ...
  const int rows_left = static_cast<int>(min_of(w.rows - first_n, kLinearTileN));
  const int my_column = part * kWarpK + 16 * quad;
  const int64_t flat = first_n * w.cols + my_column, eight_rows = 8 * w.cols;
  const typename Tile::X rows_of_x(x, first_m, out.rows, columns);

  const auto fetch = [&](int slot, int step) {
    unsigned char* stage = ring + slot * Tile::kStageBytes;
    const int start = step * Tile::kStep;
    rows_of_x.fetch(stage, start);
    unsigned char* codes = stage + Tile::X::kBytes + thread * 16;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const bool inside = start + my_column < columns && 8 * i < rows_left;
      const uint8_t* from = w.codes + (flat + (start + i * eight_rows));
      copy_async_16(codes + i * kTensorThreads * 16, inside ? from : w.codes, inside);
    }
  };
  float next_scale[kRuns];
  const auto fetch_scales = [&](int step) {
    const int start = step * Tile::kStep;
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      next_scale[i] = 0.0f;
      if (start + my_column < columns && 8 * i < rows_left) {
        next_scale[i] = w.absmax[block_of(flat + (start + i * eight_rows), w.block_shift)];
      }
    }
  };

  float sums[kN16][kM8][4] = {};
  fetch_scales(stretch.first);
  const auto multiply = [&](int slot, int step) {
    const unsigned char* stage = ring + slot * Tile::kStageBytes;
    uint4 codes[kRuns];
    float scale[kRuns];
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const unsigned char* mine = stage + Tile::X::kBytes + (i * kTensorThreads + thread) * 16;
      codes[i] = *reinterpret_cast<const uint4*>(mine);
      scale[i] = next_scale[i];
    }
    fetch_scales(step + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][kN16][4];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int i = 0; i < kN16; ++i) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int run = 2 * i + r % 2, byte = r / 2 * 2;
            const uint32_t word = word_of(codes[run], 2 * half + s);
            a[s][i][r] = decoded_pair<T>(table, lane_bytes, word, byte, scale[run]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kM8; ++j) {
        const uint4 b = Tile::X::read(stage, j, group, my_column + 8 * half);
#pragma unroll
        for (int i = 0; i < kN16; ++i) multiply_tile<T, kNarrow>(sums[i][j], a[0][i], b.x, b.y);
#pragma unroll
        for (int i = 0; i < kN16; ++i) multiply_tile<T, kNarrow>(sums[i][j], a[1][i], b.z, b.w);
      }
    }
  };
  pipeline(table, w.codebook, stretch, stages, fetch, multiply);
  if constexpr (kParts > 1) {
    float* exchange = reinterpret_cast<float*>(ring);
    add_parts<kParts, kN16 * kM8 * 4>(&sums[0][0][0], exchange, owner, part, lane);
    if (part > 0) return;
  }
#pragma unroll
  for (int i = 0; i < kN16; ++i) {
#pragma unroll
    for (int j = 0; j < kM8; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t m = first_m + 8 * j + 2 * quad + r % 2;
        const int below = 16 * i + r / 2 * 8;
        if (m < out.rows && below < rows_left) {
          out.store(blockIdx.y, m, first_n + below, sums[i][j][r]);
        }
      }
    }
  }
}

}  // namespace gptj_q8::cuda
