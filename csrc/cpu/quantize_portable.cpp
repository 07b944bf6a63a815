#define Q8_ISA portable
#include "primitives_portable.h"

#include "quantize.h"
