#include "pool.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace gptj_q8 {
namespace {

std::atomic<bool> forked{false};

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

void run(int64_t count, int64_t grain, Pool::Task task, void* context) {
  if (count <= grain || forked.load(std::memory_order_relaxed)) return task(context, 0, count);
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { task(context, begin, end); });
}

}  // namespace

const Pool kTorchPool{run};

}  // namespace gptj_q8
