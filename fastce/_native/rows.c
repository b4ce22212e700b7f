/* The instantiation matrix: row_body.inc once for each (dtype, instruction set), and the table that
 * kernels.pyx chooses from. The file itself is compiled for the baseline of its platform; only
 * the functions between push and pop may use more, and only after a check at run time. */
#include "rows.h"

#include <math.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#define _Pragma(text)
#endif

/* ---- baseline: what every processor of the platform has (SSE2 on x86-64) ---- */
#define ISA baseline
#include "row_dtypes.inc"
#undef ISA

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86_VARIANTS 1

/* ---- avx2 ---- */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA avx2
#include "row_dtypes.inc"
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* ---- avx512: both compilers prefer 256-bit vectors unless told ---- */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define ISA avx512
#include "row_dtypes.inc"
#undef ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static int runs_here(const char *isa)
{
    if (!strcmp(isa, "baseline")) return 1;
#ifdef HAVE_X86_VARIANTS
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
               && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return 0;
}

#ifdef HAVE_X86_VARIANTS
#define FIND(DTYPE)                                                                       \
    fastce_rows_##DTYPE fastce_find_rows_##DTYPE(const char *isa)                         \
    {                                                                                     \
        if (!runs_here(isa)) return NULL;                                                 \
        if (!strcmp(isa, "avx512")) return rows_##DTYPE##_avx512;                         \
        if (!strcmp(isa, "avx2")) return rows_##DTYPE##_avx2;                             \
        return rows_##DTYPE##_baseline;                                                   \
    }
#else
#define FIND(DTYPE)                                                                       \
    fastce_rows_##DTYPE fastce_find_rows_##DTYPE(const char *isa)                         \
    {                                                                                     \
        return runs_here(isa) ? rows_##DTYPE##_baseline : NULL;                           \
    }
#endif
FIND(f32)
FIND(f64)
