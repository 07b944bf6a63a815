// What the sources in csrc/cuda need of CUDA, for g++: they are compiled unchanged and run here.
//
// The threads of a block are fibers that run in turn, in an order that can be chosen, each until
// it waits for others. Blocks run one after another. Shared memory is a heap buffer of exactly the
// size asked for, filled with 0xff (a NaN in every float type) before each block. What a kernel
// does wrong (a barrier that some threads never reach, a misaligned vector, ...) ends the launch
// with an error that names the place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ __attribute__((always_inline)) inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Set anew whenever a fiber runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
using cudaStream_t = void*;

// The device's memory is the CPU's, and a stream is done when the call returns.
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace cuda_on_cpu {

// A line of a kernel: default arguments of the wrappers fill it in.
struct Site {
  const char* file;
  int line;
};
inline bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && a.file == b.file;
}
#define Q8_HERE ::cuda_on_cpu::Site site = {__builtin_FILE(), __builtin_LINE()}

// Ends the launch with an error; does not return.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Notes that a barrier or wait was reached; true if this run is to leave it out.
bool left_out(Site site);

// Waits until all threads of the block are here.
void wait_for_block(Site site);

// Waits until all threads of this thread's aligned group of `width` (a warp: 32, a warpgroup: 128)
// are here with their operands; the last one runs `together` over them, in the order of lanes.
using Together = void (*)(void** operands, int width);
void wait_for_group(int width, void* operands, Together together, Site site);

// The same for operands of type T, which has a static `together(T** operands, int width)`.
template <class T>
void collect(int width, T& mine, Site site) {
  wait_for_group(
      width, &mine,
      [](void** operands, int count) { T::together(reinterpret_cast<T**>(operands), count); },
      site);
}

unsigned char* shared_memory();

// Copies that a thread has started and that land when it waits for them.
void start_copy(void* to, const void* from, size_t bytes, size_t zeros, Site site);
void commit_copies();
void land_copies(int keep_groups);

// Copies that landed are for ordinary loads; wgmma may read them when the thread has shown them.
void show_copies();
void check_copies_shown(Site site);  // of all threads

// Whether this thread may pass registers to wgmma.
void set_registers_fenced(bool fenced);
void check_registers_fenced(Site site);

// Work of this thread's warpgroup that is done when it waits, if it was committed.
void start_work(std::function<void()> work);
void commit_work();
void finish_work();

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const std::function<void()>& thread);

void check_aligned(const void* p, size_t to, const char* what, Site site);

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* answer, cudaDeviceAttr what, int device);
