#define Q8_ISA avx2
#include "lanes_avx2.h"

#include "linear_grad_input_lanes.h"
