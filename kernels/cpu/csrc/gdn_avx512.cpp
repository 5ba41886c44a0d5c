// The kernels for AVX-512 with the bfloat16 dot product.
#include "gdn.h"

#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {
#include "gdn_impl.h"
}  // namespace

extern "C" void gdn_run(const gdn::Work* work) { run(*work); }
