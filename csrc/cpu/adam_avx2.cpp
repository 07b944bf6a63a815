#define Q8_ISA avx2
#include "lanes_avx2.h"

#include "encoder_lanes.h"

#include "adam_block_lanes.h"

#include "adam.h"
