#include <cstdint>

// The best level this processor has: 3 AVX-512 with bf16, 2 AVX-512, 1 AVX2 with FMA and F16C, 0 none of them.
extern "C" int32_t rpa_level() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  return avx2 ? 1 : 0;
}
