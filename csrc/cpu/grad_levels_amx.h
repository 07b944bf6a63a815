// dx[M, K] = (dy[M, N] * scales[N]) @ levels[N, K] on AMX tiles, for columns of W that keep one
// scale in every row.
//
// For float32 and float16, whose products weights rounded to bfloat16 would spoil: dy takes the
// scales instead, and is split into three values of bfloat16, exactly, or into two, to 2^-17;
// levels are exact. One piece of work owns a strip of such columns and some rows of dx, and adds to
// each element in the order of W's rows, whatever the piece. It decodes 512 rows of W at a time.
// Blocks of 32 rows of dy by 256 of the reduction, scaled and split, meet all columns of the strip.
//
// Why this shape: 16 values take some 20 vector instructions to scale and split, and then 8 to 12
// cycles of tile instructions for each 128 columns, so the next block is scaled between those of
// this one. One thread, float32, 4096 x 4096, 512 rows: 46 ms, 56 with one after the other, 106
// without tiles. With 128 of the reduction, whose blocks the L1 cache holds, dx is loaded and
// stored twice as often: 52. dy is read once for each strip; two strips at a time gained nothing.
#pragma once

#include "fill_columns_avx512.h"
#include "gemm_amx.h"

namespace gptj_q8::Q8_ISA {

// Levels of W, unscaled.
struct FillLevelColumns {
  const Weight& w;

  // panel[p][n][0:64] = levels of W[begin + n, k + 64 p:k + 64 p + 64]; zeros in rows past the end.
  void operator()(Place place, int64_t end, uint32_t* panel) const {
    const Table table(w.codebook, as_bf16);
    walk_columns<TilePanel>(
        w, place, end, panel, [&](int64_t n, int64_t k, int64_t step, uint32_t* out) {
          __m512i levels[4] = {};
          if (n < w.rows) {
            const __m512i even = row(n, k);
            const __m512i odd = n + 1 < w.rows ? row(n + 1, k) : even;
            decode64(table, _mm512_unpacklo_epi8(even, odd), &levels[0], &levels[1]);
            decode64(table, _mm512_unpackhi_epi8(even, odd), &levels[2], &levels[3]);
          }
          for (int q = 0; q < 4; ++q) _mm512_store_si512(TilePanel::at(out, step, q), levels[q]);
        });
  }

 private:
  // 64 codes, of which each lane of 16 bytes has four of columns 0-15, of 16-31, 32-47 and 48-63:
  // in turn with another row's they decode to registers of 16 columns, in order.
  Q8_INLINE __m512i row(int64_t n, int64_t k) const {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(w.codes + n * w.cols + k));
  }
};

// Rows of dy times the scales of their columns, on their way into tiles. 16 rows are a block,
// [32 columns][part][16][32], with zeros past the ends.
template <int Parts, class T>
struct Scaling {
  static constexpr int64_t kBlock = kRun * Parts * kTileValues;

  const T* dy;
  int64_t stride;        // from row to row
  int64_t count, depth;  // rows of dy there are, and columns, up to kRun * 32
  const float* scales;   // aligned; zeros from `depth` to a multiple of 32
  bf16* tiles;
  int64_t rows;  // to do, of tiles; a multiple of 16
  int64_t row = 0, column = 0;

  Q8_INLINE int64_t left() const { return (rows - row) * ceil_div(depth, kTileDepth); }
  // 32 columns of one row each time.
  Q8_INLINE void some(int64_t times) {
    for (; times > 0 && row < rows; --times) {
      const T* source = dy + row * stride + column;
      const float* scale = scales + column;
      const int64_t n = row < count ? depth - column : 0;
      const __m512 low = _mm512_mul_ps(load16(source, first16(n)), _mm512_load_ps(scale));
      const __m512 high =
          _mm512_mul_ps(load16(source + 16, first16(n - 16)), _mm512_load_ps(scale + 16));
      bf16* block = tiles + row / kTile * kBlock + column * Parts * kTile;
      store_parts<Parts>(low, high, block + row % kTile * kTileDepth);
      column += kTileDepth;
      if (column >= depth) {
        column = 0;
        ++row;
      }
    }
  }
};

// One strip of dx from `rows` rows of dy.
template <int Parts, class T>
struct LevelStrip {
  using Rows = Scaling<Parts, T>;
  static constexpr int64_t kRunDepth = kRun * kTileDepth;

