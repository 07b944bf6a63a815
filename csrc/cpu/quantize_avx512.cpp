#define Q8_ISA avx512
#include "encoder_avx512.h"

#include "quantize.h"
