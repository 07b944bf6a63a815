// linear_grad_input: dx[M, K] = dy[M, N] @ W[N, K]. Chooses among the kernels and launches them.
//
// Tensor cores multiply 16-bit types (sm_75: float16 only); all else is the plain kernel's.
#include "grad_tensor.cuh"
#include "kernels.h"
#include "launch_plain.cuh"

namespace gptj_q8::cuda {
namespace {

// Rows of x in eights: of the two tiles that are there.
constexpr int kGradFew = 2, kGradMany = 8;

// Calls f with the kM8 and kNarrow of a kernel.
template <class F>
void with_grad_tile(bool few, bool narrow, F&& f) {
  const auto with_narrow = [&](auto m8) {
    narrow ? f(m8, std::true_type{}) : f(m8, std::false_type{});
  };
  few ? with_narrow(std::integral_constant<int, kGradFew>{})
      : with_narrow(std::integral_constant<int, kGradMany>{});
}

Plan plan_grad_tensor(const LinearGradInputArgs& a, const Gpu& gpu) {
  Plan plan{};
  plan.way = Way::tensor;
  const bool few = a.m <= 8 * kGradFew;
  plan.tile_m = 8 * (few ? kGradFew : kGradMany);
  plan.m_tiles = ceil_div(a.m, plan.tile_m);
  plan.tiles = plan.m_tiles * ceil_div(a.weight.cols, kGradTileK);
  with_grad_tile(few, gpu.is_narrow(), [&](auto m8, auto narrow) {
    using Tile = GradTile<f16, m8, narrow>;
    plan_tensor(gpu, few, Tile::kStageBytes, ceil_div(a.weight.rows, Tile::kStep), &plan);
  });
  return plan;
}

Plan plan_linear_grad_input(const LinearGradInputArgs& a, const Gpu& gpu) {
  const bool fits = a.weight.cols % 16 == 0 && a.weight.rows % 8 == 0 &&
                    is_aligned_to_16(a.weight.codes) && is_aligned_to_16(a.dy);
  if (fits && gpu.has_tensor_cores(a.dtype)) {
    const Plan plan = plan_grad_tensor(a, gpu);
    if (plan.stages >= 2) return plan;
  }
  return plan_plain(gpu, a.m, a.weight.rows, a.weight.cols);
}

template <class T>
cudaError_t launch_grad_tensor(const Plan& plan, bool narrow, const T* dy, const Weight& w,
                               const Results<T>& out, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_grad_tile(plan.tile_m == 8 * kGradFew, narrow, [&](auto m8, auto as_narrow) {
    if constexpr (as_narrow && !std::is_same_v<T, f16>) {
      error = cudaErrorInvalidValue;  // sm_75 multiplies float16 only; the plan knows
    } else {
      const int shared = kTableBytes + plan.stages * GradTile<T, m8, as_narrow>::kStageBytes;
      error = launch(grad_tensor_kernel<T, m8, as_narrow>, grid_of(plan), kTensorThreads, shared,
                     stream, dy, w, out, static_cast<int>(plan.m_tiles), plan.stages);
    }
  });
  return error;
}

}  // namespace

int64_t linear_grad_input_partials(const LinearGradInputArgs& a, const Gpu& gpu) {
  return partial_floats(plan_linear_grad_input(a, gpu), a.m, a.weight.cols);
}

cudaError_t linear_grad_input(const LinearGradInputArgs& a, const Gpu& gpu, float* partial,
                              cudaStream_t stream) {
  const Plan plan = plan_linear_grad_input(a, gpu);
  cudaError_t error = cudaSuccess;
  with_type(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* dy = static_cast<const T*>(a.dy);
    const Results<T> out{static_cast<T*>(a.dx), partial, {nullptr, a.dtype}, a.m, a.weight.cols};
    if (plan.way == Way::plain) {
      error = launch_plain<T, true>(plan, dy, a.weight, out, stream);
    } else if constexpr (sizeof(T) == 2) {
      error = launch_grad_tensor(plan, gpu.is_narrow(), dy, a.weight, out, stream);
    }
    if (error == cudaSuccess && plan.splits > 1) error = sum_partials(out, plan.splits, stream);
  });
  return error;
}

}  // namespace gptj_q8::cuda
