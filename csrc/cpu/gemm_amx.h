// c[M, cols] = a[M, depth] @ B[depth, cols] on AMX tiles, B decoded a panel at a time.
//
// A panel is 64 columns of B times up to 512 of the reduction in bfloat16, as two pairs of columns
// of tiles. A run of a pair, 256 of the reduction and 16 KB, stays in the L1 cache while all rows
// of `a` go past it. `a` is copied once into tiles that lie in the order of use, a value of float16
// as the sum of two in bfloat16, of float32 as that of three, exactly. One piece of work owns whole
// columns, so the order of additions does not depend on the number of threads.
//
// Two kinds of panel: values (Levels = false), or levels whose scale is the same for `segment` of
// the reduction (Levels = true). Then sums of a segment are scaled and added to c. That costs two
// loads and two stores of each element of c for each segment, done between the tile instructions
// of the next one, which leave the vector units idle; and it saves scaling and rounding the
// weights, and keeps their levels exact.
//
// Why this shape: 32 by 32 of c are four registers, and 32 of the reduction are four loads and four
// products of 16 cycles each, the loads of `a` from the L2 cache at 32 bytes a cycle. Reached so,
// one core of a Xeon with AMX, random numbers: tiles alone from L1 2.9 TFLOP/s, from L2 2.1, a run
// with its scales 1.8 (1.55 with 512 of the reduction in a run).
#pragma once

#include "gemm_avx512.h"
#include "tiled_rows_amx.h"
#include "tiles_amx.h"

namespace gptj_q8::Q8_ISA {

constexpr int kPair = 32;  // columns of B that meet in four registers

// Columns of W for which every row keeps one scale, from every multiple of it on; at most 256.
// Callers decide from how many on that serves.
inline int64_t segment_of(const Weight& w) {
  const int64_t common = w.cols & -w.cols;  // the largest power of two that divides K
  return min_of(min_of(common, int64_t{1} << w.block_shift), kRun * kTileDepth);
}

struct TilePanel {
  using A = bf16;
  static constexpr int kWidth = 2;
  static constexpr int kSteps = 256;
  static constexpr int64_t kTiles = kSteps * kWidth / kTileDepth;  // of the reduction

  // [pair][tile of the reduction][of two columns of tiles][16][16]
  static Q8_INLINE uint32_t* at(uint32_t* panel, int64_t step, int group) {
    const int64_t tile = (group / 2 * kTiles + step / 16) * 2 + group % 2;
    return panel + tile * 256 + step % 16 * 16;
  }
  static Q8_INLINE __m512i pairs(__m512 even, __m512 odd) { return Bf16Panel::pairs(even, odd); }
};

// Sums of a segment on their way into c: c[row][0:32] += sums[row][0:32] * scales, or = if `first`.
struct Settling {
  const float* sums = nullptr;
  float* c = nullptr;
  const float* scales = nullptr;
  int64_t row = 0, rows = 0;
  bool first = false;

