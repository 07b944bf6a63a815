// dx[m, k] = sum over n of dy[m, n] * codebook[codes[n, k]] * absmax[(n * K + k) / block]
// on tensor cores, w decoded inside the product.
//
// dy [M, N], codes [N, K], dx [M, K], all dense; T bfloat16 or float16. A block owns
// dx[8 * kM8, 128] over one of gridDim.y stretches of n: a warp takes 64 columns of w and a quarter
// of each step's 128 rows (64 on sm_75). The host has checked that K is a multiple of 16, N of 8,
// and that dy and codes are aligned to 16 bytes.
//
// As in linear_tensor.cuh a lane decodes straight into the registers that it multiplies from. The
// sum runs down the rows of w, so a lane takes 8 rows (4 on sm_75), 8 neighbours of each (one
// scale), and pairs weights of two rows in a register.
#pragma once

#include "tensor.cuh"

namespace gptj_q8::cuda {

constexpr int kGradTileK = 128;  // columns of w of a block

// A tile of codes [N, K] in shared memory: kStep rows, kGradTileK columns; what lies outside is 0.
// Shared memory serves sixteen lanes' reads of 8 bytes at a time: four lanes' rows, kRows apart,
// and 32 columns of each. So that all are in different banks, they are put 32 columns further for
// each kRows rows.
template <int kStep, int kRows>
class CodeTile {
 public:
  static constexpr int kBytes = kStep * kGradTileK;

  // first_k: the tile's first column.
  __device__ __forceinline__ CodeTile(const Weight& w, int64_t first_k)
      : codes_(w.codes), width_(w.cols), row_(threadIdx.x / kPieces) {
    const int column = threadIdx.x % kPieces * 16;
    from_ = codes_ + row_ * width_ + first_k + column;
    to_ = place(row_, column);
    rows_ = first_k + column < w.cols ? static_cast<int>(w.rows) : 0;
  }

  // Starts this thread's share of copies of the rows from `start` on.
  __device__ __forceinline__ void fetch(unsigned char* tile, int start) const {
    const uint8_t* from = from_ + start * width_;
#pragma unroll
    for (int i = 0; i < kStep / kPassRows; ++i) {
      const bool inside = start + row_ + i * kPassRows < rows_;
      copy_async_16(tile + to_ + i * kPassRows * kGradTileK, inside ? from : codes_, inside);
      from += kPassRows * width_;
    }
  }

  // 8 columns, from a multiple of 8 on, of the row `below` of the kRows that begin at `row`.
  static __device__ __forceinline__ uint2 read(const unsigned char* tile, int row, int below,
                                               int column) {
    return *reinterpret_cast<const uint2*>(tile + place(row, column) + below * kGradTileK);
  }

 private:
  static constexpr int kPieces = kGradTileK / 16;  // 16 bytes each
  static constexpr int kPassRows = kTensorThreads / kPieces;
  static_assert(kPassRows % (4 * kRows) == 0, "a pass further, columns are exchanged alike");

  static __device__ __forceinline__ int place(int row, int column) {
    return row * kGradTileK + (column ^ (row / kRows % 4 * 32));
  }

  const uint8_t* codes_;
  const uint8_t* from_;
  int64_t width_;
  int row_, to_, rows_;
};

// kNarrow: for sm_75, where half as many rows fit in shared memory.
template <class T, int kM8, bool kNarrow>
struct GradTile {
  static constexpr int kK16 = 4;                 // a warp's columns of w, in sixteens
  static constexpr int kColumns = 2 * kK16;      // of a lane
  static constexpr int kRows = kNarrow ? 4 : 8;  // of a lane
  static constexpr int kWarpRows = 4 * kRows;    // the four lanes of a column differ in rows
  static constexpr int kOwners = kGradTileK / (16 * kK16);
  static constexpr int kParts = kTensorWarps / kOwners;  // warps that share columns of w
  static constexpr int kStep = kWarpRows * kParts;
  using Dy = RowTile<T, kM8, kStep, kRows>;
  using Codes = CodeTile<kStep, kRows>;
  static constexpr int kStageBytes = Dy::kBytes + Codes::kBytes;
  static_assert(kTableBytes + 2 * kStageBytes >= kTensorThreads / 2 * kK16 * kM8 * 16,
                "room for add_parts");
};

template <class T, int kM8, bool kNarrow>
__global__ void __launch_bounds__(kTensorThreads, kM8 <= 2 ? 2 : 1)
    grad_tensor_kernel(const T* dy, Weight w, Results<T> out, int m_tiles, int stages) {
  using Tile = GradTile<T, kM8, kNarrow>;
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
  const int64_t first_k = static_cast<int64_t>(blockIdx.x / m_tiles) * kGradTileK;
  const int my_column = owner * 16 * kK16 + group * kColumns;
  const int64_t column = first_k + my_column;
  const bool column_inside = column < w.cols;
  const int my_row = part * Tile::kWarpRows + quad * kRows;
  const typename Tile::Dy rows_of_dy(dy, first_m, out.rows, w.rows);
  const typename Tile::Codes codes_of_w(w, first_k);

  const auto fetch = [&](int slot, int step) {
    unsigned char* stage = ring + slot * Tile::kStageBytes;
    rows_of_dy.fetch(stage, step * Tile::kStep);
    codes_of_w.fetch(stage + Tile::Dy::kBytes, step * Tile::kStep);
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
      codes[r] = Tile::Codes::read(stage + Tile::Dy::kBytes, my_row, r, my_column);
      scale[r] = next_scale[r];
    }
    fetch_scales(step + 1);
    constexpr int kDeep = kRows / 4;  // products, each of four rows of a lane
    uint32_t a[kDeep][kK16][4];
#pragma unroll
    for (int s = 0; s < kDeep; ++s) {
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
      const typename Tile::Dy::Read b = Tile::Dy::read(stage, j, group, my_row);
#pragma unroll
      for (int i = 0; i < kK16; ++i) multiply_tile<T, kNarrow>(sums[i][j], a[0][i], b.x, b.y);
      if constexpr (kDeep == 2) {
#pragma unroll
        for (int i = 0; i < kK16; ++i) multiply_tile<T, kNarrow>(sums[i][j], a[1][i], b.z, b.w);
      }
    }
  };
  pipeline(table, w.codebook, stretch, stages, fetch, multiply);
  add_parts<Tile::kParts, kK16 * kM8 * 4>(&sums[0][0][0], table, owner, part, lane);
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
