// What a CPU instruction set implements: seven functions over raw pointers. They include nothing
// of PyTorch; threads come in as a Pool. All pointers are dense, all sizes are positive, and the
// binding file has checked that the arrays have the sizes stated here.
#pragma once

#include <cstdint>

#include "../common/arguments.h"

namespace gptj_q8 {

// Runs task(context, begin, end) over pieces of [0, count), in parallel; a piece of `grain` is
// about worth a thread. threads() is how many it has.
struct Pool {
  using Task = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Task task, void* context);
  int64_t (*threads)();
};

template <class F>
Q8_INLINE void parallel(const Pool& pool, int64_t count, int64_t grain, F& f) {
  pool.run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &f);
}

struct EmbeddingArgs {
  const int64_t* ids;  // [count], each in [0, rows)
  int64_t count;
  Weight weight;
  void* out;  // [count, cols] of dtype
  DType dtype;
};

// y[M, N] = x[M, K] @ W[N, K].T + bias[N], W with N rows and K columns; x and y of one dtype.
struct LinearArgs {
  const void* x;
  DType dtype;
  int64_t m;
  Weight weight;
  const float* bias;  // or null
  void* y;
};

// Whether factors of this largest magnitude may meet bare levels, with the scale applied to the
// sums, or before, to the factors: they are all zeros, or the largest is far from both ends of
// float32. Parts of those below 2^-110 may be lost. x * (level * scale) is right for any x.
Q8_INLINE bool may_meet_levels(float largest) {
  return largest == 0.0f || (largest > 0x1p-80f && largest < 0x1p100f);
}

struct Kernels {
  const char* name;
  void (*quantize)(const QuantizeArgs&, const Pool&);
  void (*histogram)(const HistogramArgs&, const Pool&);
  void (*dequantize)(const DequantizeArgs&, const Pool&);
  void (*embedding)(const EmbeddingArgs&, const Pool&);
  void (*linear)(const LinearArgs&, const Pool&);
  void (*linear_grad_input)(const LinearGradInputArgs&, const Pool&);
  void (*adam_step)(const AdamArgs&, const Pool&);
};

// The functions of one instruction set live in a namespace of its name, so that no two files
// compiled with different flags ever define one symbol.
#define Q8_DECLARE_KERNELS(isa)                                    \
  namespace isa {                                                  \
  void quantize(const QuantizeArgs&, const Pool&);                 \
  void histogram(const HistogramArgs&, const Pool&);               \
  void dequantize(const DequantizeArgs&, const Pool&);             \
  void embedding(const EmbeddingArgs&, const Pool&);               \
  void linear(const LinearArgs&, const Pool&);                     \
  void linear_grad_input(const LinearGradInputArgs&, const Pool&); \
  void adam_step(const AdamArgs&, const Pool&);                    \
  }

Q8_DECLARE_KERNELS(portable)
Q8_DECLARE_KERNELS(neon)
Q8_DECLARE_KERNELS(avx2)
Q8_DECLARE_KERNELS(avx512bw)
Q8_DECLARE_KERNELS(avx512)

// The products alone; the other functions are avx512's.
namespace amx {
void linear(const LinearArgs&, const Pool&);
void linear_grad_input(const LinearGradInputArgs&, const Pool&);
}  // namespace amx

}  // namespace gptj_q8