  const Weight& w;
  int64_t width;  // of a strip in columns: 64, 128 or 256
  int64_t padded_rows;
  Scratch<uint32_t> panels;
  Scratch<bf16> scaled;  // two pairs of blocks: of this turn and of the next
  Scratch<float> c;      // [pair of tiles][padded_rows][32]
  alignas(64) float scales[kRunDepth];

  LevelStrip(const Weight& weight, int64_t strip, int64_t rows)
      : w(weight),
        width(strip),
        padded_rows(ceil_div(rows, kTile) * kTile),
        panels(width / kColumns * kPanelEntries<TilePanel>),
        scaled(4 * Rows::kBlock),
        c(padded_rows * width) {}

  void run(const T* dy, int64_t rows, int64_t k, T* dx) {
    constexpr int64_t kPanelDepth = kDepth<TilePanel>;
    for (int64_t n = 0; n < w.rows; n += kRunDepth) {
      if (n % kPanelDepth == 0) {
        const int64_t depth = min_of(w.rows - n, kPanelDepth);
        FillLevelColumns{w}({k, n, width / kColumns}, n + ceil_div(depth, kTileDepth) * kTileDepth,
                            panels.data());
      }
      multiply_run(dy, rows, n, k);
    }
    store_pairs(c.data(), padded_rows, rows, width, nullptr, dx + k, w.cols);
  }

 private:
  // c (+)= dy[:, n:n + 256] @ W[n:n + 256, k:k + width]
  void multiply_run(const T* dy, int64_t rows, int64_t n, int64_t k) {
    const int64_t depth = min_of(w.rows - n, kRunDepth), blocks = ceil_div(rows, kTile);
    for (int64_t i = 0; i < kRunDepth; ++i) {
      scales[i] = i < depth ? w.absmax[block_of((n + i) * w.cols + k, w.block_shift)] : 0.0f;
    }
    const auto scaling = [&](int64_t block) {
      const int64_t row = block * kTile, to_do = min_of(blocks - block, 2) * kTile;
      return Rows{dy + row * w.rows + n, w.rows, rows - row, depth, scales, tiles_of(block), to_do};
    };
    Rows first = scaling(0);
    first.some(first.left());
    int64_t block = 0;
    for (; block + 2 <= blocks; block += 2) {
      multiply_blocks<2>(block, n, depth, scaling(block + 2));
    }
    if (block < blocks) multiply_blocks<1>(block, n, depth, scaling(blocks));
  }

  template <int Tall>
  Q8_INLINE void multiply_blocks(int64_t block, int64_t n, int64_t depth, Rows next) {
    const int64_t pairs = width / kPair, steps = ceil_div(depth, kTileDepth);
    const int64_t at_once = ceil_div(next.left(), steps * pairs);
    for (int64_t p = 0; p < pairs; ++p) {
      float* out = c.data() + (p * padded_rows + block * kTile) * kPair;
      uint32_t* panel = panels.data() + p / 2 * kPanelEntries<TilePanel>;
      n == 0 ? zero_sums<Tall>() : load_sums<Tall>(out);
      add_products<Parts, Tall>(tiles_of(block), Rows::kBlock,
                                TilePanel::at(panel, n % kDepth<TilePanel> / 2, p % 2 * 2), steps,
                                [&]() __attribute__((always_inline)) { next.some(at_once); });
      store_sums<Tall>(out);
    }
    next.some(next.left());
  }

  Q8_INLINE bf16* tiles_of(int64_t block) const { return scaled.data() + block % 4 * Rows::kBlock; }
};

// strip: columns that keep one scale in every row, from every multiple of it on; 128 or 256.
template <int Parts, class T>
void multiply_levels(const Pool& pool, const T* dy, int64_t m, const Weight& w, int64_t strip,
                     T* dx) {
  // Fewer rows decode W more often, and narrower strips scale dy more often, but no thread idles.
  int64_t rows = kRowsPerPass;
  const auto pieces = [&] { return w.cols / strip * ceil_div(m, rows); };
  while (rows > 64 && pieces() < 4 * pool.threads()) rows /= 2;
  if (strip == 256 && pieces() < pool.threads()) strip /= 2;
  const int64_t strips = w.cols / strip;
  auto run = [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    LevelStrip<Parts, T> one(w, strip, min_of(m, rows));
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / strips * rows;
      one.run(dy + row * w.rows, min_of(m - row, rows), piece % strips * strip, dx + row * w.cols);
    }
  };
  parallel(pool, pieces(), 1, run);
}

}  // namespace gptj_q8::Q8_ISA
