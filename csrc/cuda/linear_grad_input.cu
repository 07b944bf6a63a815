// linear_grad_input: dx[M, K] = dy[M, N] @ W[N, K]. Chooses among the kernels and launches them.
//
// Tensor cores multiply 16-bit types from sm_80 on (sm_75 has no room in shared memory for both
// the lanes' tables and this kernel's stages); all else is the plain kernel's.
#include "grad_tensor.cuh"
#include "kernels.h"
#include "launch_plain.cuh"

namespace gptj_q8::cuda {
namespace {

// Rows of x in eights: of the two tiles that are there.
constexpr int kGradFew = 2, kGradMany = 8;

Plan plan_grad_tensor(const LinearGradInputArgs& a, const Gpu& gpu) {
  Plan plan{};
  plan.way = Way::tensor;
  const bool few = a.m <= 8 * kGradFew;
  plan.tile_m = 8 * (few ? kGradFew : kGradMany);
  plan.m_tiles = ceil_div(a.m, plan.tile_m);
  plan.tiles = plan.m_tiles * ceil_div(a.weight.cols, kGradTileK);
  using Few = GradTile<f16, kGradFew>;
  using Many = GradTile<f16, kGradMany>;
  static_assert(Few::kStep == Many::kStep);
  plan_tensor(gpu, few, few ? Few::kStageBytes : Many::kStageBytes,
              ceil_div(a.weight.rows, Few::kStep), &plan);
  return plan;
}

Plan plan_linear_grad_input(const LinearGradInputArgs& a, const Gpu& gpu) {
  const bool fits = a.weight.cols % 16 == 0 && a.weight.rows % 8 == 0 &&
                    is_aligned_to_16(a.weight.codes) && is_aligned_to_16(a.dy);
  if (fits && a.dtype != DType::float32 && gpu.capability >= 80) {
    const Plan plan = plan_grad_tensor(a, gpu);
    if (plan.stages >= 2) return plan;
  }
  return plan_plain(gpu, a.m, a.weight.rows, a.weight.cols);
}

template <class T>
cudaError_t launch_grad_tensor(const Plan& plan, const T* dy, const Weight& w,
                               const Results<T>& out, cudaStream_t stream) {
  const bool few = plan.tile_m == 8 * kGradFew;
  const auto kernel = few ? grad_tensor_kernel<T, kGradFew> : grad_tensor_kernel<T, kGradMany>;
  const int stage = few ? GradTile<T, kGradFew>::kStageBytes : GradTile<T, kGradMany>::kStageBytes;
  return launch(kernel, grid_of(plan), kTensorThreads, kTableBytes + plan.stages * stage, stream,
                dy, w, out, static_cast<int>(plan.m_tiles), plan.stages);
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
      error = launch_grad_tensor(plan, dy, a.weight, out, stream);
    }
    if (error == cudaSuccess && plan.splits > 1) error = sum_partials(out, plan.splits, stream);
  });
  return error;
}

}  // namespace gptj_q8::cuda
