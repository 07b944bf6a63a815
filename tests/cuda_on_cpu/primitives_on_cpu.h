// The wrappers of csrc/cuda/primitives.cuh on the CPU, one for one. Each says what the instruction
// computes; the fragment layouts are those of the PTX manual, "Matrix fragments for mma.m16n8k16".
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_on_cpu.h"

namespace gptj_q8::cuda {

namespace emulated = ::cuda_on_cpu;

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   A... arguments) {
  const std::tuple<P...> values(static_cast<P>(arguments)...);
  return emulated::run(reinterpret_cast<const void*>(kernel), grid, dim3(threads), shared_bytes,
                       [&] { std::apply(kernel, values); });
}

template <class... P>
bool takes_threads(void (*)(P...), int) {
  return true;
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulated::shared_memory());
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulated::shared_memory());
}

inline void sync_threads(Q8_HERE) {
  if (!emulated::left_out(site)) emulated::wait_for_block(site);
}

struct Nothing {
  static void together(Nothing**, int) {}
};
inline void sync_warp(Q8_HERE) {
  if (emulated::left_out(site)) return;
  Nothing nothing;
  emulated::collect(32, nothing, site);
}

// Reading lane `from(mine)` of the warp.
template <class T>
struct Shuffle {
  T value;
  int from;
  T result;
  static void together(Shuffle** lanes, int count) {
    for (int i = 0; i < count; ++i) lanes[i]->result = lanes[lanes[i]->from]->value;
  }
};
template <class T>
T shuffle(T value, int lane, Q8_HERE) {
  Shuffle<T> mine{value, lane & 31, value};
  emulated::collect(32, mine, site);
  return mine.result;
}
template <class T>
T shuffle_xor(T value, int mask, Q8_HERE) {
  return shuffle(value, (static_cast<int>(threadIdx.x) & 31) ^ mask, site);
}
template <class T>
T shuffle_down(T value, int delta, Q8_HERE) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  return shuffle(value, lane + delta > 31 ? lane : lane + delta, site);
}

inline uint4 load_cached_16(const void* p, Q8_HERE) {
  emulated::check_aligned(p, 16, "a 16-byte load", site);
  return *static_cast<const uint4*>(p);
}
inline uint4 load_streaming_16(const void* p, Q8_HERE) {
  return load_cached_16(p, site);
}

inline void copy_async_16(void* to, const void* from, bool inside, Q8_HERE) {
  emulated::check_aligned(to, 16, "cp.async", site);
  emulated::check_aligned(from, 16, "cp.async", site);
  emulated::start_copy(to, from, inside ? 16 : 0, inside ? 0 : 16, site);
}
inline void copy_async_4(void* to, const void* from, Q8_HERE) {
  emulated::check_aligned(to, 4, "cp.async", site);
  emulated::check_aligned(from, 4, "cp.async", site);
  emulated::start_copy(to, from, 4, 0, site);
}
inline void copy_async_commit() {
  emulated::commit_copies();
}
template <int Groups>
void copy_async_wait(Q8_HERE) {
  if (!emulated::left_out(site)) emulated::land_copies(Groups);
}

inline void device_assert(bool holds, const char* what, Q8_HERE) {
  if (!holds) emulated::fail(site, "%s", what);
}

inline void atomic_add(int64_t* p, int64_t value) {
  *p += value;
}
inline void atomic_max_positive(float* p, float value) {
  if (*p < value) *p = value;
}

inline float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline int64_t round_to_integer(float a) {
  return static_cast<int64_t>(std::rint(a));
}

template <class T>
float widen(T value) {
  return to_float(value);
}
template <class T>
T narrow(float value) {
  T result;
  from_float(value, &result);
  return result;
}

// Two values in a register, `low` in its low half.
template <class T>
uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(narrow<T>(low).bits) | static_cast<uint32_t>(narrow<T>(high).bits)
                                                          << 16;
}
template <class T>
float unpack(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

// D[16, 8] += A[16, k] @ B[k, 8], k = 8 * Halves; A and B of a 16-bit type, D of float32. Lane l
// holds of A the rows l / 4 and l / 4 + 8, of B the column l / 4, of both the pairs of k that begin
// at 2 (l % 4) and 8 above; of D the columns 2 (l % 4) and the next.
template <class T, int Halves>
struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;

  static void together(Mma** lanes, int) {
    constexpr int kDepth = 8 * Halves;
    float A[16][kDepth], B[8][kDepth];
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < Halves; ++half) {
        for (int i = 0; i < 2; ++i) {
          const int k = half * 8 + (lane % 4) * 2 + i;
          A[lane / 4][k] = unpack<T>(lanes[lane]->a[2 * half], i);
          A[lane / 4 + 8][k] = unpack<T>(lanes[lane]->a[2 * half + 1], i);
          B[lane / 4][k] = unpack<T>(lanes[lane]->b[half], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const float* row = A[lane / 4 + (i / 2) * 8];
        const float* column = B[(lane % 4) * 2 + i % 2];
        float sum = lanes[lane]->d[i];
        for (int k = 0; k < kDepth; ++k) sum += row[k] * column[k];
        lanes[lane]->d[i] = sum;
      }
    }
  }
};
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Q8_HERE) {
  Mma<T, 2> mine{d, a, b};
  emulated::collect(32, mine, site);
}
inline void mma_16x8x8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t& b, Q8_HERE) {
  Mma<f16, 1> mine{d, a, &b};
  emulated::collect(32, mine, site);
}

// ldmatrix: lane l gives the address of row l % 8 of 8x8 matrix l / 8, and gets of matrix i in
// r[i] the elements [l / 4][2 (l % 4)] and the next of its row; transposed, of its column.
template <int Count, bool Transposed>
struct LoadMatrices {
  uint32_t* r;
  const uint16_t* row;

  static void together(LoadMatrices** lanes, int) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < Count; ++i) {
        const int along = 2 * (lane % 4), across = lane / 4;
        const uint16_t low =
            Transposed ? lanes[8 * i + along]->row[across] : lanes[8 * i + across]->row[along];
        const uint16_t high = Transposed ? lanes[8 * i + along + 1]->row[across]
                                         : lanes[8 * i + across]->row[along + 1];
        lanes[lane]->r[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  }
};
template <bool Transposed = false, int Count>
void load_matrices(uint32_t (&r)[Count], const void* row, Q8_HERE) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  if (static_cast<int>(threadIdx.x) % 32 < 8 * Count) {
    emulated::check_aligned(row, 16, "ldmatrix", site);
  }
  LoadMatrices<Count, Transposed> mine{r, static_cast<const uint16_t*>(row)};
  emulated::collect(32, mine, site);
}

}  // namespace gptj_q8::cuda
