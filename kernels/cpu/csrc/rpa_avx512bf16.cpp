#include "rpa_vec512.h"
// After the vectors:
#include "rpa_product.h"

extern "C" RpaKernels rpa_kernels() { return {run_unit, merge_tile, W}; }
