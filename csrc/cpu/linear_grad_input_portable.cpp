#define Q8_ISA portable
#include "lanes_portable.h"

#include "linear_grad_input_lanes.h"
