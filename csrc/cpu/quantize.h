// quantize:  absmax[b] = max |w| over block b
//            codes[i]  = number of midpoints of the codebook below w[i] / absmax[b]
// histogram: counts[bin(w[i] / absmax[b])] += rint(2^30 * (absmax[b] / max absmax)^2)
//
// weight [numel], codes [numel], absmax [ceil(numel / block)], counts [bins]; all dense.
// One piece of work owns a range of blocks; the last block may be short. The host has checked
// sizes; a NaN in a weight gives some valid code and bin.
// Why this shape: a block (at most 16 KB) is read twice, the second time from the L1 cache. The
// histogram adds integers, so the order in which threads merge their counts does not matter.
//
// Included by one file per instruction set, which defines Q8_ISA and its building blocks first.
#pragma once

#include <cmath>

#include "kernels.h"
#include "scratch.h"

namespace gptj_q8::Q8_ISA {

// Enough elements for a thread to be worth waking: about 10 microseconds of encoding.
constexpr int64_t kElementsPerTask = 32768;

Q8_INLINE int64_t blocks_per_task(int block_shift) {
  const int64_t blocks = kElementsPerTask >> block_shift;
  return blocks < 1 ? 1 : blocks;
}

template <class T>
void quantize_typed(const QuantizeArgs& a, const Pool& pool, const T* weight) {
  const Encoder encoder(a.codebook);
  auto encode_blocks = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b << a.block_shift;
      const int64_t n = min_of(a.numel, block_end(first, a.block_shift)) - first;
      a.absmax[b] = max_abs(weight + first, n);
      encoder.run(weight + first, n, a.absmax[b], a.codes + first);
    }
  };
  const int64_t blocks = ceil_div(a.numel, int64_t{1} << a.block_shift);
  parallel(pool, blocks, blocks_per_task(a.block_shift), encode_blocks);
}

template <class T>
void histogram_typed(const HistogramArgs& a, const Pool& pool, const T* weight) {
  const int64_t blocks = ceil_div(a.numel, int64_t{1} << a.block_shift);
  auto find_absmax = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b << a.block_shift;
      a.absmax[b] = max_abs(weight + first, min_of(a.numel - first, int64_t{1} << a.block_shift));
    }
  };
  parallel(pool, blocks, blocks_per_task(a.block_shift), find_absmax);

  float largest = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) largest = largest < a.absmax[b] ? a.absmax[b] : largest;
  if (largest == 0.0f) return;

  auto count_blocks = [&](int64_t begin, int64_t end) {
    int32_t bin[kMaxBlock];
    Scratch<int64_t> counts(a.bins);
    for (int64_t i = 0; i < a.bins; ++i) counts.data()[i] = 0;
    for (int64_t b = begin; b < end; ++b) {
      if (a.absmax[b] == 0.0f) continue;
      const float s = a.absmax[b] / largest;
      const float square = s * s;  // NaN where a weight is not finite
      const int64_t q =
          square <= 1.0f ? static_cast<int64_t>(std::rint(square * kHistogramUnit)) : 0;
      const int64_t first = b << a.block_shift;
      const int64_t n = min_of(a.numel - first, int64_t{1} << a.block_shift);
      histogram_bins(weight + first, n, a.absmax[b], a.bins, bin);
      for (int64_t i = 0; i < n; ++i) counts.data()[bin[i]] += q;
    }
    for (int64_t i = 0; i < a.bins; ++i) {
      if (counts.data()[i] != 0) {
        __atomic_fetch_add(&a.counts[i], counts.data()[i], __ATOMIC_RELAXED);
      }
    }
  };
  // Coarser pieces than above: each one clears and merges its own counts.
  const int64_t grain = blocks_per_task(a.block_shift) + (a.bins >> a.block_shift);
  parallel(pool, blocks, grain, count_blocks);
}

void quantize(const QuantizeArgs& a, const Pool& pool) {
  with_type(a.dtype, [&](auto* t) { quantize_typed(a, pool, typed(a.weight, t)); });
}

void histogram(const HistogramArgs& a, const Pool& pool) {
  with_type(a.dtype, [&](auto* t) { histogram_typed(a, pool, typed(a.weight, t)); });
}

}  // namespace gptj_q8::Q8_ISA
