// The plan and launch of product_plain.cuh, for both products.
#pragma once

#include "plan.h"
#include "product_plain.cuh"

namespace gptj_q8::cuda {

constexpr int64_t kPlainFew = 16;  // rows of x in the smaller tile, 64 in the larger

inline Plan plan_plain(const Gpu& gpu, int64_t rows, int64_t inner, int64_t outer) {
  Plan plan{};
  plan.way = Way::plain;
  plan.tile_m = rows <= kPlainFew ? PlainTile<1>::kM : PlainTile<4>::kM;
  plan.m_tiles = ceil_div(rows, plan.tile_m);
  plan.tiles = plan.m_tiles * ceil_div(outer, kPlainOuter);
  plan.splits = splits_of(gpu, 2, plan.tiles, ceil_div(inner, kPlainInner), 8);
  return plan;
}

template <class T, bool kGrad>
cudaError_t launch_plain(const Plan& plan, const T* x, const Weight& w, const Results<T>& out,
                         cudaStream_t stream) {
  const bool few = plan.tile_m == PlainTile<1>::kM;
  const auto kernel = few ? product_plain_kernel<T, 1, kGrad> : product_plain_kernel<T, 4, kGrad>;
  const int shared = few ? PlainTile<1>::kSharedBytes : PlainTile<4>::kSharedBytes;
  return launch(kernel, grid_of(plan), kPlainThreads, shared, stream, x, w, out,
                static_cast<int>(plan.m_tiles));
}

}  // namespace gptj_q8::cuda
