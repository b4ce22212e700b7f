"""Softmax, its logarithm, and the logarithm of the sum that normalises it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce import registry, threads
from fastce.kernels import Stats
from fastce.losses import run, streams
from fastce.problem import check_grad_out, check_result_out, check_rows, grad_view, sliced

_Array = NDArray[Any]


def softmax(
    logits: ArrayLike,
    *,
    axis: int = -1,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> _Array:
    """Probability of each class.

    Parameters
    ----------
    logits, axis, dtype, num_threads, backend
        As in `fastce.cross_entropy`.
    out : ndarray of float32, float64, float16 or bfloat16, optional
        Where to store the result; shape of ``logits``. ``out=logits`` works in place.

    Returns
    -------
    ndarray
        Shape of ``logits``, dtype of ``out`` or of ``logits``. Each number is at most 5 ULP off for
        float64 and 6 for float32, and within 0.51 for float16 and bfloat16; one below the smallest
        normal number may be 0.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `fastce.cross_entropy`.

    Notes
    -----
    A logit of -inf gives exactly 0. A row that holds NaN or +inf, or -inf alone, is NaN.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.softmax(np.array([0.0, np.log(3.0), -np.inf]))
    array([0.25, 0.75, 0.  ])
    """
    return _activate(logits, axis, dtype, out, num_threads, backend, log=False)


def log_softmax(
    logits: ArrayLike,
    *,
    axis: int = -1,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> _Array:
    """Logarithm of the probability of each class, in nats.

    Parameters
    ----------
    logits, axis, dtype, num_threads, backend
        As in `fastce.cross_entropy`.
    out : ndarray of float32, float64, float16 or bfloat16, optional
        Where to store the result; shape of ``logits``. ``out=logits`` works in place.

    Returns
    -------
    ndarray
        Shape of ``logits``, dtype of ``out`` or of ``logits``. At most 4 ULP off for float64 and 5 for
        float32, also where the probability is next to 1, and within 0.51 for float16 and bfloat16.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `fastce.cross_entropy`.

    See Also
    --------
    fastce.nll_loss : Of these and class ids, what `fastce.cross_entropy` is of the logits.

    Notes
    -----
    A logit of -inf gives -inf. A row that holds NaN or +inf, or -inf alone, is NaN. To score class ids,
    `fastce.cross_entropy` reads the logits once and writes nothing of their size.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.log_softmax(np.array([40.0, 0.0])).tolist()
    [-4.248354255291589e-18, -40.0]
    """
    return _activate(logits, axis, dtype, out, num_threads, backend, log=True)


def logsumexp(
    logits: ArrayLike,
    *,
    axis: int = -1,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> _Array:
    """Logarithm of the sum of the exponentials along an axis.

    Parameters
    ----------
    logits, axis, dtype, num_threads, backend
        As in `fastce.cross_entropy`.
    out : ndarray of float32 or float64, optional
        Where to store the result; shape of ``logits`` without the class axis.

    Returns
    -------
    ndarray
        Shape of ``logits`` without the class axis, float64 for float64 logits and float32 otherwise.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `fastce.cross_entropy`.

    Notes
    -----
    -inf alone gives -inf, +inf without NaN gives +inf. Where the sum is next to 1, so that its
    logarithm is next to 0, the result is as accurate as the larger of its two terms, the maximum and
    the rest.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.logsumexp(np.array([[1e4, 1e4], [-np.inf, -np.inf]])).round(4)
    array([10000.6931,       -inf])
    """
    problem = check_rows(logits, axis=axis, dtype=dtype)
    if out is not None:
        check_result_out(out, problem)
    lse = np.empty(problem.n_rows, problem.dtype)
    run(problem, stats=Stats(lse=lse), num_threads=num_threads, backend=backend)
    found = lse.reshape(problem.batch_shape)
    if out is None:
        return found
    out[...] = found
    return out


def _activate(
    logits: ArrayLike,
    axis: int,
    dtype: DTypeLike | None,
    out: _Array | None,
    num_threads: int | None,
    backend: str | None,
    log: bool,
) -> _Array:
    problem = check_rows(logits, axis=axis, dtype=dtype, out=out)
    shape = np.shape(logits)
    if out is not None:
        check_grad_out(out, problem, shape)
    view, n_classes = problem.rows, problem.n_classes
    result = np.empty(shape, view.array.dtype.newbyteorder("=")) if out is None else out
    kernels = registry.load(registry.choose(backend, view.format.name))
    count = threads.resolve(num_threads, view.n_rows * n_classes, kernels.max_threads)
    written, stream = grad_view(result, problem), streams(result, view.array)
    for rows, first_row, (block,), into in sliced(n_classes, [view], written):
        assert into is not None
        kernels.softmax(
            block,
            first_row,
            rows.stop - rows.start,
            into,
            log=log,
            stream=stream,
            num_threads=count,
        )
    return result
