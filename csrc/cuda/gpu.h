// What the launches need to know of the GPU at hand.
#pragma once

#include "../common/types.h"
#include "platform.h"

namespace gptj_q8::cuda {

struct Gpu {
  int processors;    // multiprocessors
  int shared_bytes;  // shared memory that one block may have
  int capability;    // 10 * major + minor, as in sm_90

  // Turing: half the shared memory and tensor cores half as deep, float16 only.
  bool is_narrow() const { return capability < 80; }
  // Whether tensor cores multiply it and keep its promise of precision.
  bool has_tensor_cores(DType dtype) const {
    if (dtype == DType::float16) return capability >= 75;
    return dtype == DType::bfloat16 && capability >= 80;
  }
};

// Of the current device.
inline cudaError_t current_gpu(Gpu* gpu) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr what, int* answer) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(answer, what, device);
  };
  ask(cudaDevAttrMultiProcessorCount, &gpu->processors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &gpu->shared_bytes);
  ask(cudaDevAttrComputeCapabilityMajor, &major);
  ask(cudaDevAttrComputeCapabilityMinor, &minor);
  gpu->capability = 10 * major + minor;
  return error;
}

}  // namespace gptj_q8::cuda
