// Rows of the first factor of a product on AMX tiles, in the order in which gemm_amx.h reads them;
// a value of float16 as the sum of two in bfloat16, of float32 as that of three, exactly.
#pragma once

#include "primitives_avx512.h"

namespace gptj_q8::Q8_ISA {

constexpr int kTile = 16;       // rows of a, columns of B
constexpr int kTileDepth = 32;  // of the reduction
constexpr int64_t kTileValues = kTile * kTileDepth;
constexpr int64_t kRun = 8;  // tiles of the reduction that all rows go past before the next come

// Part p of 32 values to row + p * kTileValues: what bfloat16 holds of what the parts before it
// lack.
template <int Parts>
Q8_INLINE void store_parts(__m512 low, __m512 high, bf16* row) {
  for (int p = 0; p < Parts; ++p) {
    const auto part = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_store_si512(row + p * kTileValues, part);
    low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(part)));
    high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(part, 1)));
  }
}

// a[rows, depth] in tiles: [run][16 rows][32 of depth][part][16][32], zeros past the ends. The runs
// come first, so that what meets one panel lies together: at distances of 128 KB it would fall on
// the same few lines of the L2 cache.
template <int Parts>
struct TiledA {
  int64_t blocks, steps;
  Scratch<bf16> values;
  float largest;  // magnitude in a

  template <class T>
  TiledA(const Pool& pool, const T* a, int64_t rows, int64_t depth)
      : blocks(ceil_div(rows, kTile)),
        steps(ceil_div(depth, kTileDepth)),
        values(blocks * steps * Parts * kTileValues) {
    Scratch<float> most(blocks);
    auto copy = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t count = min_of(rows - b * kTile, kTile);
        most.data()[b] = copy_block(a + b * kTile * depth, count, depth, b);
      }
    };
    parallel(pool, blocks, 1 + 2048 / depth, copy);
    largest = max_abs(most.data(), blocks);
  }

  Q8_INLINE bf16* at(int64_t block, int64_t step) const {
    const int64_t run = step / kRun * kRun;
    return values.data() + (run * blocks + step - run) * Parts * kTileValues + block * stride(step);
  }
  // Values from one block of rows to the next.
  Q8_INLINE int64_t stride(int64_t step) const {
    return min_of(steps - step / kRun * kRun, kRun) * kTileValues * Parts;
  }

 private:
  template <class T>
  float copy_block(const T* a, int64_t count, int64_t depth, int64_t block) const {
    __m512 most = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t left = depth - s * kTileDepth;
      for (int64_t i = 0; i < kTile; ++i) {
        bf16* row = at(block, s) + i * kTileDepth;
        const T* source = a + i * depth + s * kTileDepth;
        const int64_t n = i < count ? left : 0;
        const __m512 low = load16(source, first16(n)), high = load16(source + 16, first16(n - 16));
        most = _mm512_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)), most);
        if constexpr (Parts == 1) {
          const __mmask32 mask = static_cast<__mmask32>(first64(n));
          _mm512_store_si512(row, _mm512_maskz_loadu_epi16(mask, source));
        } else {
          store_parts<Parts>(low, high, row);
        }
      }
    }
    return _mm512_reduce_max_ps(most);
  }
};

}  // namespace gptj_q8::Q8_ISA
