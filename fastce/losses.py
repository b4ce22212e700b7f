"""Softmax cross-entropy and its gradient: check, choose a backend, run the kernels, reduce."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce import registry, threads
from fastce.kernels import Stats, array_sum, exact_sum, narrowed, tile_rows, widened
from fastce.problem import (
    FORMAT_NAMES,
    REDUCTIONS,
    Problem,
    check,
    check_grad_out,
    check_losses_out,
    check_normalizer,
    check_out,
    check_reduction,
    check_scale,
    grad_view,
    sliced,
    unraveled,
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
    weight: ArrayLike | None = ...,
    sample_weight: ArrayLike | None = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    reduction: Literal["mean", "sum"] = ...,
    normalizer: float | None = ...,
    base: float | None = ...,
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
    weight: ArrayLike | None = ...,
    sample_weight: ArrayLike | None = ...,
    ignore_index: int | None = ...,
    label_smoothing: float = ...,
    reduction: Literal["none"],
    normalizer: float | None = ...,
    base: float | None = ...,
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
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    base: float | None = None,
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
    targets : array_like of integers, or of float32, float64, float16 or bfloat16
        Class ids in [0, n_classes), of any integer dtype, shape of ``logits`` without the class axis;
        or the probability of each class, shape of ``logits``. Probabilities need not sum to 1.
    axis : int, default -1
        The class axis of ``logits``.
    weight : array_like, optional
        (n_classes,): a weight for each class, not negative.
    sample_weight : array_like, optional
        A weight for each row, shape of ``logits`` without the class axis, of any sign. Rows with weight
        0 are not read.
    ignore_index : int or None, default -100
        Rows with this class id are not read; their loss is 0 and they do not count in the mean.
    label_smoothing : float, default 0
        In [0, 1]: this share of each target is spread evenly over all classes.
    reduction : {"mean", "sum", "none"}, default "mean"
        The mean divides the sum by the sum of the kept rows' weights: ``weight[target] *
        sample_weight`` for class ids, ``sample_weight`` for probabilities. That is PyTorch's rule.
    normalizer : float, optional
        What the mean divides by instead: of all micro-batches together, for example.
    base : float, optional
        Of the logarithm: 2 gives bits. Default e, which gives nats.
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
        In nats, unless ``base`` is given. With "mean" and "sum" a float, accumulated in float64; the
        mean over no weight is NaN, the sum 0.0. With "none" an array of shape of ``logits`` without
        the class axis, float64 for float64 logits and float32 otherwise.

    Raises
    ------
    TypeError
        If a dtype is not supported; booleans and floats are not class ids.
    ValueError
        If a shape or the value of an argument is wrong, a probability is negative or NaN, or there are
        rows but no classes.
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

    With a share :math:`q_j` of the target for each class, which is what weights, probabilities and
    smoothing amount to, :math:`q_j = w_j ((1 - \epsilon) t_j + \epsilon / C)`, it is
    :math:`\sum_j q_j (m - x_j) + \sum_j q_j \log(1 + \sum_{j \ne k} e^{x_j - m})`.

    A logit of -inf has probability 0; if the target has a share there, the loss is +inf. A row that
    holds NaN or +inf, or -inf alone, has loss NaN. One pass over the logits; no temporary of their
    size.

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
    >>> round(fastce.cross_entropy(logits, [[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]], base=2), 6)
    1.325173
    """
    plain = all(option is None for option in (out, weight, sample_weight, normalizer, base, dtype))
    if plain and axis == -1 and label_smoothing == 0.0 and reduction in REDUCTIONS:
        done = _plain(logits, targets, ignore_index, reduction, False, None, num_threads, backend)
        if done is not None:
            return done[0]
    problem = check(
        logits,
        targets,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        base=base,
        dtype=dtype,
    )
    check_reduction(reduction)
    check_normalizer(normalizer, reduction)
    if out is not None:
        check_losses_out(out, problem, reduction)
    losses = np.empty(problem.n_rows, problem.dtype) if reduction == "none" else None
    total, n_bad = run(problem, losses=losses, num_threads=num_threads, backend=backend)
    divisor = _divisor(problem, problem.n_kept(n_bad), reduction, normalizer)
    reduced = _reduce(total, losses, problem, divisor)
    if out is None:
        return reduced
    out[...] = reduced
    return out


def cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | None = None,
    base: float | None = None,
    grad_output: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[float | _Array, _Array]:
    """Softmax cross-entropy and its gradient with respect to the logits.

    Parameters
    ----------
    logits, targets, axis, weight, sample_weight, ignore_index, label_smoothing, reduction, \
    normalizer, base, dtype, num_threads, backend
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
        ``softmax(logits) - one_hot(targets)`` or, in general, ``sum(q) * softmax(logits) - q`` with the
        shares q of `cross_entropy`; divided by what the mean divides by; 0 in ignored rows.

    Raises
    ------
    TypeError, ValueError, IndexError, BackendUnavailable
        As `cross_entropy`. Nothing has been written then, but if a probability is invalid: what ``out``
        holds is not defined in that case.

    Notes
    -----
    The target's component is minus the sum of the others, never p - 1, which cancels. Each component is
    at most 5 ULP off for float64 and 6 for float32, and within 0.51 for float16 and bfloat16; one below
    the smallest normal number may be 0. With several shares a component is a difference, and that many
    ULP of the larger term off. In a row with loss NaN every component is NaN.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> loss, grad = fastce.cross_entropy_with_grad(np.array([[0.0, 0.0]]), [1])
    >>> grad
    array([[ 0.5, -0.5]])
    """
    options = (weight, sample_weight, normalizer, base, grad_output, dtype)
    plain = all(option is None for option in options)
    if plain and axis == -1 and label_smoothing == 0.0 and reduction in REDUCTIONS:
        done = _plain(logits, targets, ignore_index, reduction, True, out, num_threads, backend)
        if done is not None and done[1] is not None:
            return done[0], done[1]
    problem = check(
        logits,
        targets,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        base=base,
        dtype=dtype,
        out=out,
    )
    check_reduction(reduction)
    check_normalizer(normalizer, reduction)
    shape = np.shape(logits)
    if out is not None:
        check_grad_out(out, problem, shape)
    divisor = _divisor(problem, problem.n_kept(), reduction, normalizer)
    scale = check_scale(grad_output, problem, reduction, divisor)
    losses = np.empty(problem.n_rows, problem.dtype) if reduction == "none" else None
    grad = np.empty(shape, problem.rows.array.dtype.newbyteorder("=")) if out is None else out
    total, n_bad = run(
        problem, losses=losses, scale=scale, grad=grad, num_threads=num_threads, backend=backend
    )
    if problem.probs is not None:
        problem.n_kept(n_bad)  # what only the kernels look for
    return _reduce(total, losses, problem, divisor), grad


def _plain(
    logits: ArrayLike,
    targets: ArrayLike,
    ignore_index: int | None,
    reduction: str,
    with_grad: bool,
    out: object,
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
        out,
    )
    if done is None or not mean:
        return done
    return float(done[0]) / len(logits), done[1]


