#define Q8_ISA portable
#include "lanes_portable.h"

#include "primitives_lanes.h"

#include "dequantize.h"
