/* The table of kernels, one for each (dtype, instruction set), that kernels.pyx chooses from. The kernels
 * are compiled from one body in rows_*.c, a file for each instruction set, so that these compile side by
 * side. For GCC or clang, because of their vector types and target pragmas. */
#include "rows.h"

#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86_VARIANTS 1
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

#define DECLARE(ISA)                                                                       \
    extern const fastce_kernels kernels_f32_##ISA, kernels_f64_##ISA, kernels_f16_##ISA, kernels_bf16_##ISA

DECLARE(baseline);
#ifdef HAVE_X86_VARIANTS
DECLARE(avx2);
DECLARE(avx512);
#endif

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
