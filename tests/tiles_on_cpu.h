// csrc/cpu/tiles_amx.h for CPUs without AMX, and for sanitizers, which do not see what tile
// instructions read and write: every access is a plain one here. Sums are rounded in the order of
// Intel's manual for TDPBF16PS, subnormals flushed.
#pragma once

#include <cstdlib>

namespace gptj_q8::Q8_ISA {

struct TileRegisters {
  bool held = false;
  uint32_t at[8][16][16];
};
inline thread_local TileRegisters tile_registers;

inline void need_tiles(bool right) {
  if (!right) std::abort();  // on a CPU: an illegal instruction, or what another function left
}

class Tiles {
 public:
  Tiles() {
    need_tiles(!tile_registers.held);
    tile_registers.held = true;
    for (auto& tile : tile_registers.at) std::memset(tile, 0xff, sizeof tile);  // NaNs
  }
  ~Tiles() { tile_registers.held = false; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

inline float without_subnormals(float value) {
  return (bits_of(value) & 0x7f800000u) == 0 ? 0.0f : value;
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  need_tiles(tile_registers.held);
  for (int i = 0; i < 16; ++i) {
    std::memcpy(tile_registers.at[T][i], static_cast<const char*>(from) + i * stride, 64);
  }
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  need_tiles(tile_registers.held);
  for (int i = 0; i < 16; ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride, tile_registers.at[T][i], 64);
  }
}
template <int T>
inline void tile_zero() {
  need_tiles(tile_registers.held);
  std::memset(tile_registers.at[T], 0, sizeof tile_registers.at[T]);
}
template <int C, int A, int B>
inline void tile_multiply_add() {
  need_tiles(tile_registers.held);
  auto& t = tile_registers.at;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {};  // of even and odd steps
      for (int p = 0; p < 16; ++p) {
        for (int h = 0; h < 2; ++h) {
          const float a = without_subnormals(float_of(t[A][m][p] >> (16 * h) << 16));
          const float b = without_subnormals(float_of(t[B][p][n] >> (16 * h) << 16));
          sums[h] = without_subnormals(__builtin_fmaf(a, b, sums[h]));
        }
      }
      const float sum = without_subnormals(sums[0] + sums[1]);
      t[C][m][n] = bits_of(without_subnormals(float_of(t[C][m][n]) + sum));
    }
  }
}

}  // namespace gptj_q8::Q8_ISA
