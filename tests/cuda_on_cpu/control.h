// What the tests set, and what they ask for afterwards.
#pragma once

#include <cstring>
#include <set>
#include <string>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

// The GPU that the launches believe in.
struct EmulatedGpu {
  int processors = 4, shared_bytes = 227 * 1024, capability = 90;
};

struct Control {
  EmulatedGpu gpu;
  int order = 0;  // 0 as numbered, 1 backwards, else a seed
  bool last_block_only = false;
  std::set<std::string> kernels;  // run so far, by their mangled names
};
extern Control control;

inline const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

}  // namespace cuda_on_cpu
