// The kernels for AVX2 with FMA and F16C.
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
