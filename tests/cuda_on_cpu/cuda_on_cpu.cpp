// Fibers, barriers and launches of the emulator; see cuda_on_cpu.h.
#include "cuda_on_cpu.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "control.h"
#include "fibers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr int kMostThreads = 1024;
constexpr cudaError_t kFailed = 719;  // CUDA's cudaErrorLaunchFailure

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

enum class State { ready, waiting, done };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state = State::done;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // not yet committed
  bool copies_shown = true, registers_fenced = false;
};

// What a warpgroup has started.
struct Works {
  std::vector<std::function<void()>> open, committed;
};

// Threads that meet: a block at a barrier, or a warp.
struct Meeting {
  int arrived = 0;
  Site site{};
  std::vector<void*> operands;
};

std::mutex launching;
std::vector<Thread> threads(kMostThreads);
int thread_count = 0;  // of a block
int current = -1;
const std::function<void()>* body = nullptr;

unsigned char* shared = nullptr;
Meeting barrier;
std::vector<Meeting> groups;
std::vector<Works> works(kMostThreads / 128);
std::string message;
bool failed = false;

std::mt19937 random_numbers;

void thread_main() {
  (*body)();
  Thread& thread = threads[current];
  const auto is_empty = [](const std::vector<Copy>& group) { return group.empty(); };
  if (!thread.open.empty() || !std::all_of(thread.groups.begin(), thread.groups.end(), is_empty)) {
    fail({"", 0}, "a thread ended with a cp.async that it never waited for");
  }
  const Works& mine = works[current / 128];
  if (!mine.open.empty() || !mine.committed.empty()) {
    fail({"", 0}, "a thread ended with a wgmma that it never waited for");
  }
  thread.state = State::done;
  thread.fiber.leave_forever();
}

void prepare(Thread& thread, int number) {
  // One that is not done belonged to a launch that failed.
  thread.fiber.prepare(thread_main, thread.state != State::done);
  thread.state = State::ready;
  thread.index.x = number % blockDim.x;
  thread.index.y = number / blockDim.x % blockDim.y;
  thread.index.z = number / (blockDim.x * blockDim.y);
  thread.groups.clear();
  thread.open.clear();
  thread.copies_shown = true;
  thread.registers_fenced = false;
}

// 0, 1, 2 and so on in the order chosen.
void arrange(std::vector<int64_t>& numbers) {
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int64_t>(i);
  if (control.order == 1) std::reverse(numbers.begin(), numbers.end());
  if (control.order > 1) std::shuffle(numbers.begin(), numbers.end(), random_numbers);
}

void run_block() {
  for (int i = 0; i < thread_count; ++i) prepare(threads[i], i);
  barrier = Meeting{};
  groups.clear();
  for (Works& each : works) each = {};
  // As numbered, all threads keep step. In other orders a warp runs as far as it can before the
  // next: so one may be ahead of another by all that no barrier forbids.
  const int stretch = control.order == 0 ? thread_count : 32;
  std::vector<int64_t> stretches((thread_count + stretch - 1) / stretch), turns(stretch);
  for (bool progress = true; progress && !failed;) {
    progress = false;
    arrange(stretches);
    for (const int64_t number : stretches) {
      for (bool moved = true; moved && !failed;) {
        moved = false;
        arrange(turns);
        for (const int64_t turn : turns) {
          const int64_t i = number * stretch + turn;
          if (i >= thread_count || threads[i].state != State::ready || failed) continue;
          moved = progress = true;
          current = static_cast<int>(i);
          threadIdx = threads[i].index;
          threads[i].fiber.enter();
        }
      }
    }
  }
  const auto is_waiting = [](const Thread& t) { return t.state == State::waiting; };
  const auto waiting = std::count_if(threads.begin(), threads.begin() + thread_count, is_waiting);
  if (!failed && waiting > 0) {
    failed = true;
    message = std::to_string(waiting) + " threads wait for others that have ended";
  }
}

// The thread arrives; true if it was the last one of `count`.
bool arrive(Meeting& meeting, int count, Site site, const char* what) {
  if (meeting.arrived == 0) {
    meeting.site = site;
  } else if (!(meeting.site == site)) {
    fail(site, "threads wait at different %s: others are at %s:%d", what,
         base_name(meeting.site.file), meeting.site.line);
  }
  return ++meeting.arrived == count;
}

void wait_or_release(Meeting& meeting, int first, int count, bool last) {
  if (!last) {
    threads[current].state = State::waiting;
    threads[current].fiber.leave();
    return;
  }
  meeting.arrived = 0;
  for (int i = first; i < first + count; ++i) {
    if (i != current) threads[i].state = State::ready;
  }
}

}  // namespace

