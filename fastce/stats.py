"""What one read of the logits tells about each row, beyond its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce.losses import run
from fastce.problem import check

_OUTPUTS = ("loss", "rank")


class RowStats(NamedTuple):
    """The arrays `row_stats` was asked for; None stands for the others."""

    loss: NDArray[Any] | None
    rank: NDArray[np.int64] | None


def row_stats(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    ignore_index: int | None = -100,
    dtype: DTypeLike | None = None,
    outputs: Sequence[str] = _OUTPUTS,
    num_threads: int | None = None,
    backend: str | None = None,
) -> RowStats:
    """Loss and rank of each row, from one read of the logits.

    Parameters
    ----------
    logits, targets, axis, ignore_index, dtype, num_threads, backend
        As in `cross_entropy`.
    outputs : sequence of {"loss", "rank"}
        The arrays wanted.

    Returns
    -------
    RowStats
        A named tuple of arrays of shape of ``targets``:

        ``loss``
            As from ``cross_entropy(..., reduction="none")``, in nats.
        ``rank``
            int64: how many classes come before the target by decreasing logit, equal logits by
            class id, so a top-k hit is ``0 <= rank < k``. -1 in ignored rows and in rows whose
            loss is NaN.

    Raises
    ------
    ValueError
        If ``outputs`` names anything else; and as `cross_entropy`.
    TypeError, IndexError, BackendUnavailable
        As `cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.row_stats(np.array([[2.0, 1.0, 0.1]]), [1], outputs=["rank"]).rank
    array([1])
    """
    for name in outputs:
        if name not in _OUTPUTS:
            raise ValueError(f"outputs: expected names out of {_OUTPUTS}, got {name!r}")
    problem = check(logits, targets, axis=axis, ignore_index=ignore_index, dtype=dtype)
    loss = np.empty(problem.n_rows, problem.dtype) if "loss" in outputs else None
    rank = np.empty(problem.n_rows, np.int64) if "rank" in outputs else None
    _, n_outside = run(problem, losses=loss, ranks=rank, num_threads=num_threads, backend=backend)
    problem.n_kept(n_outside)
    shape = problem.batch_shape
    return RowStats(
        None if loss is None else loss.reshape(shape), None if rank is None else rank.reshape(shape)
    )
