#define Q8_ISA avx512
#include "registers_avx512.h"

#include "encoder_avx512.h"

#include "adam_block_avx512.h"

#include "adam.h"