void fail(Site site, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  message = std::string(base_name(site.file)) + ":" + std::to_string(site.line) + ": " + text +
            " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ")";
  failed = true;
  threads[current].fiber.leave_forever();
}

void wait_for_block(Site site) {
  const bool last = arrive(barrier, thread_count, site, "barriers");
  wait_or_release(barrier, 0, thread_count, last);
}

void wait_for_group(int width, void* operands, Together together, Site site) {
  const int lane = current % width, first = current - lane;
  if (thread_count % width != 0) {
    fail(site, "%d threads are not groups of %d", thread_count, width);
  }
  // Groups are told apart by their first thread; a warp is another group than its warpgroup.
  const size_t index = static_cast<size_t>(first / 32) * 2 + (width == 32 ? 0 : 1);
  if (groups.size() <= index) groups.resize(index + 1);
  groups[index].operands.resize(width);
  groups[index].operands[lane] = operands;
  const bool last = arrive(groups[index], width, site, "warp operations");
  if (last) together(groups[index].operands.data(), width);
  wait_or_release(groups[index], first, width, last);
}

unsigned char* shared_memory() {
  return shared;
}

void start_copy(void* to, const void* from, size_t bytes, size_t zeros, Site) {
  std::memset(to, 0xff, bytes + zeros);  // what is there until the copy lands is nobody's business
  threads[current].open.push_back({to, from, bytes, zeros});
}

void commit_copies() {
  Thread& thread = threads[current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void land_copies(int keep_groups) {
  auto& waiting = threads[current].groups;
  while (static_cast<int>(waiting.size()) > keep_groups) {
    if (!waiting.front().empty()) threads[current].copies_shown = false;
    for (const Copy& copy : waiting.front()) {
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
    }
    waiting.erase(waiting.begin());
  }
}

void show_copies() {
  threads[current].copies_shown = true;
}

void check_copies_shown(Site site) {
  const auto shown = [](const Thread& thread) { return thread.copies_shown; };
  if (!std::all_of(threads.begin(), threads.begin() + thread_count, shown)) {
    fail(site, "wgmma reads shared memory before a fence.proxy.async");
  }
}

void set_registers_fenced(bool fenced) {
  threads[current].registers_fenced = fenced;
}

void check_registers_fenced(Site site) {
  if (!threads[current].registers_fenced) fail(site, "wgmma without a wgmma.fence before it");
}

void start_work(std::function<void()> work) {
  works[current / 128].open.push_back(std::move(work));
}

void commit_work() {
  Works& mine = works[current / 128];
  mine.committed.insert(mine.committed.end(), mine.open.begin(), mine.open.end());
  mine.open.clear();
}

void finish_work() {
  Works& mine = works[current / 128];
  for (const auto& work : mine.committed) work();
  mine.committed.clear();
}

void check_aligned(const void* p, size_t to, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % to != 0) fail(site, "%s is not aligned to %zu", what, to);
}

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launching);
  Dl_info info{};
  // Kernels without a name to the outside are those of mistakes.cpp.
  if (dladdr(kernel, &info) != 0 && info.dli_saddr == kernel)
    control.kernels.insert(info.dli_sname);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  thread_count = static_cast<int>(block.x * block.y * block.z);
  message.clear();
  failed = false;
  if (thread_count < 1 || thread_count > kMostThreads || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > static_cast<size_t>(control.gpu.shared_bytes)) {
    message = "no GPU takes such a launch: " + std::to_string(thread_count) + " threads, grid " +
              std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
              std::to_string(grid.z) + ", " + std::to_string(shared_bytes) + " bytes shared";
    return kFailed;
  }
  body = &thread;
  blockDim = block;
  gridDim = grid;
  random_numbers.seed(control.order);
  std::vector<int64_t> turns;
  if (control.last_block_only) {
    turns = {static_cast<int64_t>(blocks) - 1};
  } else {
    turns.resize(blocks);
    arrange(turns);
  }
  for (const int64_t number : turns) {
    blockIdx.x = number % grid.x;
    blockIdx.y = number / grid.x % grid.y;
    blockIdx.z = number / grid.x / grid.y;
    void* memory = nullptr;
    if (shared_bytes > 0 && posix_memalign(&memory, 1024, shared_bytes) != 0) std::abort();
    shared = static_cast<unsigned char*>(memory);
    if (shared_bytes > 0) std::memset(shared, 0xff, shared_bytes);
    run_block();
    std::free(memory);
    shared = nullptr;
    if (failed) return kFailed;
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t) {
  return cuda_on_cpu::message.c_str();
}
