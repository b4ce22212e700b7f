# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""Rows spread over threads: the driver of the C kernels in rows.h."""

cimport numpy as cnp
import numpy as np
from cython.parallel cimport prange, threadid
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastce.kernels import BINARY_TILE, SUMS_AGREE, log_scale, tile_rows

cnp.import_array()

cdef extern from "rows.h" nogil:
    const ptrdiff_t FASTCE_PREFIX
    const ptrdiff_t FASTCE_SEGMENT
    ctypedef struct fastce_call:
        const void *logits
        ptrdiff_t outer_stride, row_stride, class_stride, inner, n_classes, first_row
        const int64_t *targets
        void *losses
        const double *row_weights
        ptrdiff_t row_weights_stride
        const double *scale
        ptrdiff_t scale_stride
        void *grad
        ptrdiff_t grad_outer_stride, grad_row_stride, grad_class_stride
        int form, stream
        int soft
        const void *probs
        ptrdiff_t probs_outer_stride, probs_row_stride, probs_class_stride
        const void *weight
        const double *weight_sums
        double own, even
        int stats, moments
        void *lse
        void *target_logit
        void *max_logit
        void *entropy
        void *max_prob
        void *brier
        int64_t *argmax
        int64_t *ranks
    enum:
        FASTCE_GRADIENT
        FASTCE_SOFTMAX
        FASTCE_LOG_SOFTMAX
    ctypedef struct fastce_part:
        pass
    ctypedef enum fastce_kind:
        FASTCE_CROSS_ENTROPY
        FASTCE_KL_DIVERGENCE
        FASTCE_KL_OF_LOGITS
    ctypedef struct fastce_measure:
        fastce_kind kind
        fastce_call rows
        double of_2, of_e, sums_agree
        void *out
    ctypedef struct fastce_binary:
        const void *x
        const void *targets
        const void *weight
        const void *pos_weight
        const void *scale
        double unit, grad_unit
        void *losses
        void *grad
        int from_logits
    ctypedef struct fastce_kernels:
        ptrdiff_t (*rows)(
            const fastce_call *, ptrdiff_t, ptrdiff_t, ptrdiff_t, void *, double *) noexcept nogil
        void (*read_segment)(
            const fastce_call *, ptrdiff_t, ptrdiff_t, void *, fastce_part *) noexcept nogil
        ptrdiff_t (*finish_segments)(
            const fastce_call *, ptrdiff_t, ptrdiff_t, fastce_part *, double *) noexcept nogil
        void (*write_segment)(
            const fastce_call *, ptrdiff_t, ptrdiff_t, void *, const fastce_part *) noexcept nogil
        size_t (*scratch)(const fastce_call *) noexcept nogil
        ptrdiff_t (*measure)(const fastce_measure *, ptrdiff_t, ptrdiff_t, void *) noexcept nogil
        size_t (*measure_scratch)(const fastce_measure *) noexcept nogil
        ptrdiff_t (*information)(const fastce_measure *, ptrdiff_t, ptrdiff_t) noexcept nogil
        ptrdiff_t (*binary)(const fastce_binary *, ptrdiff_t, ptrdiff_t, double *) noexcept nogil
    const fastce_kernels *fastce_find_kernels(const char *dtype, const char *isa)

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTCE_OPENMP 1
    #else
    #define FASTCE_OPENMP 0
    #define omp_get_max_threads() 1
    #endif
    """
    int FASTCE_OPENMP
    int omp_get_max_threads() nogil

OPENMP = bool(FASTCE_OPENMP)

# Work of fewer elements, a few microseconds, keeps the interpreter lock: giving it back costs more.
cdef ptrdiff_t _KEEPS_LOCK = 8192
# Each thread takes about this many turns: enough to even out what else runs on the cores, few enough that
# what it takes is one stretch of memory, whose fresh pages it alone touches.
cdef ptrdiff_t _TURNS = 16
# Where classes are not neighbours, rows are: a work item takes several cache lines of them, if each thread gets so
# many, and up to a few groups, each of which is taken in while the one before is worked on: 0.85 of 256 rows' time.
cdef ptrdiff_t _TURNED_ROWS = 1024, _TURNED_GROUP = 96
# Where a gradient passes the caches by: it is written while the next row of the item is read.
cdef ptrdiff_t _STREAMED_ROWS = 16
# Elements of a work item where each is computed for itself.
cdef ptrdiff_t _TILE = BINARY_TILE


# The most rows of a small call: those of one tile.
cdef enum:
    _PLAIN_ROWS = 1024


cdef bint _apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether two contiguous arrays share no memory."""
    cdef char *x = <char *>cnp.PyArray_DATA(a)
    cdef char *y = <char *>cnp.PyArray_DATA(b)
    return x + cnp.PyArray_NBYTES(a) <= y or y + cnp.PyArray_NBYTES(b) <= x


