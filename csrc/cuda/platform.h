// CUDA, or with Q8_CUDA_ON_CPU the emulation of tests/cuda_on_cpu, which runs the same sources on
// the CPU: the one place that chooses.
#pragma once

#if defined(Q8_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif
