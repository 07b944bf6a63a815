// linear: y[M, N] = x[M, K] @ W[N, K].T + bias[N]. Chooses among the kernels and launches them.
//
// Which kernel serves what (estimates, not yet measured, from `python -m benchmarks.cuda_budget`):
// from 3 rows of x on, the multiply-adds of the kernel for few rows leave A100 and H100 short of
// their memory's bandwidth, and the tensor cores' kernel does not; T4's bandwidth leaves room for 4
// rows. Where no tensor core multiplies the type, the kernel for few rows goes to 8 in two tiles of
// 4 (the second reads w from the L2 cache); above that the plain one decodes w less often. On H100
// the wgmma kernel, where it was compiled, begins where the other would use its largest tile.
#include "kernels.h"
#include "launch_plain.cuh"
#include "linear_few_rows.cuh"
#include "linear_tensor.cuh"
#include "linear_wgmma.cuh"

namespace gptj_q8::cuda {
namespace {

constexpr int64_t kFewBesideTensor = 2;
constexpr int64_t kFewBesideNarrow = 4;
constexpr int64_t kFewAlone = 8;
constexpr int64_t kWgmmaFrom = 33;

// Calls f with the kM8 of a tensor-core kernel that is there.
template <class F>
void with_linear_m8(int m8, bool narrow, F&& f) {
  if (narrow) {
    if (m8 == 1) return f(std::integral_constant<int, 1>{}, std::true_type{});
    return f(std::integral_constant<int, 4>{}, std::true_type{});
  }
  switch (m8) {
    case 1:
      return f(std::integral_constant<int, 1>{}, std::false_type{});
    case 2:
      return f(std::integral_constant<int, 2>{}, std::false_type{});
    case 4:
      return f(std::integral_constant<int, 4>{}, std::false_type{});
    default:
      return f(std::integral_constant<int, 8>{}, std::false_type{});
  }
}

Plan plan_linear_tensor(const LinearArgs& a, const Gpu& gpu) {
  Plan plan{};
  plan.way = Way::tensor;
  int chosen_bytes = 0, step = 0;
  // The smallest tile that holds all of x, or the largest that shared memory does.
  for (int m8 = 1; m8 <= (gpu.is_narrow() ? 4 : 8); m8 *= gpu.is_narrow() ? 4 : 2) {
    int bytes = 0, this_step = 0;
    with_linear_m8(m8, gpu.is_narrow(), [&](auto rows, auto narrow) {
      using Tile = LinearTile<f16, rows, narrow>;
      bytes = Tile::kStageBytes;
      this_step = Tile::kStep;
    });
    if (stages_that_fit(gpu, bytes, 1) < 2) break;
    chosen_bytes = bytes, step = this_step, plan.tile_m = 8 * m8;
    if (a.m <= plan.tile_m) break;
  }
  plan.m_tiles = ceil_div(a.m, plan.tile_m);
  plan.tiles = plan.m_tiles * ceil_div(a.weight.rows, kLinearTileN);
  plan_tensor(gpu, plan.tile_m <= 32, chosen_bytes, ceil_div(a.weight.cols, step), &plan);
  return plan;
}

// Calls f with a kM64 of the wgmma kernel.
template <class F>
void with_m64(int tile_m, F&& f) {
  tile_m == 64 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 2>{});
}

Plan plan_wgmma(const LinearArgs& a, const Gpu& gpu) {
  Plan plan{};
  plan.way = Way::wgmma;
  plan.tile_m = a.m <= 64 ? 64 : 128;
  plan.m_tiles = ceil_div(a.m, plan.tile_m);
  plan.tiles = plan.m_tiles * ceil_div(a.weight.rows, kWgmmaTileN);
  with_m64(plan.tile_m, [&](auto m64) {
    plan_tensor(gpu, false, WgmmaTile<f16, m64>::kStageBytes, a.weight.cols / kWgmmaStep, &plan);
  });
  return plan;
}

Plan plan_few_rows(const LinearArgs& a, const Gpu& gpu) {
  Plan plan{};
  plan.way = Way::few_rows;
  plan.tile_m = a.m >= 3 ? 4 : static_cast<int>(a.m);
  plan.m_tiles = ceil_div(a.m, plan.tile_m);
  const int fit = gpu.shared_bytes / few_shared_bytes(plan.tile_m, kFewWarps);
  const int resident = fit < few_resident(plan.tile_m) ? 1 : few_resident(plan.tile_m);
  // As many blocks as run at a time, each with all its rows of w in one go.
  const int64_t blocks = ceil_div(static_cast<int64_t>(gpu.processors) * resident, plan.m_tiles);
  plan.tiles = plan.m_tiles * min_of(blocks, ceil_div(a.weight.rows, kFewStep));
  plan.splits = 1;
  return plan;
}

Plan plan_linear(const LinearArgs& a, const Gpu& gpu) {
  const bool fits =
      a.weight.cols % 16 == 0 && is_aligned_to_16(a.weight.codes) && is_aligned_to_16(a.x);
  const bool has_tensor = gpu.has_tensor_cores(a.dtype);
  const int64_t few = !has_tensor       ? kFewAlone
                      : gpu.is_narrow() ? kFewBesideNarrow
                                        : kFewBesideTensor;
  if (fits && a.m <= few) return plan_few_rows(a, gpu);
  if (fits && has_tensor && a.m >= kWgmmaFrom && a.weight.cols % kWgmmaStep == 0 &&
      has_wgmma(gpu)) {
    return plan_wgmma(a, gpu);
  }
  if (fits && has_tensor) return plan_linear_tensor(a, gpu);
  return plan_plain(gpu, a.m, a.weight.cols, a.weight.rows);
}

template <class T>
cudaError_t launch_few_rows(const Plan& plan, const T* x, const Weight& w, const Results<T>& out,
                            cudaStream_t stream) {
  int slice_warps = 1;
  while (slice_warps < kFewWarps && slice_warps * kSlice < w.cols) slice_warps *= 2;
  const auto kernel = plan.tile_m == 1   ? linear_few_rows_kernel<T, 1>
                      : plan.tile_m == 2 ? linear_few_rows_kernel<T, 2>
                                         : linear_few_rows_kernel<T, 4>;
  return launch(kernel, grid_of(plan), kFewThreads, few_shared_bytes(plan.tile_m, slice_warps),
                stream, x, w, out, static_cast<int>(plan.m_tiles), slice_warps);
}

template <class T>
cudaError_t launch_tensor(const Plan& plan, bool narrow, const T* x, const Weight& w,
                          const Results<T>& out, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_linear_m8(plan.tile_m / 8, narrow, [&](auto m8, auto as_narrow) {
    if constexpr (as_narrow && !std::is_same_v<T, f16>) {
      error = cudaErrorInvalidValue;  // sm_75 multiplies float16 only; the plan knows
    } else {
      const int shared = kTableBytes + plan.stages * LinearTile<T, m8, as_narrow>::kStageBytes;
      error = launch(linear_tensor_kernel<T, m8, as_narrow>, grid_of(plan), kTensorThreads, shared,
                     stream, x, w, out, static_cast<int>(plan.m_tiles), plan.stages);
    }
  });
  return error;
}

template <class T>
cudaError_t launch_wgmma(const Plan& plan, const T* x, const Weight& w, const Results<T>& out,
                         cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_m64(plan.tile_m, [&](auto m64) {
    const int shared = kTableBytes + plan.stages * WgmmaTile<T, m64>::kStageBytes;
    error = launch(linear_wgmma_kernel<T, m64>, grid_of(plan), kTensorThreads, shared, stream, x, w,
                   out, static_cast<int>(plan.m_tiles), plan.stages);
  });
  return error;
}

}  // namespace

