#define Q8_ISA avx2
#include "lanes_avx2.h"

#include "primitives_lanes.h"

#include "dequantize.h"
