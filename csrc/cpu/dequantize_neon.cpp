#define Q8_ISA neon
#include "lanes_neon.h"

#include "primitives_lanes.h"

#include "dequantize.h"