def run(
    problem: Problem,
    *,
    losses: _Array | None = None,
    stats: Stats | None = None,
    scale: NDArray[np.float64] | None = None,
    grad: _Array | None = None,
    num_threads: int | None,
    backend: str | None,
) -> tuple[float, int]:
    """Run the kernels over a problem's slices, filling what is asked for.

    ``losses`` and ``stats`` are flat and contiguous, (n_rows,), in the kernels' dtypes; ``grad``, which
    needs ``scale``, has the shape of the logits and any layout. Returns the sum of the losses and how
    many targets were bad, for `Problem.n_kept`.
    """
    view, targets, n_classes = problem.rows, np.ascontiguousarray(problem.targets), problem.n_classes
    kernels = registry.load(registry.choose(backend, view.format.name))
    count = threads.resolve(num_threads, view.n_rows * n_classes, kernels.max_threads)
    if losses is None:
        losses = np.empty(view.n_rows, problem.dtype)
    weights, soft = problem.row_weights, problem.soft()
    inputs = [view] if problem.probs is None else [view, problem.probs]
    out = None if grad is None else grad_view(grad, problem)
    stream = out is not None and streams(out.array, view.array)
    tile = tile_rows(n_classes)
    sums: list[float] = []
    n_bad = 0
    for rows, first_row, blocks, block in sliced(n_classes, inputs, out):
        tile_sums = np.empty(-(-(rows.stop - rows.start) // tile))
        n_bad += kernels.rows(
            blocks[0],
            first_row,
            targets[rows],
            losses[rows],
            tile_sums,
            row_weights=None if weights is None else weights[rows],
            soft=soft and soft._replace(probs=blocks[1] if len(blocks) > 1 else None),
            stats=None if stats is None else Stats(*(a if a is None else a[rows] for a in stats)),
            scale=None if scale is None else scale[rows],
            grad=block,
            stream=stream,
            num_threads=count,
        )
        sums += tile_sums.tolist()
    return exact_sum(sums), n_bad


def streams(out: _Array, array: _Array) -> bool:
    """Whether what is computed from an array may be written past the caches."""
    return out.nbytes >= _STREAM_BYTES and not np.may_share_memory(out, array)


def _divisor(problem: Problem, n_kept: int, reduction: str, normalizer: float | None) -> float:
    """Return what the sum of the losses is divided by."""
    if reduction != "mean":
        return 1.0
    return problem.total_weight(n_kept) if normalizer is None else normalizer


def _reduce(total: float, losses: _Array | None, problem: Problem, divisor: float) -> float | _Array:
    if losses is not None:
        return losses.reshape(problem.batch_shape)
    return total / divisor if divisor else math.nan


def nll_loss(
    log_probs: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normalizer: float | None = None,
    base: float | None = None,
    dtype: DTypeLike | None = None,
) -> float | _Array:
    """Negative log-likelihood of class ids, given the logarithms of the probabilities.

    Parameters
    ----------
    log_probs : array_like of float32, float64, float16 or bfloat16
        Such as from `log_softmax`; layouts and dtypes as the logits of `cross_entropy`.
    targets : array_like of integers
        Class ids, shape of ``log_probs`` without the class axis.
    axis, weight, sample_weight, ignore_index, reduction, normalizer, base, dtype
        As in `cross_entropy`. ``base`` divides the loss, as it does there: the log-probabilities are in
        nats.

    Returns
    -------
    float or ndarray
        As from `cross_entropy`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy`.

    See Also
    --------
    cross_entropy : The same of logits, in one pass.

    Notes
    -----
    ``-weight[target] * sample_weight * log_probs[target]`` of each row; nothing else in the row is
    read. One number a row is all the work, so there is no choice of backend and threads.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> round(fastce.nll_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), [0, 1], base=2), 6)
    1.5
    """
    problem = _check_log_probs(
        log_probs, targets, axis, weight, sample_weight, ignore_index, base, dtype
    )
    check_reduction(reduction)
    check_normalizer(normalizer, reduction)
    divisor = _divisor(problem, problem.n_kept(), reduction, normalizer)
    return _reduce_picked(problem, reduction, divisor)


def nll_loss_with_grad(
    log_probs: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normalizer: float | None = None,
    base: float | None = None,
    grad_output: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
) -> tuple[float | _Array, _Array]:
    """Negative log-likelihood and its gradient with respect to the log-probabilities.

    Parameters
    ----------
    log_probs, targets, axis, weight, sample_weight, ignore_index, reduction, normalizer, base, dtype
        As in `nll_loss`.
    grad_output, out
        As in `cross_entropy_with_grad`; ``out`` may not be ``log_probs``.

    Returns
    -------
    loss : float or ndarray
        As from `nll_loss`.
    grad : ndarray
        Shape of ``log_probs``, dtype of ``out`` or of ``log_probs``: minus the row's weight at the
        target, divided by what the mean divides by; 0 elsewhere.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy`; nothing has been written then.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.nll_loss_with_grad(np.log([[0.25, 0.75], [0.5, 0.5]]), [0, 1])[1].tolist()
    [[-0.5, 0.0], [0.0, -0.5]]
    """
    problem = _check_log_probs(
        log_probs, targets, axis, weight, sample_weight, ignore_index, base, dtype
    )
    check_reduction(reduction)
    check_normalizer(normalizer, reduction)
    shape = np.shape(log_probs)
    if out is not None:
        check_out(out, shape, [("log_probs", np.asarray(log_probs)), ("targets", np.asarray(targets))])
    divisor = _divisor(problem, problem.n_kept(), reduction, normalizer)
    scale = check_scale(grad_output, problem, reduction, divisor)
    reduced = _reduce_picked(problem, reduction, divisor)
    if out is None:
        out = np.zeros(shape, problem.rows.array.dtype.newbyteorder("="))
    else:
        out[...] = 0
    grad = np.moveaxis(out, problem.axis, -1)
    kept = np.flatnonzero(problem.kept())
    values = narrowed(0.0 - scale[kept], out.dtype)
    grad[(*unraveled(kept, problem.batch_shape), problem.targets[kept])] = values
    return reduced, out


def _check_log_probs(
    log_probs: ArrayLike,
    targets: ArrayLike,
    axis: int,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    ignore_index: int | None,
    base: float | None,
    dtype: DTypeLike | None,
) -> Problem:
    problem = check(
        log_probs,
        targets,
        axis=axis,
        weight=weight,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        base=base,
        dtype=dtype,
        name="log_probs",
    )
    if problem.probs is not None:
        raise TypeError("targets: nll_loss takes class ids; for class probabilities use cross_entropy")
    return problem


def _reduce_picked(problem: Problem, reduction: str, divisor: float) -> float | _Array:
    """Return the losses of the rows, from the targets' log-probabilities, or their sum or mean."""
    losses = np.zeros(problem.n_rows, problem.dtype)
    kept = np.flatnonzero(problem.kept())
    at = (*unraveled(kept, problem.batch_shape), problem.targets[kept])
    with np.errstate(invalid="ignore"):  # a weight of 0 times -inf, made 0 below
        loss = 0.0 - widened(problem.rows.array[at])  # 0 - 0 is not -0
        weights = problem.row_weights
        if weights is not None:
            loss = np.where((weights[kept] == 0) & ~np.isnan(loss), 0.0, loss * weights[kept])
    losses[kept] = loss
    if reduction == "none":
        return _reduce(0.0, losses, problem, divisor)
    return _reduce(array_sum(losses.astype(np.float64)), None, problem, divisor)
