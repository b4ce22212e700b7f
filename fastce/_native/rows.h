/* The kernels that kernels.pyx drives, for each dtype and instruction set: filled in by rows.c from the
 * one body in row_body.inc. fastce/kernels.py has the contract. */
#ifndef FASTCE_ROWS_H
#define FASTCE_ROWS_H

#include <stddef.h>
#include <stdint.h>

/* A call. All strides count elements; row i of logits and grad is at
 * (i / inner) * outer_stride + (i % inner) * row_stride. */
typedef struct {
    const void *logits;       /* IN */
    ptrdiff_t outer_stride, row_stride, class_stride;
    ptrdiff_t inner, n_classes;
    ptrdiff_t first_row;      /* the row that the next four begin at */
    const int64_t *targets;   /* IN   a value outside [0, n_classes) marks an ignored row */
    void *losses;             /* OUT  float, or double for double logits */
    const double *row_weights; /* IN  of the losses, row_weights_stride apart; may be NULL */
    ptrdiff_t row_weights_stride;
    const double *scale;      /* IN   upstream gradient, scale_stride apart; NULL without grad */
    ptrdiff_t scale_stride;
    void *grad;               /* OUT  may be NULL, or the logits themselves */
    ptrdiff_t grad_outer_stride, grad_row_stride, grad_class_stride;
    int form;                 /* what grad is */
    int stream;               /* write grad past the caches */
    /* Soft targets: the share of class j is weight[j] * (own * t[j] + even), where t is a row of probs, or 1
     * for the target and 0 elsewhere. */
    int soft;
    const void *probs;        /* IN   as logits, strides likewise; NULL for class ids */
    ptrdiff_t probs_outer_stride, probs_row_stride, probs_class_stride;
    const void *weight;       /* IN   (n_classes,) of the dtype of the losses; NULL for ones */
    const double *weight_sums; /* IN   with weight: sums of the first 0, FASTCE_PREFIX, 2 FASTCE_PREFIX, ... all */
    double own, even;
    /* Statistics: OUT, each may be NULL; floats of the dtype of the losses. */
    int stats;                /* whether one is wanted; and whether one needs the exponentials again */
    int moments;
    void *lse, *target_logit, *max_logit, *entropy, *max_prob, *brier;
    int64_t *argmax, *ranks;
} fastce_call;

/* Forms of the array grad. With the last two there are no targets. */
enum { FASTCE_GRADIENT, FASTCE_SOFTMAX, FASTCE_LOG_SOFTMAX };

/* What is known of a part of a row: (sum + carry) * (the dtype's unit) is the sum of exp(x - m) over the
 * classes below its maximum m, which `ties` classes attain. */
typedef struct {
    double m, ties, sum, carry;
    /* and the sums of R(look), relative to m */
    double linear, mass, below, squares, least;
    int64_t ahead, argmax;
} fastce_part;

/* Measures of rows of probabilities, or of the softmax of logits. */
typedef enum { FASTCE_CROSS_ENTROPY, FASTCE_KL_DIVERGENCE, FASTCE_KL_OF_LOGITS } fastce_kind;
typedef struct {
    fastce_kind kind;
    fastce_call rows;         /* IN   p as its logits, q as its probabilities; without these, q is p */
    double of_2, of_e;        /* the logarithms of 2 and e to the base */
    double sums_agree;        /* so many epsilons may two sums differ that count as equal */
    void *out;                /* OUT  float, or double for double p */
} fastce_measure;

/* Binary cross-entropy. All are contiguous; weights, scale and losses are floats, or doubles for double x. */
typedef struct {
    const void *x, *targets;                   /* IN */
    const void *weight, *pos_weight, *scale;   /* IN   may be NULL */
    double unit, grad_unit;
    void *losses, *grad;                       /* OUT  may be NULL */
    int from_logits;
} fastce_binary;

/* The kernels of one dtype on one instruction set. */
typedef struct {
    /* Compute rows [first, first + n), counted from first_row; write the sums of the losses of each
     * tile of them and return how many were ignored. For rows of at most FASTCE_SEGMENT classes. */
    ptrdiff_t (*rows)(const fastce_call *, ptrdiff_t first, ptrdiff_t n, ptrdiff_t tile, void *scratch,
                      double *sums);
    /* Longer rows, cut every FASTCE_SEGMENT classes: read one segment of one row; then finish the row,
     * given its parts in order, leaving m and rest in part 0; then write one segment of the gradient. */
    void (*read_segment)(const fastce_call *, ptrdiff_t row, ptrdiff_t segment, void *scratch,
                         fastce_part *);
    ptrdiff_t (*finish_segments)(const fastce_call *, ptrdiff_t row, ptrdiff_t n_segments,
                                 fastce_part *, double *sum);
    void (*write_segment)(const fastce_call *, ptrdiff_t row, ptrdiff_t segment, void *scratch,
                          const fastce_part *);
    /* Bytes of scratch that each thread needs. */
    size_t (*scratch)(const fastce_call *);
    /* Measure rows [first, first + n), and return how many hold invalid probabilities; the scratch for it. */
    ptrdiff_t (*measure)(const fastce_measure *, ptrdiff_t first, ptrdiff_t n, void *scratch);
    size_t (*measure_scratch)(const fastce_measure *);
    /* Write the information of the elements [first, first + n) of p, and return how many are invalid. */
    ptrdiff_t (*information)(const fastce_measure *, ptrdiff_t first, ptrdiff_t n);
    /* The same of binary cross-entropy; the sum of the losses is left as two numbers. */
    ptrdiff_t (*binary)(const fastce_binary *, ptrdiff_t first, ptrdiff_t n, double *sum);
} fastce_kernels;

/* Divides the blocks of every dtype. */
#define FASTCE_PREFIX ((ptrdiff_t)512)

/* A segment's floats, 1 MB, fit L2 beside what streams past. */
#define FASTCE_SEGMENT ((ptrdiff_t)1 << 18)

/* The kernels of one dtype ("f32", "f64", "f16", "bf16") and instruction set ("baseline", "avx2",
 * "avx512"), or NULL where they were not compiled in or this processor cannot run them. */
const fastce_kernels *fastce_find_kernels(const char *dtype, const char *isa);

#endif
