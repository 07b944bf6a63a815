#define Q8_ISA avx512bw
#include "registers_avx512bw.h"

#include "linear_avx512.h"
