// dx[m, k] = sum over n of dy[m, n] * codebook[codes[n, k]] * absmax[(n * K + k) / block]
// on tensor cores, w decoded inside the product.
//
// dy [M, N], codes [N, K], dx [M, K], all dense; T bfloat16 or float16. A block owns
// dx[8 * kM8, 128] over one of gridDim.y stretches of n: a warp takes 64 columns of w and 32 rows
// of each step's 128. The host has checked that K is a multiple of 16, N of 8, and that dy and
// codes are aligned to 16 bytes.
//
// As in linear_tensor.cuh a lane decodes straight into the registers that it multiplies from. The
// sum runs down the rows of w, so a lane takes 8 rows, 8 neighbours of each (one load and one
// scale), and pairs weights of two rows in a register.
#pragma once

#include "tensor.cuh"

namespace gptj_q8::cuda {

constexpr int kGradTileK = 128;  // columns of w of a block

template <class T, int kM8>
struct GradTile {
  static constexpr int kK16 = 4;               // a warp's columns of w, in sixteens
  static constexpr int kColumns = 2 * kK16;    // of a lane
  static constexpr int kRows = 8;              // of a lane
  static constexpr int kWarpRows = 4 * kRows;  // the four lanes of a column differ in rows
  static constexpr int kOwners = kGradTileK / (16 * kK16);
  static constexpr int kParts = kTensorWarps / kOwners;  // warps that share columns of w
  static constexpr int kStep = kWarpRows * kParts;
  using Dy = RowTile<T, kM8, kStep, kRows>;
  static constexpr int kCodeBytes = kTensorThreads * kRows * kColumns;
  static constexpr int kStageBytes = Dy::kBytes + kCodeBytes;
  static_assert(2 * kStageBytes >= kTensorThreads / 2 * kK16 * kM8 * 16, "room for add_parts");
};

template <class T, int kM8>
__global__ void __launch_bounds__(kTensorThreads, kM8 <= 2 ? 2 : 1)
    grad_tensor_kernel(const T* dy, Weight w, Results<T> out, int m_tiles, int stages) {
  using Tile = GradTile<T, kM8>;
  constexpr int kK16 = Tile::kK16, kRows = Tile::kRows, kColumns = Tile::kColumns;
  float* table = shared_memory<float>();
  unsigned char* ring = shared_memory<unsigned char>() + kTableBytes;
  const int thread = threadIdx.x, lane = thread % kLanes, warp = uniform_warp();
  const int owner = warp / Tile::kParts, part = warp % Tile::kParts;
  const int group = lane / 4, quad = lane % 4;
  const uint32_t lane_bytes = 4 * lane;
  const int rows = static_cast<int>(w.rows), steps = (rows + Tile::kStep - 1) / Tile::kStep;
  const Stretch stretch = my_stretch(steps);
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * 8 * kM8;
  const int64_t column = static_cast<int64_t>(blockIdx.x / m_tiles) * kGradTileK +
                         owner * 16 * kK16 + group * kColumns;
  const bool column_inside = column < w.cols;
  const int my_row = part * Tile::kWarpRows + quad * kRows;
  const typename Tile::Dy rows_of_dy(dy, first_m, out.rows, w.rows);

  const auto fetch = [&](int slot, int step) {
    unsigned char* stage = ring + slot * Tile::kStageBytes;
    const int start = step * Tile::kStep;
    rows_of_dy.fetch(stage, start);
    unsigned char* codes = stage + Tile::Dy::kBytes + thread * kColumns;
    const int row = start + my_row;
    const uint8_t* from = w.codes + row * w.cols + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool inside = column_inside && row + r < rows;
      copy_async_8(codes + r * kTensorThreads * kColumns, inside ? from : w.codes, inside);
      from += w.cols;
    }
  };
  float next_scale[kRows];
  const auto fetch_scales = [&](int step) {
    const int row = step * Tile::kStep + my_row;
    int64_t flat = row * w.cols + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      next_scale[r] = 0.0f;
      if (column_inside && row + r < rows) next_scale[r] = w.absmax[block_of(flat, w.block_shift)];
      flat += w.cols;
    }
  };

  float sums[kK16][kM8][4] = {};
  fetch_scales(stretch.first);
  const auto multiply = [&](int slot, int step) {
    const unsigned char* stage = ring + slot * Tile::kStageBytes;
    uint2 codes[kRows];
    float scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const unsigned char* mine =
          stage + Tile::Dy::kBytes + (r * kTensorThreads + thread) * kColumns;
      codes[r] = *reinterpret_cast<const uint2*>(mine);
      scale[r] = next_scale[r];
    }
    fetch_scales(step + 1);
    uint32_t a[2][kK16][4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {  // from rows 4 s, ... of the lane's eight
#pragma unroll
      for (int i = 0; i < kK16; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = 4 * s + r / 2 * 2, place = 2 * i + r % 2;
          const auto weight = [&](int k) {
            const uint32_t word = place < 4 ? codes[k].x : codes[k].y;
            return level_of(table, lane_bytes, word, place % 4) * scale[k];
          };
          a[s][i][r] = pack<T>(weight(row), weight(row + 1));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kM8; ++j) {
      const uint4 b = Tile::Dy::read(stage, j, group, my_row);
#pragma unroll
      for (int i = 0; i < kK16; ++i) multiply_tile<T, false>(sums[i][j], a[0][i], b.x, b.y);
#pragma unroll
      for (int i = 0; i < kK16; ++i) multiply_tile<T, false>(sums[i][j], a[1][i], b.z, b.w);
    }
  };
  pipeline(table, w.codebook, stretch, stages, fetch, multiply);
  float* exchange = reinterpret_cast<float*>(ring);
  add_parts<Tile::kParts, kK16 * kM8 * 4>(&sums[0][0][0], exchange, owner, part, lane);
  if (part > 0 || !column_inside) return;
#pragma unroll
  for (int i = 0; i < kK16; ++i) {
#pragma unroll
    for (int j = 0; j < kM8; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t m = first_m + 8 * j + 2 * quad + r % 2;
        if (m < out.rows) out.store(blockIdx.y, m, column + 2 * i + r / 2, sums[i][j][r]);
      }
    }
  }
}

}  // namespace gptj_q8::cuda
