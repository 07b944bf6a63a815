#define Q8_ISA avx512bw
#include "registers_avx512bw.h"

#include "encoder_avx512bw.h"

#include "adam_block_avx512.h"

#include "adam.h"
