# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True
"""Tiles of rows, spread over threads: the driver of the C kernels in rows.h."""

from cython.parallel cimport prange
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t

ctypedef fused real:
    float
    double

cdef extern from "rows.h" nogil:
    ctypedef double (*fastce_rows_f32)(
        const float *, ptrdiff_t, const int64_t *, ptrdiff_t, ptrdiff_t, float *, int64_t *,
        const double *, ptrdiff_t, float *, ptrdiff_t) noexcept nogil
    ctypedef double (*fastce_rows_f64)(
        const double *, ptrdiff_t, const int64_t *, ptrdiff_t, ptrdiff_t, double *, int64_t *,
        const double *, ptrdiff_t, double *, ptrdiff_t) noexcept nogil
    fastce_rows_f32 fastce_find_rows_f32(const char *isa)
    fastce_rows_f64 fastce_find_rows_f64(const char *isa)

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


def max_threads():
    """Return the most threads OpenMP would use now; 1 without OpenMP."""
    return omp_get_max_threads()


def runs_here(str isa):
    """Return whether the kernels of an instruction set are compiled in and can run."""
    return fastce_find_rows_f32(isa.encode()) != NULL


def rows(
    str isa,
    const real[:, :] logits,
    const int64_t[::1] targets,
    real[::1] losses,
    double[::1] tile_sums,
    int64_t[::1] ranks,
    const double[:] scale,
    real[:, :] grad,
    ptrdiff_t tile_rows,
    int num_threads,
):
    """Write the losses of all rows, each tile's sum and, where not None, ranks and gradient.

    The contract is that of `fastce.kernels.Kernels.rows`; nothing is checked here.
    """
    cdef ptrdiff_t n_rows = logits.shape[0], n_classes = logits.shape[1]
    cdef ptrdiff_t n_tiles = tile_sums.shape[0], tile, start, size
    cdef ptrdiff_t stride = logits.strides[0] // <ptrdiff_t>sizeof(real)
    cdef ptrdiff_t scale_stride = 0, grad_stride = 0
    cdef const real *x
    cdef const double *s = NULL
    cdef real *g = NULL
    cdef int64_t *r = NULL
    cdef fastce_rows_f32 f32 = fastce_find_rows_f32(isa.encode())
    cdef fastce_rows_f64 f64 = fastce_find_rows_f64(isa.encode())
    if n_rows == 0:
        return
    x = &logits[0, 0]
    if ranks is not None:
        r = &ranks[0]
    if grad is not None:
        s, scale_stride = &scale[0], scale.strides[0] // <ptrdiff_t>sizeof(double)
        g, grad_stride = &grad[0, 0], grad.strides[0] // <ptrdiff_t>sizeof(real)
    for tile in prange(n_tiles, nogil=True, num_threads=num_threads, schedule="static"):
        start = tile * tile_rows
        size = min(tile_rows, n_rows - start)
        if real is float:
            tile_sums[tile] = f32(
                x + start * stride, stride, &targets[start], size, n_classes, &losses[start],
                r + start if r != NULL else NULL, s + start * scale_stride, scale_stride,
                g + start * grad_stride if g != NULL else NULL, grad_stride)
        else:
            tile_sums[tile] = f64(
                x + start * stride, stride, &targets[start], size, n_classes, &losses[start],
                r + start if r != NULL else NULL, s + start * scale_stride, scale_stride,
                g + start * grad_stride if g != NULL else NULL, grad_stride)
