"""What a backend must provide, and what every backend must mean by it.

A backend module has one function, ``load(isa)``, which returns an object with the methods of
`Kernels`. The methods work on rows in memory; everything else a user may pass (any integer type,
ignore_index, reductions, foreign byte orders) has become that before a kernel sees it.

The rules a kernel keeps
------------------------
Logits
    float64, float32, float16, or uint16, which holds the bits of bfloat16. Half logits are widened to
    float32, exactly, and count as float32 in everything below; their gradient is rounded once more.
Target
    A target in [0, n_classes) names the row's class. Any other value marks an ignored row:
    the row is not read, its loss and gradient are 0, its rank is -1. So a kernel is total: it
    only counts such rows, and never reads outside its arrays, even if another thread changes the
    targets while it runs.
Loss
    ``(m - x_t) + log1p(s)`` with m the row's maximum and s the sum of ``exp(x_j - m)`` over all
    classes but one that attains m, the rounding of ``x_j - m`` carried along. Sums are
    float64. Never negative, never -0.0.
Gradient
    ``scale * p_j``; at the target ``-scale`` times the sum of the others' p. Results below the smallest
    normal number may be 0.
Rank
    The number of classes with a larger logit than the target's, or an equal one and a smaller id.
-inf
    As a logit: probability and gradient exactly 0, at any position, however many. As the
    target's: loss +inf, gradient -scale there. In the whole row: NaN.
NaN, +inf
    Anywhere in a row that is not ignored: NaN loss and gradient for that row alone.
Order
    What a row yields depends on that row alone: not on its neighbours, the number of threads, strides
    or an address. A tile's sum depends on the tile's losses alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

from numpy import float64, int64
from numpy.typing import NDArray

# One unit of parallel work and of exact summation: this many elements, in whole rows. 65 536
# elements are about 10 us of work, five times what starting a parallel region costs.
_TILE_ELEMENTS = 65_536
_MAX_TILE_ROWS = 1024


def tile_rows(n_classes: int) -> int:
    """Rows per tile; depends on the number of classes alone, so sums do too."""
    return max(1, min(_MAX_TILE_ROWS, _TILE_ELEMENTS // max(1, n_classes)))


def exact_sum(values: Iterable[float]) -> float:
    """Return the correctly rounded sum of losses or of their sums, so that order does not matter.

    They are not negative, but may be inf or NaN.
    """
    try:
        return math.fsum(values)
    except OverflowError:  # finite, but beyond the largest float
        return math.inf


class Kernels(Protocol):
    """The kernels of one backend on one instruction set.

    Row i of ``logits`` is ``logits[i // inner, i % inner]``: two batch axes, so that a class axis in
    the middle, (N, C, d), needs no copy. Arrays are aligned and of native byte order; ``logits`` and
    ``grad`` have any strides (multiples of the item), the others are contiguous but where said.
    """

    def max_threads(self) -> int:
        """Return the most threads this backend's runtime is set to use now."""
        ...

    def plain(
        self,
        logits: object,
        targets: object,
        ignore_index: object,
        max_elements: int,
        wants_losses: bool,
        grad_scale: float | None,
    ) -> tuple[float | NDArray[Any], NDArray[Any] | None] | None:
        """Do the whole of a small call, if no argument needs conversion and all targets are classes.

        Returns the sum of the losses, or the losses, with the gradient if a scale was given for it; or
        None, where `fastce.problem.check` has to see the arguments first. Always None but where it
        saves time: at 8 x 10, checking and preparing takes ten times as long as the rows.
        """
        return None

    def rows(
        self,
        logits: NDArray[Any],  # (outer, inner, n_classes)  IN
        first_row: int,  # the row that targets[0] belongs to; a tile begins there
        targets: NDArray[int64],  # (n_rows,)  IN
        losses: NDArray[Any],  # (n_rows,)  OUT  float64 for float64 logits, else float32
        tile_sums: NDArray[float64],  # (n_tiles,)  OUT
        *,
        ranks: NDArray[int64] | None,  # (n_rows,)  OUT
        scale: NDArray[float64] | None,  # (n_rows,)  IN, any stride
        grad: NDArray[Any] | None,  # as logits  OUT, may be logits
        stream: bool,
        num_threads: int,
    ) -> int:
        """Write losses, each tile's sum of them and, where given, ranks and gradient.

        ``scale`` is the upstream gradient, given if ``grad`` is. ``stream`` says that the gradient is
        too large for the caches, which it may pass by. A tile has ``tile_rows(n_classes)`` rows, but
        for the last one. Returns how many rows were ignored.
        """
        ...
