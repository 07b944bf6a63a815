// linear_grad_input on AMX tiles: dx[M, K] = dy[M, N] @ W[N, K], for more than a few rows of
// bfloat16 dy; scales change along the reduction, so panels hold scaled weights rounded to
// bfloat16. All else is avx512's.
#define Q8_ISA amx
#include "registers_avx512.h"

#include "fill_columns_avx512.h"
#include "gemm_amx.h"

namespace gptj_q8::amx {
namespace {

// 4096 x 4096, two threads, ms with four and with eight: 64 rows 2.7 and 2.6, 512 rows 10.6
// and 9.8.
constexpr int64_t kPanelsAtOnce = 8;

}  // namespace

void linear_grad_input(const LinearGradInputArgs& a, const Pool& pool) {
  const Weight& w = a.weight;
  if (a.dtype != DType::bfloat16 || are_few(a.m, w)) return avx512::linear_grad_input(a, pool);
  const auto* dy = static_cast<const bf16*>(a.dy);
  auto* dx = static_cast<bf16*>(a.dx);
  const bool exact = bf16_exact(w.codebook);
  const auto run = [&](const auto& fill) {
    multiply_in_passes<false, 1>(pool, dy, a.m, w.rows, w.cols, kPanelsAtOnce, fill,
                                 kRun * kTileDepth, nullptr, dx);
  };
  exact ? run(FillColumns<TilePanel, false>{w}) : run(FillColumns<TilePanel, true>{w});
}

}  // namespace gptj_q8::amx
