// The tile registers of AMX: c[16, 16] += a[16, 32] @ b[32, 16], a and b in bfloat16, c in float32.
//
// A register is 16 rows of 64 bytes. One that holds b has pairs of its rows in each of its own, as
// vdpbf16ps wants them: row p is b[2p, 0], b[2p + 1, 0], b[2p, 1], b[2p + 1, 1] and so on.
// Q8_TILES, defined by the tests, names a header that does the same without AMX.
#pragma once

#include <cstdint>

#include "intrinsics_avx512.h"
#include "kernels.h"

#if defined(Q8_TILES)
#include Q8_TILES
#else
namespace gptj_q8::Q8_ISA {

// Holds the registers of this thread in that shape, and releases them in the end: what they hold
// is otherwise saved and loaded at each switch of threads.
class Tiles {
 public:
  Q8_INLINE Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.bytes[t] = 64;
      shape.rows[t] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  Q8_INLINE ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// `stride` bytes from row to row. Not the intrinsics: those of GCC 12 take only literal numbers of
// registers, and its load does not tell the compiler that it reads memory.
template <int T>
Q8_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
Q8_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
Q8_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
Q8_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace gptj_q8::Q8_ISA
#endif
