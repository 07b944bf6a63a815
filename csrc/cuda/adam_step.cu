// One step of Adam, as common/adam.h says, with both moments in the 8-bit format: decoded, updated
// and encoded again. A v above 0 never takes the level 0: beside an m that is not 0 it would make
// the next step divide by eps alone.
//
// param, grad, m_codes, v_codes [numel]; m_absmax, v_absmax [ceil(numel / block)]; codebooks [256];
// all dense. A block of threads owns a tile (tile.cuh). The host has checked sizes; `aligned`: the
// first four begin at multiples of 16 bytes.
// Why this shape: one pass over memory, the moments stay in registers between decoding and
// encoding.
#include "../common/adam.h"
#include "kernels.h"
#include "tile.cuh"

namespace gptj_q8::cuda {

// A moment's codes, scales and codebook.
struct Moment {
  uint8_t* codes;
  float* absmax;
  const float* codebook;
};

// The lowest level above 0, or the highest level.
__device__ __forceinline__ uint8_t smallest_positive(const float* levels) {
  int below = 0;
#pragma unroll
  for (int step = kLevels / 2; step > 0; step /= 2) {
    below += levels[below + step - 1] > 0.0f ? 0 : step;
  }
  return static_cast<uint8_t>(below);
}

template <class P, class G>
__global__ void __launch_bounds__(kThreads, 2)
    adam_step_kernel(P* param, const G* grad, Moment m, Moment v, AdamFactors factors,
                     int block_shift, int64_t numel, bool aligned) {
  float* m_levels = shared_memory<float>();
  float* v_levels = m_levels + kLevels;
  float* m_tree = v_levels + kLevels;
  float* v_tree = m_tree + kLevels;
  float* maxima = v_tree + kLevels;
  fill_levels(m_levels, m.codebook);
  fill_levels(v_levels, v.codebook);
  fill_tree(m_tree, m.codebook);
  fill_tree(v_tree, v.codebook);
  sync_threads();

  const int64_t first = run_begin(), inside = numel - first, block = block_of(first, block_shift);
  float m_values[kRun], v_values[kRun], scales[2] = {0.0f, 0.0f};
  if (inside > 0) {
    const Run<uint8_t> m_run = load_run(m.codes + first, inside, aligned);
    const Run<uint8_t> v_run = load_run(v.codes + first, inside, aligned);
    const Run<G> g_run = load_run(grad + first, inside, aligned);
    Run<P> p_run = load_run(param + first, inside, aligned);
    const float m_scale = m.absmax[block], v_scale = v.absmax[block];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      m_values[i] = product(m_levels[m_run.values[i]], m_scale);
      v_values[i] = product(v_levels[v_run.values[i]], v_scale);
      float p = widen(p_run.values[i]);
      adam_update(factors, widen(g_run.values[i]), p, m_values[i], v_values[i]);
      p_run.values[i] = narrow<P>(p);
      if (i < inside) {
        scales[0] = fmaxf(scales[0], fabsf(m_values[i]));
        scales[1] = fmaxf(scales[1], fabsf(v_values[i]));
      }
    }
    store_run(param + first, p_run, inside, aligned);
  }
  block_max(scales, block_shift, maxima);
  if (inside <= 0) return;
  if (begins_block(first, numel, block_shift)) {
    m.absmax[block] = scales[0];
    v.absmax[block] = scales[1];
  }
  const uint8_t least = smallest_positive(v_levels);
  Run<uint8_t> m_run, v_run;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    m_run.values[i] = nearest(m_tree, normalize(m_values[i], scales[0]));
    const uint8_t code = nearest(v_tree, normalize(v_values[i], scales[1]));
    v_run.values[i] = v_values[i] > 0.0f && code < least ? least : code;
  }
  store_run(m.codes + first, m_run, inside, aligned);
  store_run(v.codes + first, v_run, inside, aligned);
}

cudaError_t adam_step(const AdamArgs& a, cudaStream_t stream) {
  const Moment m{a.m_codes, a.m_absmax, a.m_codebook}, v{a.v_codes, a.v_absmax, a.v_codebook};
  const size_t shared_bytes = (4 * kLevels + 2 * kWarps) * sizeof(float);
  cudaError_t error = cudaSuccess;
  with_type(a.param_dtype, [&](auto* param_type) {
    with_type(a.grad_dtype, [&](auto* grad_type) {
      using P = std::remove_pointer_t<decltype(param_type)>;
      using G = std::remove_pointer_t<decltype(grad_type)>;
      P* param = typed(a.param, param_type);
      const G* grad = typed(a.grad, grad_type);
      error = launch(adam_step_kernel<P, G>, tiles(a.numel), kThreads, shared_bytes, stream, param,
                     grad, m, v, AdamFactors(a), a.block_shift, a.numel,
                     are_aligned(param, grad, m.codes, v.codes));
    });
  });
  return error;
}

}  // namespace gptj_q8::cuda