cdef bint _takes_grad(out, cnp.ndarray logits, cnp.ndarray targets):
    """Whether an array can hold the gradient of a small call as it is, and every target is a class."""
    cdef const int64_t *target = <const int64_t *>cnp.PyArray_DATA(targets)
    cdef ptrdiff_t row
    for row in range(cnp.PyArray_DIM(logits, 0)):
        if not 0 <= target[row] < cnp.PyArray_DIM(logits, 1):
            return False
    return (
        type(out) is cnp.ndarray and cnp.PyArray_NDIM(out) == 2
        and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(logits)
        and cnp.PyArray_DIM(out, 0) == cnp.PyArray_DIM(logits, 0)
        and cnp.PyArray_DIM(out, 1) == cnp.PyArray_DIM(logits, 1)
        and cnp.PyArray_ISCARRAY(out) and (out is logits or _apart(out, logits)) and _apart(out, targets)
    )


cdef int _loss_kind(int kind) noexcept:
    return cnp.NPY_FLOAT64 if kind == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef class RowKernels:
    """`fastce.kernels.Kernels` on one instruction set."""

    cdef const fastce_kernels *f32
    cdef const fastce_kernels *f64
    cdef const fastce_kernels *f16
    cdef const fastce_kernels *bf16

    def __cinit__(self, str isa):
        name = isa.encode()
        self.f32 = fastce_find_kernels(b"f32", name)
        self.f64 = fastce_find_kernels(b"f64", name)
        self.f16 = fastce_find_kernels(b"f16", name)
        self.bf16 = fastce_find_kernels(b"bf16", name)
        if self.f32 == NULL:
            raise ImportError(f"the extension module has no {isa} kernels that run on this machine")

    def max_threads(self):
        """Return OpenMP's limit: OMP_NUM_THREADS, threadpoolctl, or all cores."""
        return omp_get_max_threads()

    def plain(
        self, logits, targets, ignore_index, ptrdiff_t max_elements, bint wants_losses, grad_scale, out,
    ):
        """See `fastce.kernels.Kernels.plain`."""
        cdef fastce_call call
        cdef double scale = 1.0, total
        cdef double[_PLAIN_ROWS] buffer
        cdef ptrdiff_t n_rows, n_ignored
        cdef int kind
        if type(logits) is not cnp.ndarray or type(targets) is not cnp.ndarray:
            return None
        kind = cnp.PyArray_TYPE(logits)
        if (
            cnp.PyArray_NDIM(logits) != 2 or cnp.PyArray_NDIM(targets) != 1
            or kind not in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64, cnp.NPY_FLOAT16)
            or cnp.PyArray_TYPE(targets) != cnp.NPY_INT64
            or not cnp.PyArray_ISCARRAY_RO(logits) or not cnp.PyArray_ISCARRAY_RO(targets)
        ):
            return None
        memset(&call, 0, sizeof(fastce_call))
        n_rows, call.n_classes = cnp.PyArray_DIM(logits, 0), cnp.PyArray_DIM(logits, 1)
        if (
            not 0 < n_rows <= _PLAIN_ROWS or n_rows != cnp.PyArray_DIM(targets, 0)
            or not 0 < call.n_classes <= max_elements // n_rows
            or (ignore_index is not None and not (type(ignore_index) is int and ignore_index < 0))
        ):
            return None
        call.logits = cnp.PyArray_DATA(logits)
        call.row_stride = call.grad_row_stride = call.n_classes
        call.class_stride = call.grad_class_stride = 1
        call.inner = n_rows
        call.targets = <const int64_t *>cnp.PyArray_DATA(targets)
        losses = grad = None
        if wants_losses:
            losses = cnp.PyArray_EMPTY(1, cnp.PyArray_DIMS(logits), _loss_kind(kind), 0)
        call.losses = <void *>buffer if losses is None else cnp.PyArray_DATA(losses)
        if grad_scale is not None:
            scale = grad_scale
            if out is not None and not _takes_grad(out, logits, targets):
                return None
            grad = cnp.PyArray_EMPTY(2, cnp.PyArray_DIMS(logits), kind, 0) if out is None else out
            call.grad = cnp.PyArray_DATA(grad)
        call.scale = &scale
        n_ignored = _run_tiles(self.of(kind), &call, n_rows, n_rows, 1, &total)
        return None if n_ignored else (total if losses is None else losses, grad)

    cdef const fastce_kernels *of(self, int kind) noexcept:
        if kind == cnp.NPY_FLOAT32:
            return self.f32
        if kind == cnp.NPY_FLOAT64:
            return self.f64
        return self.f16 if kind == cnp.NPY_FLOAT16 else self.bf16

    def rows(
        self,
        cnp.ndarray logits,
        ptrdiff_t first_row,
        cnp.ndarray targets,
        cnp.ndarray losses,
        cnp.ndarray tile_sums,
        *,
        cnp.ndarray row_weights,
        soft,
        stats,
        cnp.ndarray scale,
        cnp.ndarray grad,
        bint stream,
        int num_threads,
    ):
        """See `fastce.kernels.Kernels.rows`; nothing is checked here."""
        cdef fastce_call call
        weight_sums = _weight_sums(soft)
        _describe(&call, logits, first_row, grad)
        call.targets = <const int64_t *>cnp.PyArray_DATA(targets)
        call.losses = cnp.PyArray_DATA(losses)
        if row_weights is not None:
            call.row_weights = <const double *>cnp.PyArray_DATA(row_weights)
            call.row_weights_stride = cnp.PyArray_STRIDE(row_weights, 0) // <ptrdiff_t>sizeof(double)
        if grad is not None:
            call.scale = <const double *>cnp.PyArray_DATA(scale)
            call.scale_stride = cnp.PyArray_STRIDE(scale, 0) // <ptrdiff_t>sizeof(double)
        if soft is not None:
            _describe_soft(&call, soft, weight_sums)
        if stats is not None:
            _describe_stats(&call, stats)
        call.stream = stream
        return self._run(&call, cnp.PyArray_TYPE(logits), cnp.PyArray_DIM(targets, 0), num_threads,
                         <double *>cnp.PyArray_DATA(tile_sums))

    def softmax(
        self,
        cnp.ndarray logits,
        ptrdiff_t first_row,
        ptrdiff_t n_rows,
        cnp.ndarray out,
        *,
        bint log,
        bint stream,
        int num_threads,
    ):
        """See `fastce.kernels.Kernels.softmax`."""
        cdef fastce_call call
        cdef double one = 1.0
        _describe(&call, logits, first_row, out)
        call.scale = &one
        call.form = FASTCE_LOG_SOFTMAX if log else FASTCE_SOFTMAX
        call.stream = stream
        self._run(&call, cnp.PyArray_TYPE(logits), n_rows, num_threads, NULL)

    cdef _run(self, const fastce_call *call, int kind, ptrdiff_t n_rows, int num_threads, double *sums):
        cdef const fastce_kernels *kernels = self.of(kind)
        cdef ptrdiff_t tile, n_bad
        if n_rows == 0:
            return 0
        tile = tile_rows(call.n_classes)
        if n_rows * call.n_classes < _KEEPS_LOCK:
            n_bad = _run_tiles(kernels, call, n_rows, tile, 1, sums)
        else:
            with nogil:
                if call.n_classes > FASTCE_SEGMENT:
                    n_bad = _run_segments(kernels, call, n_rows, num_threads, sums)
                else:
                    n_bad = _run_tiles(kernels, call, n_rows, tile, num_threads, sums)
        if n_bad < 0:
            raise MemoryError("no memory for the scratch of fastce's kernels")
        return n_bad

    def kl_from_logits(
        self,
        cnp.ndarray p_logits,
        cnp.ndarray q_logits,
        ptrdiff_t first_row,
        cnp.ndarray out,
        *,
        int num_threads,
    ):
        """See `fastce.kernels.Kernels.kl_from_logits`; nothing is checked here."""
        self._measure(FASTCE_KL_OF_LOGITS, p_logits, q_logits, first_row, out, None, num_threads)

    def distributions(
        self,
        str measure,
        cnp.ndarray p,
        cnp.ndarray q,
        ptrdiff_t first_row,
        cnp.ndarray out,
        *,
        base,
        int num_threads,
    ):
        """See `fastce.kernels.Kernels.distributions`; nothing is checked here."""
        kind = FASTCE_KL_DIVERGENCE if measure == "kl_divergence" else FASTCE_CROSS_ENTROPY
        return self._measure(kind, p, q, first_row, out, base, num_threads)

    cdef _measure(
        self, fastce_kind kind, cnp.ndarray p, cnp.ndarray q, ptrdiff_t first_row, cnp.ndarray out, base,
        int num_threads,
    ):
        cdef const fastce_kernels *kernels = self.of(cnp.PyArray_TYPE(p))
        cdef ptrdiff_t n_rows = cnp.PyArray_DIM(out, 0), tile, n_bad
        cdef fastce_measure measure
        if n_rows == 0:
            return 0
        _describe(&measure.rows, p, first_row, None)
        if q is not None:
            _describe_probs(&measure.rows, q)
        measure.kind = kind
        measure.of_2, measure.of_e = log_scale(base)
        measure.sums_agree = SUMS_AGREE
        measure.out = cnp.PyArray_DATA(out)
        tile = tile_rows(measure.rows.n_classes)
        if n_rows * measure.rows.n_classes < _KEEPS_LOCK:
            n_bad = _run_measure(kernels, &measure, n_rows, tile, 1)
        else:
            with nogil:
                n_bad = _run_measure(kernels, &measure, n_rows, tile, num_threads)
        if n_bad < 0:
            raise MemoryError("no memory for the scratch of fastce's kernels")
        return n_bad

    def information(self, cnp.ndarray p, cnp.ndarray out, *, base, int num_threads):
        """See `fastce.kernels.Kernels.information`; nothing is checked here."""
        cdef const fastce_kernels *kernels = self.of(cnp.PyArray_TYPE(p))
        cdef ptrdiff_t n = cnp.PyArray_DIM(p, 0)
        cdef fastce_measure measure
        measure.of_2, measure.of_e = log_scale(base)
        measure.rows.logits = cnp.PyArray_DATA(p)
        measure.out = cnp.PyArray_DATA(out)
        if n < _KEEPS_LOCK:
            return kernels.information(&measure, 0, n)
        with nogil:
            n = _run_information(kernels, &measure, n, num_threads)
        return n

    def binary(
        self,
        cnp.ndarray x,
        cnp.ndarray targets,
        cnp.ndarray losses,
        cnp.ndarray sums,
        *,
        bint from_logits,
        cnp.ndarray weight,
        cnp.ndarray pos_weight,
        double unit,
        cnp.ndarray scale,
        double grad_unit,
        cnp.ndarray grad,
        int num_threads,
    ):
        """See `fastce.kernels.Kernels.binary`; nothing is checked here."""
        cdef const fastce_kernels *kernels = self.of(cnp.PyArray_TYPE(x))
        cdef ptrdiff_t n = cnp.PyArray_DIM(x, 0)
        cdef double *sum_of = <double *>cnp.PyArray_DATA(sums)
        cdef fastce_binary call
        call.x = cnp.PyArray_DATA(x)
        call.targets = cnp.PyArray_DATA(targets)
        call.weight = _data(weight)
        call.pos_weight = _data(pos_weight)
        call.scale = _data(scale)
        call.unit, call.grad_unit = unit, grad_unit
        call.losses = _data(losses)
        call.grad = _data(grad)
        call.from_logits = from_logits
        if n < _KEEPS_LOCK:
            return kernels.binary(&call, 0, n, sum_of) if n else 0
        with nogil:
            n = _run_binary(kernels, &call, n, num_threads, sum_of)
        return n


