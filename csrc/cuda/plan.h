// How a product is cut into blocks. Host only.
#pragma once

#include "../common/format.h"
#include "gpu.h"
#include "levels.cuh"
#include "tensor.cuh"

namespace gptj_q8::cuda {

enum class Way { few_rows, tensor, wgmma, plain };

// tile_m: rows of x of a block. tiles: blocks, but for the splits of the sum. stages: of the
// tensor-core kernels.
struct Plan {
  Way way;
  int tile_m;
  int64_t m_tiles, tiles;
  int splits, stages;
};

// Floats that the partial sums of a product with so many rows and columns take.
inline int64_t partial_floats(const Plan& plan, int64_t rows, int64_t width) {
  return plan.splits == 1 ? 0 : plan.splits * rows * width;
}

// So that about `resident` blocks run on each multiprocessor, each at least `least` steps long.
// More than 16 partial sums would be more to read than w.
inline int splits_of(const Gpu& gpu, int resident, int64_t tiles, int64_t steps, int least) {
  const int64_t wanted = static_cast<int64_t>(gpu.processors) * resident / tiles;
  const int64_t most = min_of(min_of(wanted, steps / least), 16);
  return most < 1 ? 1 : static_cast<int>(most);
}

// Stages of `stage_bytes` that fit into shared memory beside the table with `resident` blocks on a
// multiprocessor; 0 or 1 where the kernel cannot run.
inline int stages_that_fit(const Gpu& gpu, int stage_bytes, int resident) {
  const int stages = (gpu.shared_bytes / resident - kTableBytes) / stage_bytes;
  return stages < kMostStages ? stages : kMostStages;
}

// Completes the plan of a tensor-core kernel. Two blocks to a multiprocessor where `two` says that
// the registers allow it and shared memory does: one decodes while the other waits for memory
// (estimate, not yet measured).
inline void plan_tensor(const Gpu& gpu, bool two, int stage_bytes, int64_t steps, Plan* plan) {
  const int resident = two && stages_that_fit(gpu, stage_bytes, 2) >= 2 ? 2 : 1;
  plan->stages = stages_that_fit(gpu, stage_bytes, resident);
  plan->splits = splits_of(gpu, resident, plan->tiles, steps, 4);
}

inline bool is_aligned_to_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

inline dim3 grid_of(const Plan& plan) {
  return dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits));
}

}  // namespace gptj_q8::cuda
