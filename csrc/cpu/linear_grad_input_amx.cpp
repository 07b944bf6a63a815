// linear_grad_input on AMX tiles: dx[M, K] = dy[M, N] @ W[N, K], for more than a few rows of dy.
//
// Scales change along the reduction. bfloat16: panels hold scaled weights rounded to it. float32
// and float16: dy takes the scales and meets bare levels, where bfloat16 holds these and 128
// columns or more keep one scale in every row. All else is avx512's.
#define Q8_ISA amx
#include "registers_avx512.h"

#include "fill_columns_avx512.h"
#include "gemm_amx.h"
#include "grad_levels_amx.h"

namespace gptj_q8::amx {
namespace {

// 4096 x 4096, two threads, ms with four and with eight: 64 rows 2.7 and 2.6, 512 rows 10.6
// and 9.8.
constexpr int64_t kPanelsAtOnce = 8;

// Columns that dy, once scaled, must meet to be worth that. 4096 x 4096, one thread, avx512's time
// as a multiple of this one's, on 5, 64 and 512 rows: float32, 64 columns 0.9, 1.3, 1.1, 128
// columns 1.2, 1.8, 1.8; float16, 64 columns 0.9, 1.6, 1.7, for which there is no case of its own.
constexpr int64_t kNarrowestStrip = 128;

void multiply_weights(const LinearGradInputArgs& a, const Pool& pool, bool exact) {
  const Weight& w = a.weight;
  const auto* dy = static_cast<const bf16*>(a.dy);
  auto* dx = static_cast<bf16*>(a.dx);
  const auto run = [&](const auto& fill) {
    multiply_in_passes<false, 1>(pool, dy, a.m, w.rows, w.cols, kPanelsAtOnce, fill,
                                 kRun * kTileDepth, nullptr, dx);
  };
  exact ? run(FillColumns<TilePanel, false>{w}) : run(FillColumns<TilePanel, true>{w});
}

// Whether dx is done: not where the largest dy times the largest scale is near an end of float32's
// range.
template <class T>
bool grad_by_levels(const LinearGradInputArgs& a, const Pool& pool, int64_t strip) {
  const Weight& w = a.weight;
  const auto* dy = static_cast<const T*>(a.dy);
  if (!may_meet_levels(largest_scaled(pool, dy, a.m, w))) return false;
  constexpr int kParts = std::is_same_v<T, f16> ? 2 : 3;
  multiply_levels<kParts>(pool, dy, a.m, w, strip, static_cast<T*>(a.dx));
  return true;
}

}  // namespace

void linear_grad_input(const LinearGradInputArgs& a, const Pool& pool) {
  const Weight& w = a.weight;
  if (are_few(a.m, w)) return avx512::linear_grad_input(a, pool);
  const bool exact = bf16_exact(w.codebook);
  if (a.dtype == DType::bfloat16) return multiply_weights(a, pool, exact);
  const int64_t strip = segment_of(w);
  const bool done = exact && strip >= kNarrowestStrip &&
                    (a.dtype == DType::float32 ? grad_by_levels<float>(a, pool, strip)
                                               : grad_by_levels<f16>(a, pool, strip));
  if (!done) avx512::linear_grad_input(a, pool);
}

}  // namespace gptj_q8::amx
