// PyTorch's own thread pool as the kernels see it.
#pragma once

#include "kernels.h"

namespace gptj_q8 {

// Respects torch.set_num_threads, which gptj_q8/backends/forked.py makes 1 in a forked child.
extern const Pool kTorchPool;

}  // namespace gptj_q8
