// Kernels that are wrong on purpose, to show that the emulation notices.
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/cuda/wgmma.cuh"

namespace gptj_q8::cuda {
namespace {

void misaligned_load(const unsigned char* p, float* out) {
  *out = static_cast<float>(load_cached_16(p + 4).x);
}

void barrier_in_one_branch(float*) {
  if (threadIdx.x < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
}

void thread_that_leaves_early(float*) {
  if (threadIdx.x == 5) return;
  sync_threads();
}

void copy_never_waited_for(const unsigned char* p, float*) {
  copy_async_16(shared_memory<unsigned char>() + 16 * threadIdx.x, p, true);
  copy_async_commit();
}

void copy_read_at_once(const unsigned char* p, float* out) {
  float* here = shared_memory<float>() + 4 * threadIdx.x;
  copy_async_16(here, p, true);
  copy_async_commit();
  *out = here[0];
  copy_async_wait<0>();
}

enum class Wrong { read, factor, tile, fence, wait };

// 64 rows of 128 bytes as x, the thread's number as w.
void wgmma_gone_wrong(const unsigned char* p, float* out, Wrong wrong) {
  unsigned char* tile = shared_memory<unsigned char>();
  uint32_t a[4] = {threadIdx.x, 0, 0, 0};
  float d[1][8][4] = {};
  for (int i = 0; i < 4; ++i) copy_async_16(tile + 16 * (4 * threadIdx.x + i), p, true);
  copy_async_commit();
  copy_async_wait<0>();
  if (wrong != Wrong::fence) fence_async_proxy();
  sync_threads();
  wgmma_fence();
  wgmma_64x64x16<f16>(d[0], a, uint64_t{1} << 62 | uint64_t{64} << 32);
  wgmma_commit();
  if (wrong == Wrong::read) *out = d[0][0][0];
  if (wrong == Wrong::factor) a[0] = 1;
  if (wrong == Wrong::tile) tile[0] = 1;
  if (wrong != Wrong::wait) wgmma_wait(d);
}

void read_past_shared_memory(float* out) {
  *out = shared_memory<float>()[256 + (threadIdx.x == 63)];
}

void write_past_global_memory(float* out) {
  out[threadIdx.x] = 1.0f;
}

}  // namespace

// What the launch says of the mistake.
std::string make_mistake(const std::string& name) {
  const std::vector<uint4> zeros(2);
  const auto* p = reinterpret_cast<const unsigned char*>(zeros.data());
  std::vector<float> out(1);
  const size_t shared_bytes = 64 * 16;
  const auto launch_wgmma = [&](Wrong wrong) {
    return launch(wgmma_gone_wrong, 1, 128, 64 * 128, nullptr, p, out.data(), wrong);
  };
  cudaError_t error = cudaSuccess;
  if (name == "misaligned load") {
    error = launch(misaligned_load, 1, 64, 0, nullptr, p, out.data());
  } else if (name == "barrier in one branch") {
    error = launch(barrier_in_one_branch, 1, 64, 0, nullptr, out.data());
  } else if (name == "thread that leaves early") {
    error = launch(thread_that_leaves_early, 1, 64, 0, nullptr, out.data());
  } else if (name == "copy never waited for") {
    error = launch(copy_never_waited_for, 1, 64, shared_bytes, nullptr, p, out.data());
  } else if (name == "copy read at once") {
    error = launch(copy_read_at_once, 1, 64, shared_bytes, nullptr, p, out.data());
    if (error == cudaSuccess) return std::isnan(out[0]) ? "read NaN" : "read a number";
  } else if (name == "product read at once") {
    error = launch_wgmma(Wrong::read);
    if (error == cudaSuccess) return std::isnan(out[0]) ? "read NaN" : "read a number";
  } else if (name == "factor changed while it is multiplied") {
    error = launch_wgmma(Wrong::factor);
  } else if (name == "tile changed while it is multiplied") {
    error = launch_wgmma(Wrong::tile);
  } else if (name == "tile read before the fence") {
    error = launch_wgmma(Wrong::fence);
  } else if (name == "product never waited for") {
    error = launch_wgmma(Wrong::wait);
  } else if (name == "too much shared memory") {
    error = launch(thread_that_leaves_early, 1, 64, 1 << 20, nullptr, out.data());
  } else if (name == "read past shared memory") {
    error = launch(read_past_shared_memory, 1, 64, shared_bytes, nullptr, out.data());
  } else if (name == "write past global memory") {
    error = launch(write_past_global_memory, 1, 64, 0, nullptr, out.data());
  }
  return error == cudaSuccess ? "nothing was noticed" : cudaGetErrorString(error);
}

}  // namespace gptj_q8::cuda

extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_make_mistake(
    const char* name) {
  static std::string answer;
  answer = gptj_q8::cuda::make_mistake(name);
  return answer.c_str();
}
