/* The row kernels that kernels.pyx drives: one table of function pointers per
 * instruction set, filled in by rows.c from the one body in row_body.inc.
 *
 * Shapes and meaning (fastce/kernels.py has the whole contract):
 *   logits   (n_rows, n_classes)  IN   unit stride along a row, `stride` elements between rows
 *   targets  (n_rows,)            IN   a value outside [0, n_classes) marks an ignored row
 *   scale    (n_rows,)            IN   upstream gradient, `scale_stride` elements apart (0: one scalar)
 *   losses   (n_rows,)            OUT
 *   ranks    (n_rows,)            OUT  classes ahead of the target; may be NULL
 *   grad     (n_rows, n_classes)  OUT  may be the logits themselves
 * Both functions return the sum of the losses they wrote.
 */
#ifndef FASTCE_ROWS_H
#define FASTCE_ROWS_H

#include <stddef.h>
#include <stdint.h>

#define FASTCE_DECLARE_TABLE(DTYPE, REAL)                                             \
    typedef struct {                                                                  \
        double (*loss)(const REAL *logits, ptrdiff_t stride, const int64_t *targets,  \
                       ptrdiff_t n_rows, ptrdiff_t n_classes, REAL *losses,           \
                       int64_t *ranks);                                               \
        double (*loss_grad)(const REAL *logits, ptrdiff_t stride,                     \
                            const int64_t *targets, ptrdiff_t n_rows,                 \
                            ptrdiff_t n_classes, const double *scale,                 \
                            ptrdiff_t scale_stride, REAL *losses, REAL *grad,         \
                            ptrdiff_t grad_stride);                                   \
    } fastce_rows_##DTYPE;

FASTCE_DECLARE_TABLE(f32, float)
FASTCE_DECLARE_TABLE(f64, double)

/* The table of one instruction set ("baseline", "avx2", "avx512"), or NULL where
 * it was not compiled in or this processor cannot run it. */
const fastce_rows_f32 *fastce_find_rows_f32(const char *isa);
const fastce_rows_f64 *fastce_find_rows_f64(const char *isa);

/* Whether the extension was compiled with OpenMP; without it every call is serial. */
int fastce_has_openmp(void);

#endif
