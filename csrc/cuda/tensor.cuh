// What the tensor-core kernels share. w is the left operand of the tensor core's product, decoded
// straight into the registers of the lane that multiplies it, x (or dy) the right one, in shared
// memory:
//
//   D[16, 8] += A[16, 16] @ B[16, 8],  A: w, 16 outputs by 16 of the sum;  B: 8 rows of x
//
// Lane 4 g + q holds of A the rows g and g + 8, of B the column g, of both the places 2q, 2q + 1,
// 2q + 8, 2q + 9 of the sum; of D the rows g and g + 8 of the columns 2q, 2q + 1. In which order a
// sum is taken is free, as long as A and B agree: so the kernels give lane q neighbours, which it
// reads with one access, and no exchange between lanes is needed.
#pragma once

#include "../common/arguments.h"
#include "levels.cuh"
#include "results.cuh"
#include "wgmma.cuh"

namespace gptj_q8::cuda {

constexpr int kTensorThreads = 256;
constexpr int kTensorWarps = kTensorThreads / kLanes;

// Steps of the sum in shared memory at a time: the one multiplied and those on their way.
constexpr int kMostStages = 4;

// Runs multiply(slot, step) for each step of the stretch, on what fetch(slot, step) has started to
// copy; a slot is a place in the ring of `stages` in shared memory. As the one is multiplied, the
// next are on their way. Fills the table of levels meanwhile. kBehind: multiply leaves a product
// running that still reads the slot, until the next one; so slots are filled a step later (stages
// at least 3), and tensor cores read what is copied.
template <bool kBehind = false, class Fetch, class Multiply>
__device__ __forceinline__ void pipeline(float* table, const float* codebook, Stretch stretch,
                                         int stages, const Fetch& fetch, const Multiply& multiply) {
  const int ahead = stages - (kBehind ? 2 : 1);
  const auto start = [&](int slot, int step) {
    if (step < stretch.last) fetch(slot, step);
    copy_async_commit();  // empty past the end, so that counting groups stays right
  };
  for (int s = 0; s < ahead; ++s) start(s, stretch.first + s);
  fill_table<kTensorThreads>(table, codebook);
  int slot = 0;
#pragma unroll 1
  for (int step = stretch.first; step < stretch.last; ++step) {
    // Of the groups on their way the oldest is needed now.
    if (ahead == 1) {
      copy_async_wait<0>();
    } else if (ahead == 2) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<2>();
    }
    if constexpr (kBehind) fence_async_proxy();
    sync_threads();  // for the others' copies, and until all have read the slot filled next
    start(slot + ahead < stages ? slot + ahead : slot + ahead - stages, step + ahead);
    multiply(slot, step);
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
}

// A tile of x [M, width] in shared memory: 8 * kM8 rows, kStep columns. What lies outside of x is
// 0. Shared memory serves 128 bytes at a time, of lanes that follow each other: two rows, four
// places kApart columns apart, 16 bytes each; or, where kApart is 4, four rows and 8 bytes. So that
// all are in different banks, the places that one row reads are exchanged in the others for those
// that it leaves out.
template <class T, int kM8, int kStep, int kApart>
class RowTile {
 public:
  static_assert(kStep % 64 == 0 && (kApart == 16 || kApart == 8 || kApart == 4));
  using Read = std::conditional_t<kApart == 4, uint2, uint4>;
  static constexpr int kBytes = 8 * kM8 * kStep * static_cast<int>(sizeof(T));

  __device__ __forceinline__ RowTile(const T* x, int64_t first_row, int64_t rows, int64_t width)
      : x_(x), width_(width), row_(threadIdx.x / kPieces), column_(threadIdx.x % kPieces * 8) {
    from_ = x + (first_row + row_) * width + column_;
    rows_left_ = static_cast<int>(min_of(rows - first_row, 8 * kM8)) - row_;
  }

  // Starts this thread's share of copies of the columns from `start` on.
  __device__ __forceinline__ void fetch(void* tile, int start) const {
    T* to = static_cast<T*>(tile) + row_ * kStep + exchanged(column_, row_);
    const bool column_inside = start + column_ < width_;
    const T* from = from_ + start;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (8 * kM8 < kPassRows && row_ >= 8 * kM8) break;
      const bool inside = column_inside && i * kPassRows < rows_left_;
      copy_async_16(to + i * kPassRows * kStep, inside ? from : x_, inside);
      from += kPassRows * width_;
    }
  }

  // The lane's values of row 8 j + g from `column` on: its part of B for a product or two.
  static __device__ __forceinline__ Read read(const void* tile, int j, int group, int column) {
    return *reinterpret_cast<const Read*>(static_cast<const T*>(tile) + (8 * j + group) * kStep +
                                          exchanged(column, group));
  }

 private:
  static_assert(sizeof(T) == 2);
  static constexpr int kPieces = kStep / 8;  // 16 bytes each
  static constexpr int kPassRows = kTensorThreads / kPieces;
  static constexpr int kPasses = (8 * kM8 + kPassRows - 1) / kPassRows;
  static_assert(kPassRows % 4 == 0, "a pass further, columns are exchanged alike");

  static __device__ __forceinline__ int exchanged(int column, int row) {
    return column ^ (kApart == 4 ? row % 4 * 16 : row % 2 * (kApart == 16 ? 8 : 32));
  }

  const T* x_;
  const T* from_;
  int64_t width_;
  int row_, column_, rows_left_;
};

// Two neighbouring codes of a word of four, decoded, as they go into A: the scale multiplies in
// float32, before the one rounding to T.
template <class T>
__device__ __forceinline__ uint32_t decoded_pair(const float* table, uint32_t lane_bytes,
                                                 uint32_t word, int byte, float scale) {
  return pack<T>(level_of(table, lane_bytes, word, byte) * scale,
                 level_of(table, lane_bytes, word, byte + 1) * scale);
}

// d += A @ B, with b_low and b_high the lane's two pairs of B. kNarrow: as two products half as
// deep, all that sm_75 has.
template <class T, bool kNarrow>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low,
                                              uint32_t b_high) {
  if constexpr (kNarrow) {
    const uint32_t low[2] = {a[0], a[1]}, high[2] = {a[2], a[3]};
    mma_16x8x8_f16(d, low, b_low);
    mma_16x8x8_f16(d, high, b_high);
  } else {
    const uint32_t b[2] = {b_low, b_high};
    mma_16x8x16<T>(d, a, b);
  }
}

// Adds the sums of the kParts warps that have the same outputs, part = 0, 1, ..., into part 0's:
// halves first, always in that order. `group`: which outputs, below `groups`. exchange: shared
// memory, groups * kParts / 2 * kCount * 128 bytes, that nobody reads once all threads are here.
template <int kParts, int kCount>
__device__ __forceinline__ void add_parts(float* sums, float* exchange, int group, int part,
                                          int lane) {
#pragma unroll
  for (int half = kParts / 2; half > 0; half /= 2) {
    float* mine = exchange + ((group * (kParts / 2) + part % half) * kCount) * kLanes + lane;
    sync_threads();
    if (part >= half && part < 2 * half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) mine[i * kLanes] = sums[i];
    }
    sync_threads();
    if (part < half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += mine[i * kLanes];
    }
  }
}

}  // namespace gptj_q8::cuda