  Q8_INLINE int64_t left() const { return rows - row; }
  Q8_INLINE void some(int64_t count) {
    const int64_t end = min_of(rows, row + count);
    for (; row < end; ++row) {
      for (int h = 0; h < 2; ++h) {
        float* out = c + row * kPair + 16 * h;
        const __m512 sum = _mm512_load_ps(sums + row * kPair + 16 * h);
        const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(out);
        _mm512_store_ps(out, _mm512_fmadd_ps(sum, _mm512_load_ps(scales + 16 * h), before));
      }
    }
  }
};

// Tall blocks of 16 rows of `a`, `stride` values apart, times a pair of columns of tiles: the sums
// in registers 0 to 3 grow by `steps` of the reduction. work() is done in each step: the vector
// units are idle else.
template <int Parts, int Tall, class Work>
Q8_INLINE void add_products(const bf16* a, int64_t stride, const uint32_t* b, int64_t steps,
                            const Work& work) {
  for (int64_t s = 0; s < steps; ++s) {
    tile_load<6>(b + s * 512, 64);
    tile_load<7>(b + s * 512 + 256, 64);
    for (int p = 0; p < Parts; ++p) {
      const bf16* tile = a + (s * Parts + p) * kTileValues;
      tile_load<4>(tile, 64);
      tile_multiply_add<0, 4, 6>();
      tile_multiply_add<1, 4, 7>();
      if constexpr (Tall == 2) {
        tile_load<5>(tile + stride, 64);
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
      }
    }
    work();
  }
}

template <int Tall>
Q8_INLINE void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (Tall == 2) {
    tile_zero<2>();
    tile_zero<3>();
  }
}
template <int Tall>
Q8_INLINE void load_sums(const float* c) {
  tile_load<0>(c, 128);
  tile_load<1>(c + 16, 128);
  if constexpr (Tall == 2) {
    tile_load<2>(c + 16 * kPair, 128);
    tile_load<3>(c + 16 * kPair + 16, 128);
  }
}
template <int Tall>
Q8_INLINE void store_sums(float* c) {
  tile_store<0>(c, 128);
  tile_store<1>(c + 16, 128);
  if constexpr (Tall == 2) {
    tile_store<2>(c + 16 * kPair, 128);
    tile_store<3>(c + 16 * kPair + 16, 128);
  }
}

// What a panel's levels still lack: scales[segment][0:32] of a pair, and how long a segment is.
struct Segments {
  const float* scales;
  int64_t steps;  // of 32
};

// c[rows of a][0:32] (+)= a[:, a run] @ its part of one pair of a panel.
template <int Parts, bool Levels>
void multiply_run(const TiledA<Parts>& a, int64_t step, int64_t steps, const uint32_t* pair,
                  bool first, Segments segments, float* c) {
  alignas(64) float sums[2][2 * kTile * kPair];
  Settling settling;
  int turn = 0;
  const int64_t stride = a.stride(step);
  const auto block_of_rows = [&](int64_t block, auto tall) __attribute__((always_inline)) {
    constexpr int kTall = decltype(tall)::value;
    const bf16* rows = a.at(block, step);
    float* out = c + block * kTile * kPair;
    if constexpr (Levels) {
      for (int64_t s = 0; s < steps; s += segments.steps) {
        zero_sums<kTall>();
        const int64_t at_once = ceil_div(settling.left(), segments.steps);
        add_products<Parts, kTall>(
            rows + s * Parts * kTileValues, stride, pair + s * 512, segments.steps,
            [&]() __attribute__((always_inline)) { settling.some(at_once); });
        store_sums<kTall>(sums[turn]);
        settling = {sums[turn], out,           segments.scales + s / segments.steps * kPair,
                    0,          kTall * kTile, first && s == 0};
        turn ^= 1;
      }
    } else {
      first ? zero_sums<kTall>() : load_sums<kTall>(out);
      add_products<Parts, kTall>(rows, stride, pair, steps, [] {});
      store_sums<kTall>(out);
    }
  };
  int64_t block = 0;
  for (; block + 2 <= a.blocks; block += 2) {
    block_of_rows(block, std::integral_constant<int, 2>{});
  }
  if (block < a.blocks) block_of_rows(block, std::integral_constant<int, 1>{});
  settling.some(settling.left());
}

// out[0:rows][0:cols] = c[pair][padded_rows][32] + bias, out's rows `stride` apart; bias may be
// null.
template <class T>
void store_pairs(const float* c, int64_t padded_rows, int64_t rows, int64_t cols, const float* bias,
                 T* out, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t g = 0; g < ceil_div(cols, 16); ++g) {
      const __mmask16 mask = first16(cols - 16 * g);
      const __m512 sum = _mm512_load_ps(c + (g / 2 * padded_rows + i) * kPair + g % 2 * 16);
      const __m512 add = bias ? load16(bias + 16 * g, mask) : _mm512_setzero_ps();
      store16(out + i * stride + 16 * g, mask, _mm512_add_ps(sum, add));
    }
  }
}

