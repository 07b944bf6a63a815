// Fills panels of gemm_avx512.h for linear: 64 rows of W side by side, transposed, so that rows of
// W lie along the registers.
//
// Why this shape: bytes are four times cheaper to transpose than what they decode to. 16 rows by 16
// codes are four registers, which two rounds of unpacking turn into eight pairs of columns, already
// in the order in which decode64 emits pairs.
#pragma once

#include "gemm_avx512.h"

namespace gptj_q8::Q8_ISA {

constexpr int kGroup = 16;  // rows of W in one register of a panel
constexpr int kChunk = 16;  // codes of each row decoded together

// The scales of 16 rows times 16 columns: one vector for all columns (stride 0) where no block
// ends inside, else one per column (stride 16). A row's block ends inside at most once.
struct Scales {
  alignas(64) float values[kChunk * kGroup];
  alignas(64) float current[kGroup];  // of the block that column `k` of each row lies in
  int64_t ends[kGroup];               // the column that block ends before
  int stride;

  // Before the first columns of rows n...; rows past the end get 0.
  Q8_INLINE void start(const Weight& w, int64_t n, int64_t k) {
    for (int i = 0; i < kGroup; ++i) {
      current[i] = 0.0f;
      ends[i] = w.cols;
      if (n + i < w.rows) set(w, n, i, k);
    }
  }

  // Columns k...; columns past the end get any finite scale of W.
  Q8_INLINE void load(const Weight& w, int64_t n, int64_t k) {
    stride = 0;
    for (int i = 0; i < kGroup; ++i) {
      if (ends[i] <= k && ends[i] < w.cols) set(w, n, i, k);
      stride |= ends[i] < min_of(k + kChunk, w.cols) ? kGroup : 0;
    }
    const __m512 all = _mm512_load_ps(current);
    _mm512_store_ps(values, all);
    if (stride == 0) return;
    for (int j = 1; j < kChunk; ++j) _mm512_store_ps(values + j * kGroup, all);
    for (int i = 0; i < kGroup; ++i) {
      if (ends[i] >= min_of(k + kChunk, w.cols)) continue;
      const int64_t first = ends[i] - k;
      set(w, n, i, ends[i]);
      for (int64_t j = first; j < kChunk; ++j) values[j * kGroup + i] = current[i];
    }
  }
  Q8_INLINE __m512 at(int column) const { return _mm512_load_ps(values + column * stride); }

 private:
  Q8_INLINE void set(const Weight& w, int64_t n, int i, int64_t k) {
    const int64_t flat = (n + i) * w.cols + k;
    current[i] = w.absmax[block_of(flat, w.block_shift)];
    ends[i] = min_of(w.cols, k + block_end(flat, w.block_shift) - flat);
  }
};

// 16 rows, `stride` bytes apart, of 16 codes -> four registers; register v holds the pairs of
// columns 4v, 4v + 1 and 4v + 2, 4v + 3, in the byte order of decode64.
Q8_INLINE void transpose_pairs(const uint8_t* rows, int64_t stride, __m512i (&out)[4]) {
  __m512i z[4];
  for (int a = 0; a < 4; ++a) {
    const auto row = [&](int q) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(rows + (4 * q + a) * stride));
    };
    z[a] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
    z[a] = _mm512_inserti32x4(z[a], row(2), 2);
    z[a] = _mm512_inserti32x4(z[a], row(3), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi16(z[0], z[1]);
  const __m512i low23 = _mm512_unpacklo_epi16(z[2], z[3]);
  const __m512i high01 = _mm512_unpackhi_epi16(z[0], z[1]);
  const __m512i high23 = _mm512_unpackhi_epi16(z[2], z[3]);
  out[0] = _mm512_unpacklo_epi32(low01, low23);
  out[1] = _mm512_unpackhi_epi32(low01, low23);
  out[2] = _mm512_unpacklo_epi32(high01, high23);
  out[3] = _mm512_unpackhi_epi32(high01, high23);
}

// Calls emit(group, k, codes) for 16 rows of W and 16 columns after another, rows n + 16 *
// group..., columns k..., the codes as transpose_pairs leaves them. before(group) comes ahead of
// its columns. Rows past the end have code 0.
template <int64_t Depth, class Before, class Emit>
Q8_INLINE void walk_rows(const Weight& w, Place place, int64_t end, Place next,
                         const Before& before, const Emit& emit) {
  const int64_t n = place.column, begin = place.begin;
  // One row after another into local memory first: reading 16 rows in turn, 4096 bytes apart,
  // would throw each other's cache lines out.
  constexpr int64_t kStride = Depth + 64;
  alignas(64) uint8_t local[kGroup * kStride];
  const int64_t used = min_of(end, w.cols) - begin;
  const int64_t chunks = ceil_div(used, kChunk);
  for (int group = 0; group < kColumns / kGroup; ++group) {
    const int64_t first = n + group * kGroup;
    for (int i = 0; i < kGroup; ++i) {
      uint8_t* row = local + i * kStride;
      const int64_t present = first + i < w.rows ? used : 0;
      if (present > 0) std::memcpy(row, w.codes + (first + i) * w.cols + begin, present);
      if (present < chunks * kChunk) std::memset(row + present, 0, chunks * kChunk - present);
    }
    // The codes that the next group will copy: lines of 64 bytes, four for each chunk here.
    const bool last_group = group + 1 == kColumns / kGroup;
    const int64_t next_row = last_group ? next.column : first + kGroup;
    const uint8_t* ahead =
        w.codes + min_of(next_row, w.rows - 1) * w.cols + (last_group ? next.begin : begin);
    const int64_t lines = chunks / 4;
    int64_t line = 0, line_row = 0;
    before(group);
    for (int64_t c = 0; c < chunks; ++c) {
      for (int i = 0; i < 4 && line_row < kGroup; ++i) {
        prefetch(ahead, line_row * w.cols + line * 64);
        if (++line >= lines) {
          line = 0;
          ++line_row;
        }
      }
      __m512i codes[4];
      transpose_pairs(local + c * kChunk, kStride, codes);
      for (__m512i& each : codes) each = order_pairs(each);
      emit(group, begin + c * kChunk, codes);
    }
  }
}

// Levels times scales, rounded to what the panel holds.
template <class P, bool Wide>
struct FillRows {
  static constexpr int64_t kPanels = 1;
  const Weight& w;
  bool aligned;  // blocks start where rows do, so none ends inside a chunk

