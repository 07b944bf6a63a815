#define Q8_ISA portable
#include "lanes_portable.h"

#include "encoder_lanes.h"

#include "adam_block_lanes.h"

#include "adam.h"
