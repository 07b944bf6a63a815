// What the elementwise kernels share: 16 codes or values at a time, and the codebook at hand.
#pragma once

#include <cstring>

#include "primitives.cuh"

namespace gptj_q8::cuda {

// Codes or values that a thread handles at a time: 16 bytes of codes. A block of the format is a
// multiple of it, so these 16 share a scale.
constexpr int kRun = 16;

template <class T>
struct alignas(16) Run {
  T values[kRun];
};

// A run from p: whole vectors where `Aligned` and all is inside, else what there is, and zeros.
template <bool Aligned, class T>
__device__ __forceinline__ Run<T> load_run(const T* p, int64_t inside) {
  Run<T> run;
  if (Aligned && inside >= kRun) {
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

template <bool Aligned, class T>
__device__ __forceinline__ void store_run(T* p, const Run<T>& run, int64_t inside) {
  if (Aligned && inside >= kRun) {
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

inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace gptj_q8::cuda
