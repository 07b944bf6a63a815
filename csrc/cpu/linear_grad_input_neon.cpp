#define Q8_ISA neon
#include "lanes_neon.h"

#include "linear_grad_input_lanes.h"
