// The kernels; built once per instruction set, which the compiler's flags choose.
#include "gdn.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {
#include "gdn_impl.h"
}  // namespace

extern "C" void gdn_run(const gdn::Work* work) { run(*work); }
