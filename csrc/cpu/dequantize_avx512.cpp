#define Q8_ISA avx512
#include "primitives_avx512.h"

#include "dequantize.h"
