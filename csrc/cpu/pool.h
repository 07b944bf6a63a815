// PyTorch's own thread pool as the kernels see it.
#pragma once

#include "kernels.h"

namespace gptj_q8 {

// Respects torch.set_num_threads. In a forked child everything runs on the calling thread:
// the pool's threads did not survive the fork, and waiting for them would hang.
extern const Pool kTorchPool;

}  // namespace gptj_q8