// at_once: panels that share a run of `a` in the L2 cache, while their part of c, 128 KB for each
// 512 rows of `a`, stays there too. fill is as for multiply(), of up to Fill::kPanels at a time;
// Levels: its scales(column, k, out) gives those of 32 columns at k.
template <bool Levels, int Parts, class T, class Fill>
void multiply_tiles(const Pool& pool, const TiledA<Parts>& a, int64_t rows, int64_t depth,
                    int64_t cols, int64_t at_once, const Fill& fill, int64_t segment,
                    const float* bias, T* out) {
  constexpr int64_t kPanelDepth = kDepth<TilePanel>;
  const int64_t padded_rows = a.blocks * kTile;
  auto run_panels = [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    Scratch<uint32_t> panels(Fill::kPanels * kPanelEntries<TilePanel>);
    Scratch<float> c(at_once * padded_rows * kColumns);
    alignas(64) float scales[2][kPanelDepth / kTileDepth * kPair];
    for (int64_t strip = begin; strip < end; strip += at_once) {
      const int64_t last = min_of(end, strip + at_once);
      for (int64_t k = 0; k < depth; k += kPanelDepth) {
        const int64_t stop = min_of(depth, k + kPanelDepth);
        const int64_t steps = ceil_div(stop - k, kTileDepth);
        for (int64_t p = strip; p < last; ++p) {
          const int64_t inside = (p - strip) % Fill::kPanels;
          if (inside == 0) {
            const int64_t filled = min_of(last - p, Fill::kPanels);
            const Place next = p + filled < last ? Place{(p + filled) * kColumns, k}
                               : stop < depth    ? Place{strip * kColumns, stop}
                                                 : Place{last * kColumns, 0};
            fill({p * kColumns, k, filled}, k + steps * kTileDepth, next, panels.data());
          }
          uint32_t* panel = panels.data() + inside * kPanelEntries<TilePanel>;
          if constexpr (Levels) {
            for (int64_t s = 0; s * segment < stop - k; ++s) {
              for (int pair = 0; pair < 2; ++pair) {
                fill.scales(p * kColumns + pair * kPair, k + s * segment, scales[pair] + s * kPair);
              }
            }
          }
          for (int pair = 0; pair < 2; ++pair) {
            for (int64_t r = 0; r < steps; r += kRun) {
              multiply_run<Parts, Levels>(
                  a, k / kTileDepth + r, min_of(kRun, steps - r),
                  TilePanel::at(panel, 16 * r, 2 * pair), k + r == 0,
                  {scales[pair] + r * kTileDepth / segment * kPair, segment / kTileDepth},
                  c.data() + ((p - strip) * 2 + pair) * padded_rows * kPair);
            }
          }
        }
      }
      const int64_t first = strip * kColumns;
      store_pairs(c.data(), padded_rows, rows, min_of(cols, last * kColumns) - first,
                  bias ? bias + first : nullptr, out + first, cols);
    }
  };
  parallel(pool, ceil_div(cols, kColumns), 1, run_panels);
}

// multiply_tiles() for `a` of type T, copied and multiplied in passes that share one decoding each.
// Whether it is done: not with Levels where `a` is near an end of float32's range.
template <bool Levels, int Parts, class T, class Fill>
bool multiply_in_passes(const Pool& pool, const T* a, int64_t rows, int64_t depth, int64_t cols,
                        int64_t at_once, const Fill& fill, int64_t segment, const float* bias,
                        T* out) {
  for (int64_t m = 0; m < rows; m += kRowsPerPass) {
    const int64_t count = min_of(rows - m, kRowsPerPass);
    const TiledA<Parts> tiled(pool, a + m * depth, count, depth);
    if (Levels && !may_meet_levels(tiled.largest)) return false;
    multiply_tiles<Levels>(pool, tiled, count, depth, cols, at_once, fill, segment, bias,
                           out + m * cols);
  }
  return true;
}

}  // namespace gptj_q8::Q8_ISA
