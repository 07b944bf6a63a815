// y[m, n] = sum over k of x[m, k] * codebook[codes[n, k]] * absmax[(n * K + k) / block] + bias[n]
// on Hopper's tensor cores: as linear_tensor.cuh for more rows of x.
//
// x [M, K], codes [N, K], y [M, N], all dense; T bfloat16 or float16. A block owns y[64 * kM64,
// 128] over one of gridDim.y stretches of k: each of its two groups of four warps has 64 rows of w,
// a warp 16, in steps of 128 columns. The host has checked that K is a multiple of 128, that x and
// codes are aligned to 16 bytes, and that the GPU and the code at hand have wgmma (sm_90a).
//
// As for few rows, w is the left operand, decoded straight into registers, each weight once for all
// rows of x of the block; but x is read from shared memory by the tensor core itself, for four
// warps at a time, and while it multiplies the warps decode the next 64 columns. Only so do the
// lookups and x together leave an H100 near its memory's bandwidth with 128 rows (estimate, not yet
// measured: python -m benchmarks.cuda_budget).
//
// Which k a product's sixteen places mean is free, as long as w and x agree: a lane decodes 16
// neighbours of a row, four for each of four products, and x's tile is put down in that order.
#pragma once

#include "tensor.cuh"

namespace gptj_q8::cuda {

constexpr int kWgmmaTileN = 128;  // rows of w of a block
constexpr int kWgmmaStep = 128;   // columns of w, in two halves

// 64 columns of 64 * kM64 rows of x in shared memory, as wgmma reads them: a row is 128 bytes, and
// in row r the pieces of 16 bytes exchange places by exclusive or with r % 8. `tile` is aligned to
// 1024.
template <class T, int kM64>
class XHalf {
 public:
  static constexpr int kBytes = 64 * kM64 * 128;

  // first_row below rows. Rows past the end repeat the last one: their results are not written.
  __device__ __forceinline__ XHalf(const T* x, int64_t first_row, int64_t rows, int64_t width) {
    // A warp copies a row, each lane a pair: lane 8 q + 2 p + h the columns 16 q + 4 p + 2 h and
    // the next, to where product p looks for its places 2 q + 8 h and the next.
    const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
    to_ = row * 128 + ((lane ^ row) % 8) * 16 + lane / 8 * 4;
    rows_left_ = static_cast<int>(min_of(rows - first_row, 64 * kM64)) - row;
    from_ = x + (first_row + (rows_left_ > 0 ? row : 0)) * width + 2 * lane;
    eight_rows_ = 8 * width;
  }

  // Starts this thread's share of copies to two tiles, of the columns from `start` on and the next.
  __device__ __forceinline__ void fetch_two(unsigned char* tile, int start) const {
    const T* from = from_ + start;
#pragma unroll
    for (int i = 0; i < 8 * kM64; ++i) {
      copy_async_4(tile + to_ + i * 8 * 128, from);
      copy_async_4(tile + kBytes + to_ + i * 8 * 128, from + 64);
      if (8 * (i + 1) < rows_left_) from += eight_rows_;
    }
  }

  // How wgmma is told of 64 rows, the `rows`th, and the sixteen places of product p: in units of 16
  // bytes, where they begin and how far apart groups of eight rows are; and that a row has 128
  // bytes.
  static __device__ __forceinline__ uint64_t describe(const unsigned char* tile, int rows, int p) {
    const uint64_t begin = (shared_address(tile) & 0x3ffff) >> 4;
    constexpr uint64_t kEightRows = 8 * 128 / 16, kRowsOf128Bytes = 1;
    return begin + (kRowsOf128Bytes << 62 | kEightRows << 32 | (rows * 64 * 128 + p * 32) / 16);
  }

