#define Q8_ISA avx512
#include "registers_avx512.h"

#include "linear_grad_input_avx512.h"
