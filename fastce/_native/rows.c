/* The instantiation matrix: row_body.inc once for each (dtype, instruction set), and the table that
 * kernels.pyx chooses from. For GCC or clang, because of their vector types and target pragmas.
 * The file itself is compiled for the baseline of its platform; only
 * the functions between push and pop may use more, and only after a check at run time. */
#include "rows.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define STREAM_END() _mm_sfence()
#else
#define STREAM_END() ((void)0)
#endif
/* A call of these would save and load every vector register, and lose the constants in them. */
#define INLINE inline __attribute__((always_inline))
/* Without it, GCC would make every combination of these a function of its own. */
#define NOINLINE __attribute__((noinline))
#define PREFETCH(address) __builtin_prefetch(address)
#define FETCH(start, n)                                                                   \
    for (const char *p = (const char *)(start), *end = (const char *)((start) + (n)); p < end; p += 64) \
        PREFETCH(p)

/* ---- Halves, one at a time: exact one way, to nearest and ties to even the other ---- */

static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }

static inline float widen_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
static inline uint16_t narrow_bf16(float x)
{
    const uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float widen_f16(uint16_t h)
{
    /* with float's exponent the value is 2^-112 times too small, and exact, as subnormals are normal now */
    const float small = float_of((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    const uint32_t bits = (h & 0x7c00) == 0x7c00 ? bits_of(small) | 0x7f800000 : bits_of(small);
    return float_of(bits | (uint32_t)(h & 0x8000) << 16);
}
static inline uint16_t narrow_f16(float x)
{
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds beyond 65504 */
    if (size < 0x38800000) /* subnormal: adding 1/2 leaves multiples of 2^-24 in the low bits */
        return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

/* ---- baseline: what every processor of the platform has (SSE2 on x86-64) ---- */
#define ISA baseline
#define LANES_FILE "lanes_baseline.inc"
#include "row_dtypes.inc"
#undef LANES_FILE
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
#define LANES_FILE "lanes_avx2.inc"
#include "row_dtypes.inc"
#undef LANES_FILE
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
#define LANES_FILE "lanes_avx512.inc"
#include "row_dtypes.inc"
#undef LANES_FILE
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

#define DTYPES(ISA)                                                                       \
    {#ISA, "f32", &kernels_f32_##ISA}, {#ISA, "f64", &kernels_f64_##ISA},                 \
    {#ISA, "f16", &kernels_f16_##ISA}, {#ISA, "bf16", &kernels_bf16_##ISA}

static const struct {
    const char *isa, *dtype;
    const fastce_kernels *kernels;
} table[] = {
    DTYPES(baseline),
#ifdef HAVE_X86_VARIANTS
    DTYPES(avx2), DTYPES(avx512),
#endif
};

const fastce_kernels *fastce_find_kernels(const char *dtype, const char *isa)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].isa, isa) && !strcmp(table[i].dtype, dtype) && runs_here(isa))
            return table[i].kernels;
    return NULL;
}
