// Every instruction that CUDA C++ has no operator for, each behind one name. On the CPU the same
// names come from tests/cuda_on_cpu/primitives_on_cpu.h, which says what each computes. Kernels
// use these names only: no inline PTX, no intrinsic, no <<<>>> and no __shared__ of their own.
// Hopper's tensor cores stand in wgmma.cuh.
//
// Instructions that a GPU lacks compile to a trap; the host never launches a kernel there that
// needs them.
#pragma once

#include "../common/types.h"
#include "platform.h"

#if defined(Q8_CUDA_ON_CPU)
#include "primitives_on_cpu.h"
#else

#include <cassert>

namespace gptj_q8::cuda {

// The one launch. Queues kernel<<<grid, threads, shared_bytes, stream>>>(arguments...).
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, A... arguments) {
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  // clang-format on
  return cudaGetLastError();
}

// Whether a block of so many threads may run a kernel: its launch bounds, in the code that this GPU
// has taken, say so.
template <class... P>
bool takes_threads(void (*kernel)(P...), int threads) {
  cudaFuncAttributes found{};
  const void* what = reinterpret_cast<const void*>(kernel);
  return cudaFuncGetAttributes(&found, what) == cudaSuccess && found.maxThreadsPerBlock >= threads;
}

// The one way to shared memory: the start of what the launch asked for.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char q8_shared[];
  return reinterpret_cast<T*>(q8_shared);
}

__device__ __forceinline__ void sync_threads() {
  __syncthreads();
}
__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}

// All 32 lanes take part.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}

// 16 bytes of what no kernel writes meanwhile (ld.global.nc), or of what is read once
// (ld.global.cs). Aligned to 16.
__device__ __forceinline__ uint4 load_cached_16(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}
__device__ __forceinline__ uint4 load_streaming_16(const void* p) {
  return __ldcs(static_cast<const uint4*>(p));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// cp.async: 16 bytes from global to shared memory, or zeros where not `inside`; lands at the
// wait. sm_75 copies at once.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = inside ? load_cached_16(from) : uint4{0, 0, 0, 0};
#endif
}
// The same for 4 bytes that are there.
__device__ __forceinline__ void copy_async_4(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#else
  *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Waits until all but the newest `Groups` committed groups of this thread have landed.
template <int Groups>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Groups) : "memory");
#endif
}

__device__ __forceinline__ void device_assert(bool holds, const char*) {
  assert(holds);
}

__device__ __forceinline__ void atomic_add(int64_t* p, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
// For values that are not negative: their bits are ordered as they are.
__device__ __forceinline__ void atomic_max_positive(float* p, float value) {
  atomicMax(reinterpret_cast<int*>(p), __float_as_int(value));
}

// Rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
// Half to even.
__device__ __forceinline__ int64_t round_to_integer(float a) {
  return __float2ll_rn(a);
}

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ float widen(bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float widen(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(result) : "h"(value.bits));
  return result;
}

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float value) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float value) {
  bf16 result;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(result.bits) : "f"(value));
#else
  from_float(value, &result);
#endif
  return result;
}

// Two values in a register, `low` in its low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return static_cast<uint32_t>(narrow<T>(low).bits) | static_cast<uint32_t>(narrow<T>(high).bits)
                                                          << 16;
}
#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
#endif
template <class T>
__device__ __forceinline__ float unpack(uint32_t pair, int which) {
  return widen(T{static_cast<uint16_t>(pair >> (16 * which))});
}

// D[16, 8] += A[16, 16] @ B[16, 8] of a warp, T f16 or bf16, sums in float32. sm_80 and later.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]);
#if __CUDA_ARCH__ >= 800
#define Q8_MMA_16816(type)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else
#define Q8_MMA_16816(type) __trap()
#endif
template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  Q8_MMA_16816("f16");
}
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  Q8_MMA_16816("bf16");
}
#undef Q8_MMA_16816

// D[16, 8] += A[16, 8] @ B[8, 8] in float16. sm_75 and later.
__device__ __forceinline__ void mma_16x8x8_f16(float (&d)[4], const uint32_t (&a)[2],
                                               const uint32_t& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
      " {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// ldmatrix: Count 8x8 matrices of 16-bit values from shared memory; lane l gives the address of
// row l % 8 of matrix l / 8, aligned to 16.
template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[1], const void* row) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
                 : "=r"(r[0])
                 : "r"(shared_address(row))
                 : "memory");
  }
}
template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
  }
}
template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

}  // namespace gptj_q8::cuda

#endif
