#include "pool.h"

#include <torch/csrc/stable/ops.h>

namespace gptj_q8 {
namespace {

void run(int64_t count, int64_t grain, Pool::Task task, void* context) {
  if (count <= grain) return task(context, 0, count);
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { task(context, begin, end); });
}

}  // namespace

const Pool kTorchPool{run, [] { return int64_t{torch::stable::get_num_threads()}; }};

}  // namespace gptj_q8