cdef void *_data(cnp.ndarray x) noexcept:
    return NULL if x is None else cnp.PyArray_DATA(x)


cdef void _describe(fastce_call *call, cnp.ndarray logits, ptrdiff_t first_row, cnp.ndarray grad):
    """Fill in a call with logits and gradient, and nothing else."""
    cdef ptrdiff_t item = cnp.PyArray_ITEMSIZE(logits)
    memset(call, 0, sizeof(fastce_call))
    call.logits = cnp.PyArray_DATA(logits)
    call.outer_stride = cnp.PyArray_STRIDE(logits, 0) // item
    call.row_stride = cnp.PyArray_STRIDE(logits, 1) // item
    call.class_stride = cnp.PyArray_STRIDE(logits, 2) // item
    call.inner = cnp.PyArray_DIM(logits, 1)
    call.n_classes = cnp.PyArray_DIM(logits, 2)
    call.first_row = first_row
    if grad is not None:
        call.grad = cnp.PyArray_DATA(grad)
        call.grad_outer_stride = cnp.PyArray_STRIDE(grad, 0) // item
        call.grad_row_stride = cnp.PyArray_STRIDE(grad, 1) // item
        call.grad_class_stride = cnp.PyArray_STRIDE(grad, 2) // item
    if call.n_classes == 1:  # whatever stride an axis of length 1 has
        call.class_stride = call.grad_class_stride = 1


