// Tensor cores that four warps use together and that read B from shared memory: in code for sm_90a
// only. Elsewhere all of it compiles to a trap. On the CPU it is tests/cuda_on_cpu/wgmma_on_cpu.h,
// which says what each computes.
#pragma once

#include "primitives.cuh"

#if defined(Q8_CUDA_ON_CPU)
#include "wgmma_on_cpu.h"
#else

namespace gptj_q8::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#define Q8_WGMMA(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasWgmma = false;
#define Q8_WGMMA(...) __trap()
#endif

// What this thread wrote to shared memory, by cp.async too, can be read by wgmma after the next
// barrier.
__device__ __forceinline__ void fence_async_proxy() {
  Q8_WGMMA("fence.proxy.async.shared::cta;\n" :: : "memory");
}
// Before wgmma reads registers that were written.
__device__ __forceinline__ void wgmma_fence() {
  Q8_WGMMA("wgmma.fence.sync.aligned;\n" :: : "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  Q8_WGMMA("wgmma.commit_group.sync.aligned;\n" :: : "memory");
}
// Waits until all committed products are done: d can be used, and what was read be overwritten.
template <int Count>
__device__ __forceinline__ void wgmma_wait(float (&d)[Count][8][4]) {
  Q8_WGMMA("wgmma.wait_group.sync.aligned 0;\n" :: : "memory");
#pragma unroll
  for (int i = 0; i < Count * 32; ++i) {
    // No use of d is moved above the wait.
    asm volatile("" : "+f"((&d[0][0][0])[i])::"memory");
  }
}

// D[64, 64] += A[64, 16] @ B[64, 16].T of four warps, T f16 or bf16, A and D in registers, B where
// the descriptor says. Starts only: nothing of it may be touched until the wait.
template <class T>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[8][4], const uint32_t (&a)[4],
                                               uint64_t b);
#define Q8_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define Q8_WGMMA_646416(type)                                                                  \
  Q8_WGMMA("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
           " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17," \
           " %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"           \
           " {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n" : Q8_D4(0),                             \
           Q8_D4(1), Q8_D4(2), Q8_D4(3), Q8_D4(4), Q8_D4(5), Q8_D4(6), Q8_D4(7) : "r"(a[0]),   \
           "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <>
__device__ __forceinline__ void wgmma_64x64x16<f16>(float (&d)[8][4], const uint32_t (&a)[4],
                                                    uint64_t b) {
  Q8_WGMMA_646416("f16");
}
template <>
__device__ __forceinline__ void wgmma_64x64x16<bf16>(float (&d)[8][4], const uint32_t (&a)[4],
                                                     uint64_t b) {
  Q8_WGMMA_646416("bf16");
}
#undef Q8_WGMMA_646416
#undef Q8_D4
#undef Q8_WGMMA

}  // namespace gptj_q8::cuda

#endif
