#include "control.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace cuda_on_cpu {

Control control;

namespace {

std::string omitted_file;
int omitted_line = 0;
std::set<std::pair<std::string, int>> sites;
std::vector<Site> seen;  // the same, quick to look through
std::string answer;

}  // namespace

bool left_out(Site site) {
  if (std::find(seen.begin(), seen.end(), site) == seen.end()) {
    seen.push_back(site);
    sites.insert({base_name(site.file), site.line});
  }
  return site.line == omitted_line && omitted_file == base_name(site.file);
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* answer, cudaDeviceAttr what, int) {
  const cuda_on_cpu::EmulatedGpu& gpu = cuda_on_cpu::control.gpu;
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      *answer = gpu.processors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *answer = gpu.shared_bytes;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *answer = gpu.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *answer = gpu.capability % 10;
      break;
  }
  return cudaSuccess;
}

// For the tests, by ctypes.
#pragma GCC visibility push(default)
extern "C" {

void cuda_on_cpu_set_gpu(int processors, int shared_bytes, int capability) {
  cuda_on_cpu::control.gpu = {processors, shared_bytes, capability};
}

void cuda_on_cpu_set_order(int value) {
  cuda_on_cpu::control.order = value;
}

void cuda_on_cpu_set_last_block_only(int value) {
  cuda_on_cpu::control.last_block_only = value != 0;
}

// line 0: nothing is left out.
void cuda_on_cpu_leave_out(const char* file, int line) {
  cuda_on_cpu::omitted_file = file;
  cuda_on_cpu::omitted_line = line;
}

// "file:line" of every barrier and wait reached so far.
const char* cuda_on_cpu_sites() {
  cuda_on_cpu::answer.clear();
  for (const auto& [file, line] : cuda_on_cpu::sites) {
    cuda_on_cpu::answer += file + ":" + std::to_string(line) + "\n";
  }
  return cuda_on_cpu::answer.c_str();
}

// Mangled names of the kernels run so far.
const char* cuda_on_cpu_kernels() {
  cuda_on_cpu::answer.clear();
  for (const std::string& name : cuda_on_cpu::control.kernels) {
    cuda_on_cpu::answer += name + "\n";
  }
  return cuda_on_cpu::answer.c_str();
}
}
#pragma GCC visibility pop