 private:
  static_assert(kTensorWarps == 8, "a pass further, pieces are exchanged alike");
  const T* from_;
  int64_t eight_rows_;
  int to_, rows_left_;
};

template <class T, int kM64>
struct WgmmaTile {
  using X = XHalf<T, kM64>;
  static constexpr int kRuns = 4;  // of 16 codes that a lane decodes: in each half, from two rows
  static constexpr int kStageBytes = 2 * X::kBytes + kTensorThreads * kRuns * 16;
};

// Where the code has no wgmma, its launch bounds tell the host: takes_threads(kTensorThreads)
// fails.
template <class T, int kM64>
__global__ void __launch_bounds__(kHasWgmma ? kTensorThreads : kLanes, 1)
    linear_wgmma_kernel(const T* x, Weight w, Results<T> out, int m_tiles, int stages) {
  if constexpr (kHasWgmma) {
    using Tile = WgmmaTile<T, kM64>;
    constexpr int kRuns = Tile::kRuns;
    float* table = shared_memory<float>();
    unsigned char* ring = shared_memory<unsigned char>() + kTableBytes;
    const int thread = threadIdx.x, lane = thread % kLanes, warp = uniform_warp();
    const int group = lane / 4, quad = lane % 4;
    const uint32_t lane_bytes = 4 * lane;
    const int columns = static_cast<int>(w.cols);
    const Stretch stretch = my_stretch(columns / kWgmmaStep);
    const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * 64 * kM64;
    const int64_t first_n =
        static_cast<int64_t>(blockIdx.x / m_tiles) * kWgmmaTileN + warp * 16 + group;
    // The lane's rows, this and 8 below. Past the end they repeat the last one.
    int64_t flat[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) flat[r] = min_of(first_n + 8 * r, w.rows - 1) * w.cols + 16 * quad;
    const typename Tile::X half_of_x(x, first_m, out.rows, w.cols);

    const auto fetch = [&](int slot, int step) {
      unsigned char* stage = ring + slot * Tile::kStageBytes;
      const int start = step * kWgmmaStep;
      half_of_x.fetch_two(stage, start);
      unsigned char* codes = stage + 2 * Tile::X::kBytes + thread * 16;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const uint8_t* from = w.codes + (flat[i % 2] + start + i / 2 * 64);
        copy_async_16(codes + i * kTensorThreads * 16, from, true);
      }
    };
    float next_scale[kRuns];
    const auto fetch_scales = [&](int step) {
      const int start = step * kWgmmaStep;
      if (start >= columns) return;
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        next_scale[i] = w.absmax[block_of(flat[i % 2] + start + i / 2 * 64, w.block_shift)];
      }
    };

    float sums[kM64][8][4] = {};
    uint32_t a[2][4][4];  // w of each half, of the products p
    fetch_scales(stretch.first);
    const auto multiply = [&](int slot, int step) {
      const unsigned char* stage = ring + slot * Tile::kStageBytes;
      uint4 codes[kRuns];
      float scale[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        const unsigned char* mine =
            stage + 2 * Tile::X::kBytes + (i * kTensorThreads + thread) * 16;
        codes[i] = *reinterpret_cast<const uint4*>(mine);
        scale[i] = next_scale[i];
      }
      fetch_scales(step + 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int run = 2 * half + r % 2, byte = r / 2 * 2;
            const uint32_t word = word_of(codes[run], p);
            a[half][p][r] = decoded_pair<T>(table, lane_bytes, word, byte, scale[run]);
          }
        }
        wgmma_wait(sums);  // for the half before, whose registers are decoded into next
        wgmma_fence();
        const unsigned char* tile = stage + half * Tile::X::kBytes;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int j = 0; j < kM64; ++j) {
            wgmma_64x64x16<T>(sums[j], a[half][p], Tile::X::describe(tile, j, p));
          }
        }
        wgmma_commit();
      }
    };
    pipeline<true>(table, w.codebook, stretch, stages, fetch, multiply);
    wgmma_wait(sums);
#pragma unroll
    for (int j = 0; j < kM64; ++j) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int64_t m = first_m + 64 * j + i / 4 * 8 + 2 * quad + i % 2;
        const int64_t n = first_n + i % 4 / 2 * 8;
        if (m < out.rows && n < w.rows) out.store(blockIdx.y, m, n, sums[j][i / 4][i % 4]);
      }
    }
  }
}

}  // namespace gptj_q8::cuda
