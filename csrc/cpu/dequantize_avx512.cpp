#define Q8_ISA avx512
#include "registers_avx512.h"

#include "primitives_avx512.h"

#include "dequantize.h"
