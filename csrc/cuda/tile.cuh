// What the elementwise kernels share: a block of threads owns a tile of kTile elements, which is
// whole blocks of the format but for the last tile's end; a thread owns a run of 16 that follow
// each other and so share a scale.
#pragma once

#include <cstring>

#include "primitives.cuh"

namespace gptj_q8::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 16;
constexpr int kTile = kThreads * kRun;
static_assert(kTile % kMaxBlock == 0 && kMinBlock % kRun == 0);
static_assert(kThreads == kLevels, "each thread fills in one entry of a table");

inline unsigned tiles(int64_t numel) {
  return static_cast<unsigned>(ceil_div(numel, kTile));
}

// The flat index of this thread's run.
__device__ __forceinline__ int64_t run_begin() {
  return static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kRun;
}

template <class T>
struct alignas(16) Run {
  T values[kRun];
};

template <class... T>
bool are_aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// A run from p, of which `inside` elements (perhaps none) exist: whole vectors where p is aligned
// and all exist, else one by one, and zeros for the others.
template <class T>
__device__ __forceinline__ Run<T> load_run(const T* p, int64_t inside, bool aligned) {
  Run<T> run;
  if (aligned && inside >= kRun) {
    uint4 vectors[sizeof(run) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(run) / 16); ++i) {
      vectors[i] = load_streaming_16(reinterpret_cast<const uint4*>(p) + i);
    }
    memcpy(&run, vectors, sizeof(run));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.values[i] = i < inside ? p[i] : T{};
  }
  return run;
}

template <class T>
__device__ __forceinline__ void store_run(T* p, const Run<T>& run, int64_t inside, bool aligned) {
  if (aligned && inside >= kRun) {
    uint4 vectors[sizeof(run) / 16];
    memcpy(vectors, &run, sizeof(run));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(run) / 16); ++i) {
      reinterpret_cast<uint4*>(p)[i] = vectors[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < inside) p[i] = run.values[i];
    }
  }
}

// The codebook in shared memory: the thread's entry of it. A barrier must follow.
__device__ __forceinline__ void fill_levels(float* levels, const float* codebook) {
  levels[threadIdx.x] = codebook[threadIdx.x];
}

// The codebook's 255 midpoints as a search tree: node i has the children 2i and 2i + 1, the root
// is 1. A level of up to 32 nodes lies in different banks, so that six of the eight steps of a
// search have no conflict. A barrier must follow.
__device__ __forceinline__ void fill_tree(float* tree, const float* codebook) {
  const int node = static_cast<int>(threadIdx.x);
  if (node == 0) return;  // there is no node 0
  int depth = 0;
  while (node >> (depth + 1)) ++depth;
  const int across = node - (1 << depth);
  const int rank = ((2 * across + 1) << (7 - depth)) - 1;
  tree[node] = midpoint(codebook[rank], codebook[rank + 1]);
}

// The code of r: how many midpoints are below it.
__device__ __forceinline__ uint8_t nearest(const float* tree, float r) {
  int node = 1;
#pragma unroll
  for (int step = 0; step < 8; ++step) node = 2 * node + (tree[node] < r ? 1 : 0);
  return static_cast<uint8_t>(node - kLevels);
}

// The largest of `mine` (not negative) over the threads whose runs lie in the same block of the
// format, for `Count` values at once. All threads of the block take part. maxima: shared memory,
// [Count * kWarps], not used again before another barrier.
template <int Count>
__device__ __forceinline__ void block_max(float (&mine)[Count], int block_shift, float* maxima) {
  const int threads = (1 << block_shift) / kRun;
  for (int mask = 1; mask < threads && mask < 32; mask *= 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) mine[i] = fmaxf(mine[i], shuffle_xor(mine[i], mask));
  }
  if (threads <= 32) return;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < Count; ++i) maxima[i * kWarps + warp] = mine[i];
  }
  sync_threads();
  const int warps = threads / 32, first = warp / warps * warps;
  for (int other = first; other < first + warps; ++other) {
#pragma unroll
    for (int i = 0; i < Count; ++i) mine[i] = fmaxf(mine[i], maxima[i * kWarps + other]);
  }
}

// Whether this thread's run begins a block of the format that has any elements.
__device__ __forceinline__ bool begins_block(int64_t first, int64_t numel, int block_shift) {
  return first < numel && (first & ((int64_t{1} << block_shift) - 1)) == 0;
}

}  // namespace gptj_q8::cuda
