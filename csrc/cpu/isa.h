// Which instruction set serves the calls of this process.
#pragma once

#include "kernels.h"

namespace gptj_q8 {

// The best one this CPU and operating system can run, or the one that select_isa chose.
const Kernels& kernels();

// Forces an instruction set by name; "auto" goes back to the best. False if there is no such
// name or the CPU lacks it, and then nothing changes.
bool select_isa(const char* name);

// The i-th instruction set that this CPU can run, best first; null past the end.
const char* usable_isa(int i);

}  // namespace gptj_q8