cdef _weight_sums(soft):
    """Return the sums of the weights of the first classes, by FASTCE_PREFIX, or None."""
    if soft is None or soft.weight is None:
        return None
    starts = np.arange(0, len(soft.weight), FASTCE_PREFIX)
    return np.append(0.0, np.add.reduceat(soft.weight.astype(np.float64), starts).cumsum())


cdef void _describe_probs(fastce_call *call, cnp.ndarray probs):
    cdef ptrdiff_t item = cnp.PyArray_ITEMSIZE(probs)
    call.probs = cnp.PyArray_DATA(probs)
    call.probs_outer_stride = cnp.PyArray_STRIDE(probs, 0) // item
    call.probs_row_stride = cnp.PyArray_STRIDE(probs, 1) // item
    call.probs_class_stride = 1 if call.n_classes == 1 else cnp.PyArray_STRIDE(probs, 2) // item


cdef void _describe_soft(fastce_call *call, soft, cnp.ndarray weight_sums):
    cdef cnp.ndarray weight = soft.weight
    call.soft = 1
    call.own = 1.0 - soft.smoothing
    call.even = soft.smoothing / call.n_classes
    if soft.probs is not None:
        _describe_probs(call, soft.probs)
    if weight is not None:
        call.weight = cnp.PyArray_DATA(weight)
        call.weight_sums = <const double *>cnp.PyArray_DATA(weight_sums)


