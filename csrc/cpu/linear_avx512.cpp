#define Q8_ISA avx512
#include "registers_avx512.h"

#include "linear_avx512.h"
