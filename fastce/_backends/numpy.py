"""The readable specification of the kernels, and the fallback that runs everywhere.

Each block of rows is computed in float64, whatever the logits' dtype, and rounded once. With
float64 logits ``x - m`` rounds; what it rounds away is carried into the exponential, as in the
compiled kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import Kernels, exact_sum, tile_rows

# Rows are taken a block at a time, so that temporaries stay in cache and memory stays bounded.
_BLOCK_ELEMENTS = 65_536


class _Rows(NamedTuple):
    """A block of kept rows, all float64."""

    x: NDArray[np.float64]  # (n, n_classes) the logits
    targets: NDArray[np.int64]  # (n,)
    exps: NDArray[np.float64]  # (n, n_classes) exp(x - m), 0 at one maximum
    top: NDArray[np.intp]  # (n,) the class of that maximum
    gap: NDArray[np.float64]  # (n,) m - x_t
    rest: NDArray[np.float64]  # (n,) the sum of exps: of all classes but one maximum


def load(isa: str | None) -> Kernels:
    """Return the kernels; NumPy chooses its own instruction sets."""
    return NumpyKernels()


class NumpyKernels(Kernels):
    """`fastce.kernels.Kernels` in NumPy."""

    def max_threads(self) -> int:
        """Return 1: NumPy's element-wise loops use the calling thread."""
        return 1

    @np.errstate(all="ignore")  # inf - inf is how a row that is not finite becomes NaN
    def rows(
        self,
        logits: NDArray[Any],
        first_row: int,
        targets: NDArray[np.int64],
        losses: NDArray[Any],
        tile_sums: NDArray[np.float64],
        *,
        ranks: NDArray[np.int64] | None,
        scale: NDArray[np.float64] | None,
        grad: NDArray[Any] | None,
        stream: bool,
        num_threads: int,
    ) -> int:
        """See `fastce.kernels.Kernels.rows`."""
        _, inner, n_classes = logits.shape
        ignored = (targets < 0) | (targets >= n_classes)
        kept = np.flatnonzero(~ignored)
        losses[ignored] = 0
        if ranks is not None:
            ranks[ignored] = -1
        step = max(1, _BLOCK_ELEMENTS // n_classes)
        for start in range(0, len(kept), step):
            at = kept[start : start + step]
            where = divmod(first_row + at, inner)
            rows = _exponentials(_widened(logits[where]), targets[at])
            losses[at] = _loss(rows)
            if ranks is not None:
                ranks[at] = np.where(np.isnan(rows.rest), -1, _rank(rows))
            if grad is not None and scale is not None:
                grad[where] = _narrowed(_gradient(rows, scale[at]), grad.dtype)
        if grad is not None:
            grad[divmod(first_row + np.flatnonzero(ignored), inner)] = 0
        _sum_tiles(losses, tile_sums, n_classes)
        return len(targets) - len(kept)


def _widened(x: NDArray[Any]) -> NDArray[np.float64]:
    if x.dtype == np.uint16:  # bfloat16: the upper half of a float32
        x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float64)


def _narrowed(grad: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype != np.uint16:
        return grad.astype(dtype)
    bits = grad.astype(np.float32).view(np.uint32)
    # to nearest, ties to even; NaN, whose lower half is 0, does not overflow into -0
    return ((bits + (0x7FFF + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)).astype(dtype)


def _exponentials(x: NDArray[np.float64], targets: NDArray[np.int64]) -> _Rows:
    n = np.arange(len(x))
    top = x.argmax(axis=1)  # a NaN counts as the largest
    m = x[n, top]
    # x - m = d + r exactly (Knuth's TwoSum); where d is infinite there is no r
    d = x - m[:, None]
    x1 = d + m[:, None]
    m1 = x1 - d
    r = (x - x1) - (m[:, None] - m1)
    exps = np.exp(d)
    exps += np.where(np.isneginf(d), 0.0, exps * r)
    exps[n, top] = np.where(np.isfinite(m), 0.0, np.nan)
    return _Rows(x, targets, exps, top, m - x[n, targets], exps.sum(axis=1))


def _loss(rows: _Rows) -> NDArray[np.float64]:
    return rows.gap + np.log1p(rows.rest)


def _gradient(rows: _Rows, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    n = np.arange(len(rows.x))
    total = 1.0 + rows.rest
    # The others' sum never cancels: where the target is not the maximum, the maximum's 1 stays.
    others = np.where(rows.top == rows.targets, rows.rest, total - rows.exps[n, rows.targets])
    grad = rows.exps
    grad[n, rows.top] = 1.0
    grad *= (scale / total)[:, None]
    grad[n, rows.targets] = 0.0 - scale * (others / total)  # 0.0 - 0.0 is not -0.0
    grad[np.isnan(total)] = np.nan
    return grad


def _rank(rows: _Rows) -> NDArray[np.int64]:
    target_logit = np.take_along_axis(rows.x, rows.targets[:, None], axis=1)
    ahead = np.count_nonzero(rows.x > target_logit, axis=1)
    tied_before = (rows.x == target_logit) & (np.arange(rows.x.shape[1]) < rows.targets[:, None])
    return np.asarray(ahead + np.count_nonzero(tied_before, axis=1), dtype=np.int64)


def _sum_tiles(losses: NDArray[Any], tile_sums: NDArray[np.float64], n_classes: int) -> None:
    step = tile_rows(n_classes)
    for tile, start in enumerate(range(0, len(losses), step)):
        tile_sums[tile] = exact_sum(losses[start : start + step].tolist())
