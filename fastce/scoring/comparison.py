"""The figures of a comparison: what each one means and how it is computed, in this one place.

Base is the reference, P in what follows, and the other dump is Q, as in llama.cpp's table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import exact_sum
from fastce.scoring.figures import SCHEMA_VERSION, Input, Run, exp, finite_or_none

KL_PERCENTS = (99.9, 99, 95, 90, 50, 10, 5, 1, 0.1)
DELTA_P_PERCENTS = (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1)

_N_BUCKETS = 10
_LIST_ROWS = 2**16  # as many values are Python's at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error, which takes rows as independent."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles of a value of each row.

    The percentile p is interpolated linearly in the sorted values, at ``p / 100 * (n - 1)``.
    """

    mean: Estimate
    minimum: float
    maximum: float
    percentiles: dict[float, float]


@dataclass(frozen=True, slots=True)
class Perplexities:
    """The perplexities of both dumps, and how they differ, row by row.

    With a_i and b_i the losses of other and base, in nats, and n rows:

    Attributes
    ----------
    other, base : Estimate
        ``exp(mean loss)``; the error is that times the standard error of the mean loss,
        ``sqrt(sum((a_i - mean)**2) / (n - 1) / n)``.
    correlation : float
        Of a and b.
    log_ratio : Estimate
        The mean of ``a_i - b_i``, with its standard error; which is what is left of the two errors
        where the dumps agree about which rows are hard.
    ratio : Estimate
        ``exp(log_ratio)``; the error is that times the error of ``log_ratio``.
    difference : Estimate
        ``other - base``, and ``sqrt(var_a + var_b - 2 cov)``, of the errors of both perplexities and
        their covariance.
    """

    other: Estimate
    base: Estimate
    correlation: float
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate


@dataclass(frozen=True, slots=True)
class Bucket:
    """The rows whose largest probability in base is in [low, high); 1 is in the last bucket."""

    low: float
    high: float
    rows: int
    mean_kl: float  #: NaN if there is no such row


@dataclass(frozen=True, slots=True)
class WorstRow:
    """One of the rows of the largest KL divergence."""

    path: str  #: of base's file
    row: int  #: in that file, all leading axes together
    target: int | None
    kl: float
    loss_base: float | None
    loss_other: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The figures of two dumps of the same rows. Losses and divergences are in nats.

    Rows whose target is ``ignore_index`` are left out of every figure but ``rows`` and ``ignored``.
    What needs targets is None if there are none. Means are correctly rounded sums over n.

    Attributes
    ----------
    rows, ignored : int
        Rows in each dump, and those of them whose target is ``ignore_index``.
    nonfinite : int
        Kept rows with a loss or divergence that is NaN or infinite.
    perplexity : Perplexities or None
        Of both, with ratio and difference.
    kl : Spread
        Of ``KL(base || other) = sum(p log(p / q))`` of each row.
    kl_reverse : Estimate or None
        The mean of ``KL(other || base)``. None with ``llama_compat``.
    delta_p : Spread or None
        Of the probability that other gives the target, less the one that base gives it; in [-1, 1].
    delta_p_rms : Estimate or None
        ``sqrt(mean(delta_p**2))``; the error is that of the mean square over twice the value.
    same_top : Estimate
        The share s of rows whose largest logit is of the same class in both, of equal ones the first;
        the error is ``sqrt(s (1 - s) / (n - 1))``.
    buckets : tuple of Bucket
        The mean of ``kl`` by the largest probability in base. Empty with ``llama_compat``.
    worst : tuple of WorstRow
        The rows of the largest ``kl``, NaN first.
    llama_compat : bool
        Whether perplexity, kl, delta_p and same_top were computed in llama.cpp's arithmetic.
    base, other, targets : tuple of Input
        The files read.
    run : Run
        Backend, versions and speed; not part of equality.
    """

    rows: int
    ignored: int
    nonfinite: int
    perplexity: Perplexities | None
    kl: Spread
    kl_reverse: Estimate | None
    delta_p: Spread | None
    delta_p_rms: Estimate | None
    same_top: Estimate
    buckets: tuple[Bucket, ...]
    worst: tuple[WorstRow, ...]
    llama_compat: bool
    base: tuple[Input, ...]
    other: tuple[Input, ...]
    targets: tuple[Input, ...]
    run: Run = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON, with a schema version; numbers that are not finite become None."""
        values: dict[str, Any] = finite_or_none(asdict(self))
        inputs = {name: values.pop(name) for name in ("base", "other", "targets")}
        run = values.pop("run")
        return {"schema_version": SCHEMA_VERSION, "figures": values, "inputs": inputs, "run": run}


class RowValues(NamedTuple):
    """What is computed of each kept row."""

    kl: NDArray[Any]
    same_top: NDArray[np.bool_]
    loss_base: NDArray[Any] | None = None
    loss_other: NDArray[Any] | None = None
    kl_reverse: NDArray[Any] | None = None
    confidence: NDArray[Any] | None = None  #: the largest probability in base

    def nonfinite(self) -> NDArray[np.bool_]:
        """Return which rows have a value that is NaN or infinite."""
        bad = np.zeros(len(self.kl), bool)
        for values in (self.kl, self.loss_base, self.loss_other, self.kl_reverse):
            if values is not None:
                bad |= ~np.isfinite(values)
        return bad


