"""Softmax cross-entropy and its gradient: check, choose a backend, run the kernels, reduce."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce import registry, threads
from fastce.kernels import exact_sum, tile_rows
from fastce.problem import (
    FORMAT_NAMES,
    REDUCTIONS,
    Problem,
    RowView,
    check,
    check_grad_out,
    check_losses_out,
    check_reduction,
    check_scale,
    format_of,
)

_Array = NDArray[Any]

# A gradient of this size or more, too large for L2, may be written past the caches. With 2 threads that
# took 0.9 of the time at 10 classes and as long at 32 000, where arithmetic was the limit; where memory
# is, it saves a third of the traffic. Which rows gain is for the kernels to know.
_STREAM_BYTES = 2**24


@overload
def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = ...,
    ignore_index: int | None = ...,
    reduction: Literal["mean", "sum"] = ...,
    dtype: DTypeLike | None = ...,
    out: None = ...,
    num_threads: int | None = ...,
    backend: str | None = ...,
) -> float: ...
@overload
def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = ...,
    ignore_index: int | None = ...,
    reduction: Literal["none"],
    dtype: DTypeLike | None = ...,
    out: _Array | None = ...,
    num_threads: int | None = ...,
    backend: str | None = ...,
) -> _Array: ...
def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> float | _Array:
    r"""Softmax cross-entropy between logits and class ids.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16
        Unnormalised log-probabilities, of any shape, with the classes along ``axis``. Any memory
        layout; never copied as a whole, never written to. bfloat16: as ``ml_dtypes.bfloat16``, or as
        uint16 with ``dtype="bfloat16"``.
    targets : array_like of integers
        Class ids in [0, n_classes), of any integer dtype; shape of ``logits`` without the class axis.
    axis : int, default -1
        The class axis of ``logits``.
    ignore_index : int or None, default -100
        Rows with this target are not read; their loss is 0 and they do not count in the mean.
    reduction : {"mean", "sum", "none"}, default "mean"
        Mean over the kept rows, sum, or the loss of each row.
    dtype : str or dtype, optional
        ``"bfloat16"`` says that uint16 logits hold its bits.
    out : ndarray of float32 or float64, optional
        With ``reduction="none"``: where to store the losses; shape of ``targets``.
    num_threads : int, optional
        Default: `set_num_threads`, else FASTCE_NUM_THREADS, else the cores this process may use.
        The result has the same bits for any number.
    backend : str, optional
        A name from `backends`, or "cython". Default: `use_backend`, else FASTCE_BACKEND, else the
        fastest one available.

    Returns
    -------
    float or ndarray
        In nats. With "mean" and "sum" a float, accumulated in float64; the mean over no rows is NaN,
        the sum 0.0. With "none" an array of shape of ``targets``, float64 for float64 logits and
        float32 otherwise.

    Raises
    ------
    TypeError
        If a dtype is not supported; booleans and floats are not class ids.
    ValueError
        If a shape, ``axis``, ``reduction``, ``out`` or ``num_threads`` is wrong, or there are rows but
        no classes.
    IndexError
        If a target is outside [0, n_classes) and not ``ignore_index``; names the first one. Nothing has
        been written then.
    BackendUnavailable
        If the backend asked for cannot run here.

    See Also
    --------
    cross_entropy_with_grad : The gradient too, for little more than the loss.

    Notes
    -----
    With :math:`m = \max_j x_j`, k a class that attains it and t the target, the loss of a row is
    :math:`(m - x_t) + \log(1 + \sum_{j \ne k} e^{x_j - m})`, computed so that it keeps its relative
    accuracy when the target's probability is next to 1 and does not change, in any bit, when a row is
    shifted exactly: at most 4 ULP off for float64 logits and 5 for float32 [1]_.

    A logit of -inf has probability 0; if it is the target's, the loss is +inf. A row that holds NaN or
    +inf, or -inf alone, has loss NaN. One pass over the logits; no temporary of their size.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
       softmax functions", IMA Journal of Numerical Analysis 41 (4), 2021.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> logits = np.array([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]])
    >>> fastce.cross_entropy(logits, [0, 2], reduction="none").round(6)
    array([0.41703, 2.42005])
    >>> round(fastce.cross_entropy(logits, [0, -100]), 6)
    0.41703
    """
    if out is None and dtype is None and axis == -1 and reduction in REDUCTIONS:
        done = _plain(logits, targets, ignore_index, reduction, False, num_threads, backend)
        if done is not None:
            return done[0]
    problem = check(logits, targets, axis=axis, ignore_index=ignore_index, dtype=dtype)
    check_reduction(reduction)
    if out is not None:
        check_losses_out(out, problem, reduction)
    losses = np.empty(problem.n_rows, problem.dtype) if reduction == "none" else None
    total, n_outside = run(problem, losses=losses, num_threads=num_threads, backend=backend)
    reduced = _reduce(total, losses, problem, problem.n_kept(n_outside), reduction)
    if out is None:
        return reduced
    out[...] = reduced
    return out


def cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    grad_output: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[float | _Array, _Array]:
    """Softmax cross-entropy and its gradient with respect to the logits.

    Parameters
    ----------
    logits, targets, axis, ignore_index, reduction, dtype, num_threads, backend
        As in `cross_entropy`.
    grad_output : array_like, optional
        Upstream gradient of the loss: a scalar, or with ``reduction="none"`` also one value for each
        row (shape of ``targets``). Default 1.
    out : ndarray of float32, float64, float16 or bfloat16, optional
        Where to store the gradient; shape of ``logits``. ``out=logits`` works in place. When it is
        large, a fresh array for each call costs more than the kernel: pass one to reuse.

    Returns
    -------
    loss : float or ndarray
        As from `cross_entropy`.
    grad : ndarray
        Shape of ``logits``, dtype of ``out`` or of ``logits``: ``grad_output`` times
        ``softmax(logits) - one_hot(targets)``, divided by the number of kept rows if the reduction is
        the mean; 0 in ignored rows.

    Raises
    ------
    TypeError, ValueError, IndexError, BackendUnavailable
        As `cross_entropy`; nothing has been written then.

    Notes
    -----
    The target's component is minus the sum of the others, never p - 1, which cancels. Each component is
    at most 5 ULP off for float64 and 6 for float32, and within 0.51 for float16 and bfloat16; one below
    the smallest normal number may be 0. In a row with loss NaN every component is NaN.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> loss, grad = fastce.cross_entropy_with_grad(np.array([[0.0, 0.0]]), [1])
    >>> grad
    array([[ 0.5, -0.5]])
    """
    if out is grad_output is dtype is None and axis == -1 and reduction in REDUCTIONS:
        done = _plain(logits, targets, ignore_index, reduction, True, num_threads, backend)
        if done is not None and done[1] is not None:
            return done[0], done[1]
    problem = check(logits, targets, axis=axis, ignore_index=ignore_index, dtype=dtype, out=out)
    check_reduction(reduction)
    shape = np.shape(logits)
    if out is not None:
        check_grad_out(out, problem, shape)
    n_kept = problem.n_kept()
    scale = check_scale(grad_output, problem, reduction, n_kept)
    losses = np.empty(problem.n_rows, problem.dtype) if reduction == "none" else None
    grad = np.empty(shape, problem.rows.array.dtype.newbyteorder("=")) if out is None else out
    total, _ = run(
        problem,
        losses=losses,
        scale=scale,
        grad=grad if axis == -1 else np.moveaxis(grad, problem.axis, -1),
        num_threads=num_threads,
        backend=backend,
    )
    return _reduce(total, losses, problem, n_kept, reduction), grad


def _plain(
    logits: ArrayLike,
    targets: ArrayLike,
    ignore_index: int | None,
    reduction: str,
    with_grad: bool,
    num_threads: int | None,
    backend: str | None,
) -> tuple[float | _Array, _Array | None] | None:
    """Return loss and gradient of a small call of plain arrays, or None: take the long way."""
    if type(logits) is not np.ndarray or logits.size >= threads.SERIAL_ELEMENTS:
        return None
    name = FORMAT_NAMES.get(logits.dtype)
    if name is None:
        return None
    threads.requested(num_threads)
    mean = reduction == "mean"
    done = registry.load(registry.choose(backend, name)).plain(
        logits,
        targets,
        ignore_index,
        threads.SERIAL_ELEMENTS,
        reduction == "none",
        None if not with_grad else 1.0 / len(logits) if mean else 1.0,
    )
    if done is None or not mean:
        return done
    return float(done[0]) / len(logits), done[1]


def run(
    problem: Problem,
    *,
    losses: _Array | None = None,
    ranks: _Array | None = None,
    scale: NDArray[np.float64] | None = None,
    grad: _Array | None = None,
    num_threads: int | None,
    backend: str | None,
) -> tuple[float, int]:
    """Run the kernels over a problem's slices, filling what is asked for.

    ``losses`` and ``ranks`` are flat and contiguous, (n_rows,), in the kernels' dtypes; ``grad``, which
    needs ``scale``, has the class axis last and any layout. Returns the sum of the losses and how many
    targets were outside [0, n_classes).
    """
    view, targets = problem.rows, problem.targets
    kernels = registry.load(registry.choose(backend, view.format.name))
    n_elements = view.n_rows * problem.n_classes
    count = threads.resolve(num_threads, n_elements, kernels.max_threads)
    if losses is None:
        losses = np.empty(view.n_rows, problem.dtype)
    out = None if grad is None else _rows_of(grad, problem)
    stream = (
        grad is not None and grad.nbytes >= _STREAM_BYTES and not np.may_share_memory(grad, view.array)
    )
    tile = tile_rows(problem.n_classes)
    sums: list[float] = []
    n_outside = 0
    for rows in problem.slices() if out is None else problem.slices(out):
        n_rows = rows.stop - rows.start
        tile_sums = np.empty(-(-n_rows // tile))
        x, block, first_row = view.blocks, None if out is None else out.blocks, rows.start
        if x is None or not view.direct or (out is not None and not out.direct):
            x, first_row = view.read(rows), 0
            block = None if out is None else np.empty(x.shape, x.dtype)
        n_outside += kernels.rows(
            x,
            first_row,
            targets[rows],
            losses[rows],
            tile_sums,
            ranks=None if ranks is None else ranks[rows],
            scale=None if scale is None else scale[rows],
            grad=block,
            stream=stream,
            num_threads=count,
        )
        if out is not None and block is not None and block is not out.blocks:
            out.write(rows, block)
        sums += tile_sums.tolist()
    return exact_sum(sums), n_outside


def _rows_of(grad: _Array, problem: Problem) -> RowView:
    bits = "bfloat16" if grad.dtype == np.uint16 else None
    return RowView(grad, format_of(grad, "out", bits), problem.rows.format)


def _reduce(
    total: float, losses: _Array | None, problem: Problem, n_kept: int, reduction: str
) -> float | _Array:
    if losses is not None:
        return losses.reshape(problem.batch_shape)
    if reduction == "sum":
        return total
    return total / n_kept if n_kept else math.nan
