#define Q8_ISA neon
#include "lanes_neon.h"

#include "encoder_lanes.h"

#include "quantize.h"