cdef void _describe_stats(fastce_call *call, stats):
    call.stats = 1
    call.moments = stats.entropy is not None or stats.brier is not None
    call.lse = _data(stats.lse)
    call.target_logit = _data(stats.target_logit)
    call.max_logit = _data(stats.max_logit)
    call.entropy = _data(stats.entropy)
    call.max_prob = _data(stats.max_prob)
    call.brier = _data(stats.brier)
    call.argmax = <int64_t *>_data(stats.argmax)
    call.ranks = <int64_t *>_data(stats.rank)


cdef ptrdiff_t _item_rows(
    ptrdiff_t n_rows, ptrdiff_t tile, bint turned, bint streamed, int num_threads
) noexcept nogil:
    """Return how many rows, whole tiles of them, a thread takes at a time."""
    cdef ptrdiff_t share = n_rows // (4 * num_threads), rows = 1
    if turned:
        rows = max(16, min(_TURNED_ROWS, max(share, min(_TURNED_GROUP, n_rows // num_threads))))
    elif streamed:
        rows = max(1, min(_STREAMED_ROWS, share))
    return tile * ((rows + tile - 1) // tile)


cdef ptrdiff_t _run_tiles(
    const fastce_kernels *kernels, const fastce_call *call, ptrdiff_t n_rows, ptrdiff_t tile,
    int num_threads, double *sums,
) noexcept nogil:
    """Return the number of ignored rows, or -1 without memory."""
    cdef bint turned = (
        call.class_stride != 1
        or (call.grad != NULL and call.grad_class_stride != 1)
        or (call.probs != NULL and call.probs_class_stride != 1)
    )
    cdef ptrdiff_t step = _item_rows(n_rows, tile, turned, call.stream, num_threads)
    cdef ptrdiff_t n_items = (n_rows + step - 1) // step, item, chunk, n_ignored = 0
    cdef size_t size = kernels.scratch(call)
    cdef int n_threads = <int>min(<ptrdiff_t>num_threads, n_items)
    cdef char *scratch = NULL
    if size:
        size = (size + 127) // 64 * 64  # threads do not share a cache line
        scratch = <char *>malloc(size * n_threads)
        if scratch == NULL:
            return -1
    if n_threads == 1:
        for item in range(n_items):
            n_ignored += kernels.rows(call, item * step, min(step, n_rows - item * step), tile,
                                      scratch, sums + item * step // tile)
    else:
        chunk = max(1, n_items // (_TURNS * n_threads))
        for item in prange(n_items, num_threads=n_threads, schedule="dynamic", chunksize=chunk):
            n_ignored += kernels.rows(call, item * step, min(step, n_rows - item * step), tile,
                                      scratch + size * threadid(), sums + item * step // tile)
    free(scratch)
    return n_ignored


cdef ptrdiff_t _run_segments(
    const fastce_kernels *kernels, const fastce_call *call, ptrdiff_t n_rows, int num_threads,
    double *sums,
) noexcept nogil:
    """Rows so long that a thread does not get one for itself; a tile is one row then."""
    cdef ptrdiff_t n_segments = (call.n_classes + FASTCE_SEGMENT - 1) // FASTCE_SEGMENT
    cdef ptrdiff_t n_items = n_rows * n_segments, item, row, n_ignored = 0
    cdef size_t size = (kernels.scratch(call) + 127) // 64 * 64
    cdef char *scratch = <char *>malloc(size * num_threads)
    cdef fastce_part *parts = <fastce_part *>malloc(n_items * sizeof(fastce_part))
    if scratch == NULL or parts == NULL:
        free(scratch)
        free(parts)
        return -1
    for item in prange(n_items, num_threads=num_threads, schedule="static"):
        kernels.read_segment(call, item // n_segments, item % n_segments,
                             scratch + size * threadid(), parts + item)
    for row in range(n_rows):
        n_ignored += kernels.finish_segments(call, row, n_segments, parts + row * n_segments, sums + row)
    if call.grad != NULL:
        for item in prange(n_items, num_threads=num_threads, schedule="static"):
            kernels.write_segment(call, item // n_segments, item % n_segments,
                                  scratch + size * threadid(), parts + item // n_segments * n_segments)
    free(scratch)
    free(parts)
    return n_ignored


cdef ptrdiff_t _run_measure(
    const fastce_kernels *kernels, const fastce_measure *measure, ptrdiff_t n_rows, ptrdiff_t tile,
    int num_threads,
) noexcept nogil:
    """Return the number of rows with invalid probabilities, or -1 without memory."""
    cdef const fastce_call *call = &measure.rows
    cdef bint turned = call.class_stride != 1 or (call.probs != NULL and call.probs_class_stride != 1)
    cdef ptrdiff_t step = _item_rows(n_rows, tile, turned, 0, num_threads)
    cdef ptrdiff_t n_items = (n_rows + step - 1) // step, item, chunk, n_bad = 0
    cdef size_t size = (kernels.measure_scratch(measure) + 127) // 64 * 64
    cdef int n_threads = <int>min(<ptrdiff_t>num_threads, n_items)
    cdef char *scratch = <char *>malloc(size * n_threads)
    if scratch == NULL:
        return -1
    if n_threads == 1:
        for item in range(n_items):
            n_bad += kernels.measure(measure, item * step, min(step, n_rows - item * step), scratch)
    else:
        chunk = max(1, n_items // (_TURNS * n_threads))
        for item in prange(n_items, num_threads=n_threads, schedule="dynamic", chunksize=chunk):
            n_bad += kernels.measure(measure, item * step, min(step, n_rows - item * step),
                                     scratch + size * threadid())
    free(scratch)
    return n_bad


cdef ptrdiff_t _run_information(
    const fastce_kernels *kernels, const fastce_measure *measure, ptrdiff_t n, int num_threads
) noexcept nogil:
    cdef ptrdiff_t n_items = (n + _TILE - 1) // _TILE, item, n_bad = 0
    cdef ptrdiff_t chunk = max(1, n_items // (_TURNS * num_threads))
    for item in prange(n_items, num_threads=num_threads, schedule="dynamic", chunksize=chunk):
        n_bad += kernels.information(measure, item * _TILE, min(_TILE, n - item * _TILE))
    return n_bad


cdef ptrdiff_t _run_binary(
    const fastce_kernels *kernels, const fastce_binary *call, ptrdiff_t n, int num_threads, double *sums
) noexcept nogil:
    cdef ptrdiff_t n_items = (n + _TILE - 1) // _TILE, item, n_bad = 0
    cdef ptrdiff_t chunk = max(1, n_items // (_TURNS * num_threads))
    for item in prange(n_items, num_threads=num_threads, schedule="dynamic", chunksize=chunk):
        n_bad += kernels.binary(call, item * _TILE, min(_TILE, n - item * _TILE), sums + 2 * item)
    return n_bad
