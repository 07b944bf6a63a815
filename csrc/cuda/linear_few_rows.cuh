// y[m, n] = sum over k of x[m, k] * codebook[codes[n, k]] * absmax[(n * K + k) / block] + bias[n]
// for a few rows of x: the decoding of one token, where reading w is all the work.
//
// x [M, K], codes [N, K], y [M, N], all dense; T float32, bfloat16 or float16. Block b of those
// that share kM rows of x owns the rows of w from N * b / blocks on. The host has checked that K is
// a multiple of 16 and that x and codes are aligned to 16 bytes; so 16 codes that a lane loads at
// once lie in one row and share one scale.
//
// No tensor cores: each weight is one lookup and kM multiply-adds, all in float32. A warp keeps its
// slice of x (512 columns, 16 for each lane) in registers and runs down rows of w, four at a time,
// so that 2 KB of each warp are in flight and nothing of x is read again. Sums over the lanes and
// over the warps of a row are in a fixed order; no second kernel and no atomics are needed.
//
// What it can reach: python -m benchmarks.cuda_budget (at M = 1 six instructions for each weight).
#pragma once

#include "../common/arguments.h"
#include "levels.cuh"
#include "results.cuh"

namespace gptj_q8::cuda {

constexpr int kFewThreads = 512;
constexpr int kFewWarps = kFewThreads / kLanes;
constexpr int kSlice = 16 * kLanes;  // columns of w that a warp reads at a time
constexpr int kFewStep = 4;          // rows of w that a warp reads at a time
constexpr int kFewChunk = 32;        // rows of w whose sums a block keeps before it writes them

// Blocks of a kernel for kM rows of x that a multiprocessor holds, by the registers that x takes.
constexpr int few_resident(int kM) {
  return kM == 1 ? 2 : 1;
}

// Shared memory: the table, and the sums [slice_warps][kFewChunk][kM].
constexpr int few_shared_bytes(int kM, int slice_warps) {
  return kTableBytes + slice_warps * kFewChunk * kM * 4;
}

// 16 values of a row of x as they lie in memory.
template <class T>
class Values16 {
 public:
  __device__ __forceinline__ void load(const T* from, bool inside) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vectors_[i] = uint4{0, 0, 0, 0};
      if (inside) vectors_[i] = load_cached_16(from + i * 16 / sizeof(T));
    }
  }
  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) {
      return float_of(word_of(vectors_[i / 4], i % 4));
    } else {
      return unpack<T>(word_of(vectors_[i / 8], i % 8 / 2), i % 2);
    }
  }

 private:
  static constexpr int kVectors = sizeof(T);
  uint4 vectors_[kVectors];
};

// Sums each of v[kCount] over the lanes, kCount a power of two up to 32: lane l gets sum number
// l * kCount / 32. Halving the values at each exchange takes a fraction of the shuffles.
template <int kCount, int kDistance = kLanes / 2>
__device__ __forceinline__ float sum_over_lanes(float* v, int lane) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else if constexpr (kCount == 1) {
    v[0] += shuffle_xor(v[0], kDistance);
    return sum_over_lanes<1, kDistance / 2>(v, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? v[i + kHalf] : v[i], give = upper ? v[i] : v[i + kHalf];
      v[i] = keep + shuffle_xor(give, kDistance);
    }
    return sum_over_lanes<kHalf, kDistance / 2>(v, lane);
  }
}

// slice_warps: a power of two up to kFewWarps; so many warps share a row, slice by slice.
template <class T, int kM>
__global__ void __launch_bounds__(kFewThreads, few_resident(kM))
    linear_few_rows_kernel(const T* x, Weight w, Results<T> out, int m_tiles, int slice_warps) {
  float* table = shared_memory<float>();
  float* kept = table + kLevels * kLanes;  // [slice_warps][kFewChunk][kM]
  const int lane = threadIdx.x % kLanes, warp = uniform_warp();
  const uint32_t lane_bytes = 4 * lane;
  const int my_slice = warp % slice_warps, my_rows = warp / slice_warps * kFewStep;
  const int round = kFewWarps / slice_warps * kFewStep;  // rows that the block reads at a time
  const int columns = static_cast<int>(w.cols);
  // Blocks that share rows of w are neighbours: the first brings them to the L2 cache.
  const int64_t first_m = static_cast<int64_t>(blockIdx.x % m_tiles) * kM;
  const int block = blockIdx.x / m_tiles, blocks = gridDim.x / m_tiles;
  const int64_t first = w.rows * block / blocks, last = w.rows * (block + 1) / blocks;
  fill_table<kFewThreads>(table, w.codebook);
  sync_threads();

  Values16<T> values[kM];
  int held = -1;  // the first column of the slice in `values`
  for (int64_t chunk = first; chunk < last; chunk += kFewChunk) {
    const int rows = static_cast<int>(min_of(kFewChunk, last - chunk));
    for (int start = my_slice * kSlice; start < columns; start += slice_warps * kSlice) {
      const int column = start + 16 * lane;
      const bool inside = column < columns;
      if (held != start) {
        held = start;
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const int64_t row = min_of(first_m + m, out.rows - 1);
          values[m].load(x + row * columns + column, inside);
        }
      }
      for (int row = my_rows; row < rows; row += round) {
        uint4 codes[kFewStep];
        float scale[kFewStep];
#pragma unroll
        for (int r = 0; r < kFewStep; ++r) {
          // Rows past the end repeat the last one, and lanes past the end the first column: their
          // sums are not written, and their x is 0.
          const int below = row + r < rows ? row + r : rows - 1;
          const int64_t flat = (chunk + below) * columns + (inside ? column : 0);
          codes[r] = load_streaming_16(w.codes + flat);
          scale[r] = w.absmax[block_of(flat, w.block_shift)];
        }
        float sums[kFewStep * kM] = {};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float level[kFewStep];
#pragma unroll
          for (int r = 0; r < kFewStep; ++r) {
            level[r] = level_of(table, lane_bytes, word_of(codes[r], i / 4), i % 4);
          }
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const float value = values[m].at(i);
#pragma unroll
            for (int r = 0; r < kFewStep; ++r) {
              sums[r * kM + m] = multiply_add(level[r], value, sums[r * kM + m]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kFewStep * kM; ++i) sums[i] *= scale[i / kM];
        const float sum = sum_over_lanes<kFewStep * kM>(sums, lane);
        constexpr int kShare = kLanes / (kFewStep * kM);  // lanes that hold the same sum
        if (lane % kShare == 0) {
          float* place = kept + (my_slice * kFewChunk + row) * kM + lane / kShare;
          *place = start == my_slice * kSlice ? sum : *place + sum;
        }
      }
    }
    sync_threads();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * kM; i += kFewThreads) {
      float sum = 0.0f;
      for (int s = 0; s < slice_warps; ++s) {
        // A slice past the end has no sums.
        if (s * kSlice < columns) sum += kept[s * kFewChunk * kM + i];
      }
      const int64_t m = first_m + i % kM;
      if (m < out.rows) out.store(0, m, chunk + i / kM, sum);
    }
    sync_threads();
  }
}

}  // namespace gptj_q8::cuda