  explicit FillRows(const Weight& weight)
      : w(weight), aligned(weight.cols % (int64_t{1} << weight.block_shift) == 0) {}

  // panel[k][0:64] = W[n:n + 64, begin + k]
  void operator()(Place place, int64_t end, Place next, uint32_t* panel) const {
    const int64_t n = place.column, begin = place.begin;
    const FloatTable table(w.codebook);
    Scales scales;
    int64_t scaled_to = 0;  // the scales in hand serve columns below this one
    const auto before = [&](int group) {
      scaled_to = 0;
      scales.start(w, n + group * kGroup, begin);
    };
    walk_rows<kDepth<P>>(
        w, place, end, next, before, [&](int group, int64_t k, const __m512i(&codes)[4]) {
          if (!aligned || k >= scaled_to) {
            scales.load(w, n + group * kGroup, k);
            scaled_to = block_end(k, w.block_shift);
          }
          for (int v = 0; v < 4; ++v) {
            __m512i up[2], down[2] = {};
            decode64(table.upper, codes[v], &up[0], &up[1]);
            if constexpr (Wide) decode64(table.lower, codes[v], &down[0], &down[1]);
            for (int h = 0; h < 2; ++h) {
              store(up[h], down[h], scales, k - begin, 4 * v + 2 * h, group, panel);
            }
          }
        });
    // Zeros meet these columns in the other factor, which an Inf would make NaN.
    for (int64_t k = min_of(end, w.cols); k < end; ++k) {
      for (int group = 0; group < kColumns / kGroup; ++group) {
        clear(P::at(panel, (k - begin) / P::kWidth, group), (k - begin) % P::kWidth);
      }
    }
  }

 private:
  // Entry `part` of those that lie side by side.
  static Q8_INLINE void clear(uint32_t* out, int64_t part) {
    constexpr uint32_t kMask = P::kWidth == 1 ? ~uint32_t{0} : 0xffffu;
    const __m512i others = _mm512_set1_epi32(static_cast<int>(~(kMask << (16 * part))));
    _mm512_store_si512(out, _mm512_and_si512(_mm512_load_si512(out), others));
  }
  // Columns `column` and `column + 1` of the chunk at k.
  static Q8_INLINE void store(__m512i upper, __m512i lower, const Scales& scales, int64_t k,
                              int column, int group, uint32_t* panel) {
    __m512 even, odd;
    widen<Wide>(upper, lower, &even, &odd);
    even = _mm512_mul_ps(even, scales.at(column));
    odd = _mm512_mul_ps(odd, scales.at(column + 1));
    uint32_t* out = P::at(panel, (k + column) / P::kWidth, group);
    if constexpr (P::kWidth == 2) {
      _mm512_store_si512(out, P::pairs(even, odd));
    } else {
      _mm512_store_ps(reinterpret_cast<float*>(out), even);
      _mm512_store_ps(reinterpret_cast<float*>(P::at(panel, k + column + 1, group)), odd);
    }
  }
};

}  // namespace gptj_q8::Q8_ISA
