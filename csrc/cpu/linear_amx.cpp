// linear on AMX tiles: y[M, N] = x[M, K] @ W[N, K].T + bias[N].
//
// A few rows of x: gemv_avx512.h, as avx512 does, but for the number of rows of W at once. More:
// the tiles of gemm_amx.h. Where bfloat16 holds the levels and blocks end at the same columns in
// all rows, panels hold bare levels and sums are scaled; this serves every dtype. Else panels hold
// weights, scaled and then rounded to bfloat16, for bfloat16. (A level rounded before it is scaled
// would err alike in every weight of that code.) All else is avx512's.
#define Q8_ISA amx
#include "registers_avx512.h"

#include "fill_rows_avx512.h"
#include "gemm_amx.h"
#include "gemv_avx512.h"

namespace gptj_q8::amx {
namespace {

// Up to how many rows of x decoding in registers beats tiles. Xeon with AMX, 4096 x 4096, two
// threads, ms in registers and in tiles: bfloat16, 4 rows 1.03 and 1.22, 5 rows 1.56 and 1.21;
// float32, 2 rows 0.99 and 1.27, 3 rows 1.31 and 1.30.
template <class T>
constexpr int64_t kFewRows = std::is_same_v<T, bf16> ? 4 : 2;
// Of W, in registers; see gemv_avx512.h. Levels in two parts leave fewer registers.
template <bool Wide>
constexpr int kRowsAtOnce = Wide ? 2 : 4;

// Few rows of x stay in the L2 cache whole; W is read best a panel after another then. 4096 x 4096,
// two threads, ms with one panel and with eight: 8 rows 1.25 and 1.40, 64 rows 1.80 and 2.06.
int64_t panels_at_once(int64_t rows) {
  return rows > 64 ? 8 : 1;
}

// Levels of W, unscaled.
struct FillLevels {
  static constexpr int64_t kPanels = 1;
  const Weight& w;

  // panel[k][0:64] = levels of W[n:n + 64, begin + k]
  void operator()(Place place, int64_t end, Place next, uint32_t* panel) const {
    const Table table(w.codebook, as_bf16);
    walk_rows<kDepth<TilePanel>>(
        w, place, end, next, [](int) {},
        [&](int group, int64_t k, const __m512i(&codes)[4]) {
          for (int v = 0; v < 4; ++v) {
            __m512i first, second;
            decode64(table, codes[v], &first, &second);
            uint32_t* out = TilePanel::at(panel, (k - place.begin) / 2 + 2 * v, group);
            _mm512_store_si512(out, first);
            _mm512_store_si512(out + 16, second);
          }
        });
  }

  // Of rows n to n + 31 at column k; 0 for rows past the end.
  Q8_INLINE void scales(int64_t n, int64_t k, float* out) const {
    for (int64_t i = 0; i < kPair; ++i) {
      out[i] = n + i < w.rows ? w.absmax[block_of((n + i) * w.cols + k, w.block_shift)] : 0.0f;
    }
  }
};

// Whether y is done.
template <bool Wide, class T>
bool linear_typed(const LinearArgs& a, const Pool& pool, const T* x, T* y) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  constexpr int kParts = kBf16 ? 1 : std::is_same_v<T, f16> ? 2 : 3;
  const Weight& w = a.weight;
  if (a.m <= kFewRows<T>) {
    if (!may_meet_levels(max_abs(x, a.m * w.cols))) return false;
    linear_few<kRowsAtOnce<Wide>, Wide>(a, pool, x, y);
    return true;
  }
  const int64_t segment = segment_of(w), at_once = panels_at_once(a.m);
  if constexpr (!Wide) {
    if (segment >= kTileDepth) {  // else a tile would hold levels of several scales
      return multiply_in_passes<true, kParts>(pool, x, a.m, w.cols, w.rows, at_once, FillLevels{w},
                                              segment, a.bias, y);
    }
  }
  if constexpr (kBf16) {
    return multiply_in_passes<false, 1>(pool, x, a.m, w.cols, w.rows, at_once,
                                        FillRows<TilePanel, Wide>(w), kRun * kTileDepth, a.bias, y);
  }
  return false;
}

}  // namespace

void linear(const LinearArgs& a, const Pool& pool) {
  const bool exact = bf16_exact(a.weight.codebook);
  bool done = false;
  with_type(a.dtype, [&](auto* t) {
    const auto* x = typed(a.x, t);
    auto* y = typed(a.y, t);
    done = exact ? linear_typed<false>(a, pool, x, y) : linear_typed<true>(a, pool, x, y);
  });
  if (!done) avx512::linear(a, pool);
}

}  // namespace gptj_q8::amx