bool has_wgmma(const Gpu& gpu) {
  if (gpu.capability != 90) return false;
  static const bool compiled = takes_threads(linear_wgmma_kernel<f16, 1>, kTensorThreads);
  return compiled;
}

int64_t linear_partials(const LinearArgs& a, const Gpu& gpu) {
  return partial_floats(plan_linear(a, gpu), a.m, a.weight.rows);
}

cudaError_t linear(const LinearArgs& a, const Gpu& gpu, float* partial, cudaStream_t stream) {
  const Plan plan = plan_linear(a, gpu);
  cudaError_t error = cudaSuccess;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = static_cast<const T*>(a.x);
    const Results<T> out{static_cast<T*>(a.y), partial, {a.bias, a.bias_dtype}, a.m, a.weight.rows};
    if (plan.way == Way::few_rows) {
      error = launch_few_rows(plan, x, a.weight, out, stream);
    } else if (plan.way == Way::plain) {
      error = launch_plain<T, false>(plan, x, a.weight, out, stream);
    } else if constexpr (sizeof(T) == 2) {
      error = plan.way == Way::wgmma
                  ? launch_wgmma(plan, x, a.weight, out, stream)
                  : launch_tensor(plan, gpu.is_narrow(), x, a.weight, out, stream);
    }
    if (error == cudaSuccess && plan.splits > 1) error = sum_partials(out, plan.splits, stream);
  });
  return error;
}

}  // namespace gptj_q8::cuda
