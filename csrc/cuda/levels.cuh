// The codebook in shared memory, once for each lane of a warp.
//
// Lane l finds level c at float 32 c + l, in a bank of its own: a warp looks 32 codes up in one
// turn of shared memory. From a single copy 32 random codes take 2.8 turns, from 2 to 8 copies as
// many, from 16 copies 2 (simulated for Gaussian codes).
#pragma once

#include "primitives.cuh"

namespace gptj_q8::cuda {

constexpr int kLanes = 32;
constexpr int kTableBytes = kLevels * kLanes * 4;

// By all kThreads threads of a block; readers come after a barrier.
template <int kThreads>
__device__ __forceinline__ void fill_table(float* table, const float* codebook) {
  static_assert(kTableBytes / 16 % kThreads == 0);
#pragma unroll
  for (int pass = 0; pass < kTableBytes / 16 / kThreads; ++pass) {
    const int quarter = pass * kThreads + static_cast<int>(threadIdx.x);
    const float level = codebook[quarter / (kLanes / 4)];
    reinterpret_cast<float4*>(table)[quarter] = {level, level, level, level};
  }
}

// The level of code `which`, 0 to 3 and known when compiled, in a word of four. lane_bytes: 4 times
// the lane. One shift and one and-or make the place; the table's address goes into the load.
__device__ __forceinline__ float level_of(const float* table, uint32_t lane_bytes, uint32_t word,
                                          int which) {
  static_assert(kLanes * 4 == 1 << 7);
  const uint32_t shifted = which == 0 ? word << 7 : word >> (8 * which - 7);
  const uint32_t place = (shifted & 0x7f80u) | lane_bytes;
  return *reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(table) + place);
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// The thread's warp, as a number that the compiler knows to be one for all of the warp: loops over
// it are then uniform, and the table's address is in a uniform register (sm_90 would else add it
// for every lookup).
__device__ __forceinline__ int uniform_warp() {
  return shuffle(static_cast<int>(threadIdx.x) / kLanes, 0);
}

}  // namespace gptj_q8::cuda
