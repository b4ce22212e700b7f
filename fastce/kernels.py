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
Row weight
    Multiplies the loss. A weight of 0 makes an infinite loss 0, not NaN.
Soft targets
    With the shares q of `Soft`, Q their sum: the loss is ``sum_j q_j (m - x_j) + Q log1p(s)``, all of
    whose terms are positive, the gradient ``scale * (Q p_j - q_j)``. A share of 0 contributes 0, also
    where x_j is -inf; any other there makes the loss +inf. Where p_j > 1/2, the gradient is
    ``scale * (the other classes' shares - Q * the sum of the others' p)``, so that a row with one share
    gets what a class id gets.
Rank
    The number of classes with a larger logit than the target's, or an equal one and a smaller id.
Entropy, Brier score
    ``log1p(s) + sum_j p_j (m - x_j)``, and the sum of the squares of the others' p and of their sum.
Softmax
    ``p_j``, or ``-((m - x_j) + log1p(s))``. NaN in a row that is not finite, as the gradient.
KL divergence from logits
    ``sum_j p_j (exp(-d_j) - 1 + d_j)`` with ``d_j = log p_j - log q_j``: no term is negative, and each
    is 0 where the two agree. A class with p_j = 0 contributes q_j. Of rows that are close nearly all of
    d_j cancels: what its subtractions round away is carried, and the error common to all d_j, s, which
    adds s^2 / 2, is taken from what it does to the sum of q_j - p_j, and subtracted. NaN if a row of
    either is not finite; +inf if q has a logit of -inf where p has none, however small that p_j.
Measures of distributions
    Of probabilities as given, whatever their sum: ``sum -p log p``, ``sum -p log q``,
    ``sum p log(p / q)``, with 0 log 0 = 0. The last is computed as ``sum (p log(p/q) - p + q)``, whose
    terms are not negative, plus ``sum p - sum q`` where these differ by more than rounding:
    ``SUMS_AGREE`` times the larger of them and the dtype's epsilon. Negative numbers and NaN are
    invalid.
Binary cross-entropy
    With A = pos_weight * t, B = 1 - t and L(x) = log1p(exp(-|x|)), the loss is
    ``(A + B) L(x) + (B x if x > 0 else -A x)``, a share of 0 contributing 0, also at +-inf; the
    gradient is ``B sigmoid(x) - A sigmoid(-x)``. From probabilities it is ``-A log p - B log1p(-p)``,
    and the gradient ``B / (1 - p) - A / p``. NaN logits and probabilities give NaN. Where the weight is
    0, the element is not read: both are 0.
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
from typing import Any, NamedTuple, Protocol

from numpy import float64, int64
from numpy.typing import NDArray

# One unit of parallel work and of exact summation: this many elements, in whole rows. 65 536
# elements are about 10 us of work, five times what starting a parallel region costs.
_TILE_ELEMENTS = 65_536
_MAX_TILE_ROWS = 1024
#: Elements in a tile of the binary cross-entropy; a row of one class for each costs as much.
BINARY_TILE = 16_384
#: How many epsilons of their dtype the sums of two distributions may differ, and count as equal.
SUMS_AGREE = 4.0


