// The arithmetic of the format, shared by host and device code.
//
//   w[i] = codebook[codes[i]] * absmax[i / block_size],   i the flat row-major index
//
// codes      uint8, the weight's own shape
// absmax     float32, ceil(numel / block_size)
// codebook   float32[256], ascending
// block_size a power of two, 32 to 4096, passed around as its logarithm `block_shift`
//
// Everything here is forced inline: the same function is compiled into files with different
// instruction sets, and the linker must never pick one copy for all of them.
#pragma once

#include <cstdint>

#define Q8_HOST_INLINE __attribute__((always_inline)) inline
#if defined(__CUDACC__)
#define Q8_INLINE __host__ __device__ __forceinline__
#else
#define Q8_INLINE Q8_HOST_INLINE
#endif

namespace gptj_q8 {

constexpr int kLevels = 256;
constexpr int kMinBlock = 32;
constexpr int kMaxBlock = 4096;

Q8_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
Q8_INLINE int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}

Q8_INLINE int64_t block_of(int64_t flat, int block_shift) {
  return flat >> block_shift;
}

// a * b rounded by itself: no compiler makes a fused multiply-add of it and a sum.
Q8_INLINE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;  // the host's files are compiled with -ffp-contract=off
#endif
}

// First flat index after the block that holds `flat`.
Q8_INLINE int64_t block_end(int64_t flat, int block_shift) {
  return ((flat >> block_shift) + 1) << block_shift;
}

// The boundary between two neighbouring levels: a value at or below it takes the lower one.
Q8_INLINE float midpoint(float low, float high) {
  return (low + high) * 0.5f;
}

// w / absmax as a true division; 0 in a block of zeros.
Q8_INLINE float normalize(float w, float absmax) {
  return absmax == 0.0f ? 0.0f : w / absmax;
}

// Weight of a block in the histogram: rint(2^30 * (absmax / largest)^2) of a squared float32.
constexpr float kHistogramUnit = 1073741824.0f;

// Bin of a normalized value r in [-1, 1]; half_bins = bins / 2, both exact as float32. Clamped
// before the conversion, so that a NaN lands in bin 0 instead of being undefined.
Q8_INLINE int32_t histogram_bin(float r, float half_bins, float last_bin) {
  float position = (r + 1.0f) * half_bins;
  position = position > 0.0f ? position : 0.0f;
  return static_cast<int32_t>(position < last_bin ? position : last_bin);
}

}  // namespace gptj_q8
