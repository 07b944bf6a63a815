// Fills panels of gemm_avx512.h for linear_grad_input: rows of W already lie along the registers,
// so that it needs no transposition, only neighbouring rows side by side for pairs.
#pragma once

#include "gemm_avx512.h"

namespace gptj_q8::Q8_ISA {

// Whether linear_grad_input does without panels, which cost a store and M loads for each register.
// Blocks of 32 would fill half of each register: Zen 5, 4096 x 4096, M = 4, one thread, 4.5 ms.
constexpr int64_t kFewRows = 4;
Q8_INLINE bool are_few(int64_t rows, const Weight& w) {
  return rows <= kFewRows && w.block_shift > 5;
}

// What no element of dy times a scale exceeds in magnitude.
template <class T>
float largest_scaled(const Pool& pool, const T* dy, int64_t m, const Weight& w) {
  const int64_t blocks = ceil_div(w.rows * w.cols, int64_t{1} << w.block_shift);
  return max_abs(pool, dy, m * w.rows) * max_abs(pool, w.absmax, blocks);
}

// 64 columns of one row of W, scaled; a row past the end is zeros.
template <bool Wide>
Q8_INLINE void decode_row(const FloatTable& table, const Weight& w, int64_t n, int64_t k,
                          __m512 (&out)[4]) {
  if (n >= w.rows) {
    for (__m512& v : out) v = _mm512_setzero_ps();
    return;
  }
  const int64_t flat = n * w.cols + k;
  const int64_t count = min_of(64, w.cols - k);
  const __m512i raw = _mm512_maskz_loadu_epi8(first64(count), w.codes + flat);
  table.decode<Wide>(order32(raw), out);
  const int64_t block = block_of(flat, w.block_shift);
  if (block == block_of(flat + count - 1, w.block_shift)) {
    const __m512 scale = _mm512_set1_ps(w.absmax[block]);
    for (__m512& v : out) v = _mm512_mul_ps(v, scale);
    return;
  }
  if (flat % 16 == 0) {  // blocks end between registers
    for (int q = 0; q < 4; ++q) {
      const int64_t inside = min_of(flat + 16 * q, flat + count - 1);
      out[q] = _mm512_mul_ps(out[q], _mm512_set1_ps(w.absmax[block_of(inside, w.block_shift)]));
    }
    return;
  }
  alignas(64) float scale[64] = {};
  for (int64_t i = 0; i < count; ++i) scale[i] = w.absmax[block_of(flat + i, w.block_shift)];
  for (int q = 0; q < 4; ++q) out[q] = _mm512_mul_ps(out[q], _mm512_load_ps(scale + 16 * q));
}

// Calls emit(n, k, step, panel) for each step of a place and each of its panels: rows n to
// n + P::kWidth - 1 of W, columns k to k + 63.
template <class P, class Emit>
Q8_INLINE void walk_columns(const Weight& w, Place place, int64_t end, uint32_t* panels,
                            const Emit& emit) {
  // Each row lies in another page, which no hardware prefetcher follows.
  constexpr int64_t kAhead = 16;
  for (int64_t n = place.begin; n < end; n += P::kWidth) {
    for (int64_t p = 0; p < place.panels; ++p) {
      const int64_t k = place.column + p * kColumns;
      for (int64_t i = 0; i < P::kWidth; ++i) prefetch(w.codes, (n + i + kAhead) * w.cols + k);
      emit(n, k, (n - place.begin) / P::kWidth, panels + p * kPanelEntries<P>);
    }
  }
}

// Up to four panels: 256 bytes of a row. Xeon with AMX, two threads that only read, rows 4096 bytes
// apart: 8.4 GB/s for 64 bytes of each row, 15 for 128, 17.6 for 256, 18.9 for 512.
template <class P, bool Wide>
struct FillColumns {
  static constexpr int64_t kPanels = 4;
  const Weight& w;

  // panel[p][n][0:64] = W[begin + n, k + 64 p:k + 64 p + 64]
  void operator()(Place place, int64_t end, Place, uint32_t* panel) const {
    const FloatTable table(w.codebook);
    walk_columns<P>(w, place, end, panel, [&](int64_t n, int64_t k, int64_t step, uint32_t* out) {
      __m512 even[4];
      decode_row<Wide>(table, w, n, k, even);
      if constexpr (P::kWidth == 2) {
        __m512 odd[4];
        decode_row<Wide>(table, w, n + 1, k, odd);
        for (int q = 0; q < 4; ++q) {
          _mm512_store_si512(P::at(out, step, q), P::pairs(even[q], odd[q]));
        }
      } else {
        for (int q = 0; q < 4; ++q) {
          _mm512_store_ps(reinterpret_cast<float*>(P::at(out, step, q)), even[q]);
        }
      }
    });
  }
};

}  // namespace gptj_q8::Q8_ISA
