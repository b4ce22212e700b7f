/* The kernels for AVX2, FMA and F16C. Only the functions between push and pop may use them, and only
 * after a check at run time (rows.c). */
#include "halves.inc"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA avx2
#define LANES_FILE "lanes_avx2.inc"
#include "row_dtypes.inc"
#undef LANES_FILE
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
