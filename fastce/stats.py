"""What one read of the logits tells about each row, beyond its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce.kernels import Stats
from fastce.losses import run
from fastce.problem import check, check_rows


class RowStats(NamedTuple):
    """The arrays `row_stats` was asked for; None stands for the others."""

    loss: NDArray[Any] | None = None
    lse: NDArray[Any] | None = None
    target_logit: NDArray[Any] | None = None
    max_logit: NDArray[Any] | None = None
    argmax: NDArray[np.int64] | None = None
    rank: NDArray[np.int64] | None = None
    entropy: NDArray[Any] | None = None
    max_prob: NDArray[Any] | None = None
    brier: NDArray[Any] | None = None


_OUTPUTS = RowStats._fields
_NEED_TARGETS = frozenset({"loss", "target_logit", "rank", "brier"})


def row_stats(
    logits: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    dtype: DTypeLike | None = None,
    outputs: Sequence[str] | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> RowStats:
    """Loss, rank, entropy and more of each row, from one read of the logits.

    Parameters
    ----------
    logits, axis, ignore_index, dtype, num_threads, backend
        As in `cross_entropy`.
    targets : array_like of integers, optional
        Class ids. Without them there is no loss, target_logit, rank and brier.
    outputs : sequence of str, optional
        The arrays wanted, by the names below. Default: all that the arguments allow. What is not asked
        for is not computed.

    Returns
    -------
    RowStats
        A named tuple of arrays of shape of ``logits`` without the class axis; float64 for float64
        logits and float32 otherwise, but for the two of int64:

        ``loss``
            As from ``cross_entropy(..., reduction="none")``, in nats.
        ``lse``
            ``logsumexp(logits)``.
        ``target_logit``, ``max_logit``
            The target's logit, the largest one.
        ``argmax``
            int64: the class of the largest logit, the first of several. -1 in rows whose loss is NaN.
        ``rank``
            int64: how many classes come before the target by decreasing logit, equal logits by
            class id, so a top-k hit is ``0 <= rank < k``, and 0 means that argmax is the target. -1 in
            rows whose loss is NaN.
        ``entropy``
            Of ``softmax(logits)``, in nats.
        ``max_prob``
            The largest probability.
        ``brier``
            ``sum((softmax(logits) - one_hot(target)) ** 2)``, in [0, 2].

        Ignored rows are not read: their loss is 0, argmax and rank -1, all else NaN.

    Raises
    ------
    ValueError
        If ``outputs`` names anything else, or what needs targets; and as `cross_entropy`.
    TypeError, IndexError, BackendUnavailable
        As `cross_entropy`.

    Notes
    -----
    Entropy and Brier score are sums of positive terms, as accurate as the loss where a row is nearly
    certain: ``log(sum) + sum_j p_j (m - x_j)`` with the maximum m, and the squares of the other
    classes' probabilities and of their sum.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> stats = fastce.row_stats(np.array([[2.0, 1.0, 0.1]]), [1], outputs=["rank", "max_prob"])
    >>> stats.rank, stats.max_prob.round(4)
    (array([1]), array([0.659]))
    """
    if outputs is None:
        outputs = [name for name in _OUTPUTS if targets is not None or name not in _NEED_TARGETS]
    for name in outputs:
        if name not in _OUTPUTS:
            raise ValueError(f"outputs: expected names out of {_OUTPUTS}, got {name!r}")
        if targets is None and name in _NEED_TARGETS:
            raise ValueError(f"outputs: {name!r} needs targets, and none were given")
    if targets is None:
        problem = check_rows(logits, axis=axis, dtype=dtype)
    else:
        problem = check(logits, targets, axis=axis, ignore_index=ignore_index, dtype=dtype)
        if problem.probs is not None:
            raise TypeError("targets: row_stats takes class ids, not class probabilities")
    arrays = {
        name: np.empty(problem.n_rows, np.int64 if name in ("argmax", "rank") else problem.dtype)
        for name in outputs
    }
    stats = {name: array for name, array in arrays.items() if name != "loss"}
    _, n_bad = run(
        problem,
        losses=arrays.get("loss"),
        stats=Stats(**stats) if stats else None,
        num_threads=num_threads,
        backend=backend,
    )
    problem.n_kept(n_bad)
    return RowStats(**{name: array.reshape(problem.batch_shape) for name, array in arrays.items()})
