/* The kernel that kernels.pyx drives, for each dtype and instruction set: filled in by rows.c from the
 * one body in row_body.inc. fastce/kernels.py has the contract.
 *
 *   logits   (n_rows, n_classes)  IN   unit stride along a row, `stride` elements between rows
 *   targets  (n_rows,)            IN   a value outside [0, n_classes) marks an ignored row
 *   losses   (n_rows,)            OUT
 *   ranks    (n_rows,)            OUT  may be NULL
 *   scale    (n_rows,)            IN   upstream gradient, `scale_stride` elements apart
 *   grad     (n_rows, n_classes)  OUT  may be NULL (then scale too), or the logits themselves
 *
 * Returns the sum of the losses.
 */
#ifndef FASTCE_ROWS_H
#define FASTCE_ROWS_H

#include <stddef.h>
#include <stdint.h>

#define FASTCE_ROWS(NAME, REAL)                                                           \
    typedef double (*NAME)(const REAL *logits, ptrdiff_t stride, const int64_t *targets,  \
                           ptrdiff_t n_rows, ptrdiff_t n_classes, REAL *losses,           \
                           int64_t *ranks, const double *scale, ptrdiff_t scale_stride,   \
                           REAL *grad, ptrdiff_t grad_stride)

FASTCE_ROWS(fastce_rows_f32, float);
FASTCE_ROWS(fastce_rows_f64, double);

/* The kernel of one instruction set ("baseline", "avx2", "avx512"), or NULL where it was not
 * compiled in or this processor cannot run it. */
fastce_rows_f32 fastce_find_rows_f32(const char *isa);
fastce_rows_f64 fastce_find_rows_f64(const char *isa);

#endif
