#define Q8_ISA avx512bw
#include "registers_avx512bw.h"

#include "primitives_avx512.h"

#include "dequantize.h"