def tile_rows(n_classes: int) -> int:
    """Rows per tile; depends on the number of classes alone, so sums do too."""
    return max(1, min(_MAX_TILE_ROWS, _TILE_ELEMENTS // max(1, n_classes)))


def exact_sum(values: Iterable[float]) -> float:
    """Return the correctly rounded sum of losses or of their sums, so that order does not matter.

    They may be inf or NaN.
    """
    try:
        return math.fsum(values)
    except OverflowError:  # finite, but beyond the largest float
        return math.inf
    except ValueError:  # inf - inf
        return math.nan


def array_sum(values: NDArray[float64]) -> float:
    """Return the sum of an array, in which rounding errors do not grow with its length."""
    whole = len(values) // 128 * 128  # NumPy adds up so many in eight lanes
    return exact_sum([*values[:whole].reshape(-1, 128).sum(axis=1), *values[whole:]])


def log_scale(base: float | None) -> tuple[float, float]:
    """Return the logarithms of 2 and of e to a base: what ln turns into log of that base."""
    if base is None:
        return math.log(2.0), 1.0
    return 1.0 if base == 2.0 else math.log(2.0) / math.log(base), 1.0 / math.log(base)


class Soft(NamedTuple):
    """Targets that are more than one class id.

    The share of class j is ``q_j = weight_j * ((1 - smoothing) * t_j + smoothing / n_classes)``, where
    t is a row of ``probs`` or, without them, 1 for the target and 0 elsewhere.
    """

    probs: NDArray[Any] | None  # shape and dtype of the logits, any strides
    weight: NDArray[Any] | None  # (n_classes,) dtype of the losses, contiguous; None for ones
    smoothing: float


class Stats(NamedTuple):
    """What else to write of each row: (n_rows,) each, contiguous, or None.

    Floats are of the dtype of the losses. In rows that are ignored they are NaN, the ids -1.
    """

    lse: NDArray[Any] | None = None  # log of the sum of exp; -inf or +inf where that is the limit
    target_logit: NDArray[Any] | None = None
    max_logit: NDArray[Any] | None = None  # NaN if the row holds one
    argmax: NDArray[int64] | None = None  # the first one; -1 in rows with loss NaN
    rank: NDArray[int64] | None = None  # likewise
    entropy: NDArray[Any] | None = None  # of the softmax, in nats
    max_prob: NDArray[Any] | None = None
    brier: NDArray[Any] | None = None  # sum of squares of (softmax - one-hot)


class Kernels(Protocol):
    """The kernels of one backend on one instruction set.

    Row i of ``logits`` is ``logits[i // inner, i % inner]``: two batch axes, so that a class axis in
    the middle, (N, C, d), needs no copy. Arrays are aligned and of native byte order. Those of three
    axes have one shape in a call, and any strides (multiples of the item); the others are contiguous
    but where said.
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
        out: object,
    ) -> tuple[float | NDArray[Any], NDArray[Any] | None] | None:
        """Do the whole of a small call, if no argument needs conversion and all targets are classes.

        Returns the sum of the losses, or the losses, with the gradient if a scale was given for it, in
        ``out`` if that is an array; or None, and nothing written, where `fastce.problem.check` has to
        see the arguments first. Always None but where it saves time: at 8 x 10, checking and preparing
        takes ten times as long as the rows.
        """
        return None

    def rows(
        self,
        logits: NDArray[Any],  # (outer, inner, n_classes)  IN
        first_row: int,  # the row that targets[0] belongs to; a tile begins there
        targets: NDArray[int64],  # (n_rows,)  IN  with probs: 0, or -1 where the row is ignored
        losses: NDArray[Any],  # (n_rows,)  OUT  float64 for float64 logits, else float32
        tile_sums: NDArray[float64],  # (n_tiles,)  OUT
        *,
        row_weights: NDArray[float64] | None,  # (n_rows,)  IN, any stride
        soft: Soft | None,
        stats: Stats | None,
        scale: NDArray[float64] | None,  # (n_rows,)  IN, any stride
        grad: NDArray[Any] | None,  # as logits  OUT, may be logits
        stream: bool,
        num_threads: int,
    ) -> int:
        """Write losses, each tile's sum of them and, where given, statistics and gradient.

        ``row_weights`` multiply the losses, ``scale`` the gradient, and is given if ``grad`` is.
        ``stats`` and ``soft`` are not given together. ``stream`` says that the gradient is too large
        for the caches, which it may pass by. A tile has ``tile_rows(n_classes)`` rows, but for the
        last.

        Returns how many targets were outside [0, n_classes) or, with ``probs``, how many rows that are
        not ignored hold a negative one or a NaN; what is written for such a row is not defined.
        """
        ...

    def softmax(
        self,
        logits: NDArray[Any],  # (outer, inner, n_classes)  IN
        first_row: int,
        n_rows: int,
        out: NDArray[Any],  # as logits  OUT, may be logits
        *,
        log: bool,
        stream: bool,
        num_threads: int,
    ) -> None:
        """Write the softmax of each row, or its logarithm."""
        ...

    def kl_from_logits(
        self,
        p_logits: NDArray[Any],  # (outer, inner, n_classes)  IN
        q_logits: NDArray[Any],  # as p_logits  IN
        first_row: int,
        out: NDArray[Any],  # (n_rows,)  OUT  float64 for float64 logits, else float32
        *,
        num_threads: int,
    ) -> None:
        """Write the Kullback-Leibler divergence of softmax(q) from softmax(p), in nats."""
        ...

    def distributions(
        self,
        measure: str,  # "entropy", "cross_entropy" or "kl_divergence"
        p: NDArray[Any],  # (outer, inner, n_classes)  IN
        q: NDArray[Any] | None,  # as p, but for the entropy  IN
        first_row: int,
        out: NDArray[Any],  # (n_rows,)  OUT  float64 for float64 probabilities, else float32
        *,
        base: float | None,  # of the logarithm; None for e
        num_threads: int,
    ) -> int:
        """Write a measure of each row of probabilities; return how many rows hold invalid ones."""
        ...

    def information(
        self,
        p: NDArray[Any],  # (n,)  IN
        out: NDArray[Any],  # (n,)  OUT  float64 for float64 probabilities, else float32
        *,
        base: float | None,
        num_threads: int,
    ) -> int:
        """Write -log p of each probability; return how many of them are negative or NaN."""
        ...

    def binary(
        self,
        x: NDArray[Any],  # (n,)  IN  logits or, without from_logits, probabilities
        targets: NDArray[Any],  # (n,)  IN  dtype of x
        losses: NDArray[Any] | None,  # (n,)  OUT  float64 for float64 x, else float32
        sums: NDArray[float64],  # (n_tiles, 2)  OUT
        *,
        from_logits: bool,
        weight: NDArray[Any] | None,  # (n,)  IN  dtype of the losses
        pos_weight: NDArray[Any] | None,  # (n,)  IN  dtype of the losses, not negative
        unit: float,
        scale: NDArray[Any] | None,  # (n,)  IN  dtype of the losses
        grad_unit: float,
        grad: NDArray[Any] | None,  # (n,)  OUT  dtype of x; may be x
        num_threads: int,
    ) -> int:
        """Write the binary cross-entropy of each element, the gradient with respect to x, and sums.

        ``unit`` and ``weight`` multiply the losses, ``grad_unit`` and ``scale`` the gradient. A tile
        has ``BINARY_TILE`` elements, but for the last; its sum of the losses is left as two numbers,
        the second far smaller, so that no order of tiles changes the total. Returns how many elements
        with a weight other than 0 have a target outside [0, 1] or NaN or, if not from logits, a
        probability outside [0, 1]; what is written for them is not defined.
        """
        ...
