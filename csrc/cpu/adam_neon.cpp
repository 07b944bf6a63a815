#define Q8_ISA neon
#include "lanes_neon.h"

#include "encoder_lanes.h"

#include "adam_block_lanes.h"

#include "adam.h"
