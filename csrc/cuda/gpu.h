// What the launches need to know of the GPU at hand.
#pragma once

#include "platform.h"

namespace gptj_q8::cuda {

struct Gpu {
  int processors;    // multiprocessors
  int shared_bytes;  // shared memory that one block may have
  int capability;    // 10 * major + minor, as in sm_90
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
