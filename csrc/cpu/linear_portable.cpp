#define Q8_ISA portable
#include "lanes_portable.h"

#include "linear_lanes.h"