class Table(NamedTuple):
    """The figures that llama.cpp prints too."""

    perplexity: Perplexities | None
    kl: Spread
    delta_p: Spread | None
    delta_p_rms: Estimate | None
    same_top: Estimate


def joined(parts: Sequence[RowValues]) -> RowValues:
    """Return the values of blocks of rows as one."""
    columns = zip(*parts, strict=True)
    return RowValues(*(None if c[0] is None else np.concatenate(c) for c in columns))  # type: ignore[arg-type]


def table(rows: RowValues) -> Table:
    """Return the figures of rows, at the best accuracy."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # infinite losses
        kl = _spread(rows.kl.astype(np.float64), KL_PERCENTS)
        same_top = _share(rows.same_top)
        if rows.loss_base is None or rows.loss_other is None:
            return Table(None, kl, None, None, same_top)
        base, other = rows.loss_base.astype(np.float64), rows.loss_other.astype(np.float64)
        delta_p = np.exp(-other) - np.exp(-base)
        return Table(
            perplexity=_perplexities(other, base),
            kl=kl,
            delta_p=_spread(delta_p, DELTA_P_PERCENTS),
            delta_p_rms=_rms(delta_p),
            same_top=same_top,
        )


def mean_of(values: NDArray[Any]) -> Estimate:
    """Return the mean and its standard error, by two passes."""
    n = len(values)
    mean = _sum(values) / n if n else math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        squares = _sum((values.astype(np.float64) - mean) ** 2)
    return Estimate(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan)


def buckets(rows: RowValues) -> tuple[Bucket, ...]:
    """Return the mean divergence by the reference's confidence."""
    if rows.confidence is None:
        return ()
    certain = ~np.isnan(rows.confidence)
    kl = rows.kl[certain]
    tenths = rows.confidence[certain].astype(np.float64) * _N_BUCKETS
    which = np.minimum(tenths.astype(np.int64), _N_BUCKETS - 1)
    return tuple(
        Bucket(i / _N_BUCKETS, (i + 1) / _N_BUCKETS, len(inside), mean_of(inside).value)
        for i, inside in ((i, kl[which == i]) for i in range(_N_BUCKETS))
    )


def worst_first(rows: RowValues, n: int) -> NDArray[np.int64]:
    """Return the positions of the rows of the largest divergence: NaN first, equal ones in order."""
    return np.lexsort((-rows.kl, ~np.isnan(rows.kl)))[:n]


def _sum(values: NDArray[Any]) -> float:
    return exact_sum(_floats(values))


def _floats(values: NDArray[Any]) -> Iterator[float]:
    for start in range(0, len(values), _LIST_ROWS):
        yield from values[start : start + _LIST_ROWS].tolist()


def _perplexities(other: NDArray[np.float64], base: NDArray[np.float64]) -> Perplexities:
    loss_other, loss_base, log_ratio = mean_of(other), mean_of(base), mean_of(other - base)
    ppl_other, ppl_base, ratio = exp(loss_other.value), exp(loss_base.value), exp(log_ratio.value)
    # The paired error of the difference is that of the mean of this, to first order. Summed up so, it
    # cannot come out as the root of a negative number.
    difference = ppl_other * (other - loss_other.value) - ppl_base * (base - loss_base.value)
    return Perplexities(
        other=Estimate(ppl_other, ppl_other * loss_other.error),
        base=Estimate(ppl_base, ppl_base * loss_base.error),
        correlation=_correlation(other - loss_other.value, base - loss_base.value),
        log_ratio=log_ratio,
        ratio=Estimate(ratio, ratio * log_ratio.error),
        difference=Estimate(ppl_other - ppl_base, mean_of(difference).error),
    )


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    scale = math.sqrt(_sum(a * a) * _sum(b * b))
    return _sum(a * b) / scale if scale else math.nan


def _spread(values: NDArray[np.float64], percents: Sequence[float]) -> Spread:
    ordered = np.sort(values)  # NaN last
    if not len(ordered) or np.isnan(ordered[-1]):
        ordered = np.array([math.nan])
    return Spread(
        mean=mean_of(values),
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        percentiles={percent: _percentile(ordered, percent) for percent in percents},
    )


def _percentile(ordered: NDArray[np.float64], percent: float) -> float:
    position = percent / 100 * (len(ordered) - 1)
    i = int(position)
    low, high = float(ordered[i]), float(ordered[min(i + 1, len(ordered) - 1)])
    if low == high:  # both may be infinite
        return low
    return low + (position - i) * (high - low)


def _rms(values: NDArray[np.float64]) -> Estimate:
    square = mean_of(values * values)
    rms = math.sqrt(square.value)
    return Estimate(rms, square.error / (2 * rms) if rms else 0.0)


def _share(hits: NDArray[np.bool_]) -> Estimate:
    n = len(hits)
    share = int(np.count_nonzero(hits)) / n if n else math.nan
    return Estimate(share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan)
