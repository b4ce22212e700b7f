"""llama.cpp's arithmetic, rounding for rounding, and the layout of its table.

Its figures are sums of binary32 values in binary64; variances are differences of sums of squares, and
classes whose log-probability in base is at most -16 do not count for the divergence. None of that is
more accurate than `fastce.scoring.comparison`: it is for figures that must agree digit by digit.
What C leaves to its library and compiler can still differ in the last place of a binary32 value: the
exponential, here rounded correctly but for rare ties, and multiplications fused with additions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce.scoring import comparison
from fastce.scoring.comparison import (
    DELTA_P_PERCENTS,
    KL_PERCENTS,
    Comparison,
    Estimate,
    Perplexities,
    RowValues,
    Spread,
    Table,
)

#: llama.cpp prints no table of fewer rows.
MIN_ROWS = 100

_FLOOR = np.float32(-16)
_MIN_ROWS_OF_MEANS, _MIN_ROWS_OF_COVARIANCES = 11, 10
_BLOCK_ELEMENTS = 2**18  # that intermediate results are of, at least one row

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]


def row_values(base: _Floats, other: _Floats, targets: NDArray[np.int64]) -> RowValues:
    """Compare rows of log-probabilities with rows of logits, both float32.

    Returns
    -------
    RowValues
        ``kl`` is float64, the losses are float32.
    """
    n_rows = max(1, _BLOCK_ELEMENTS // base.shape[1])
    kl, same_top = np.empty(len(base)), np.empty(len(base), bool)
    loss_base, loss_other = np.empty((2, len(base)), np.float32)
    for start in range(0, len(base), n_rows):
        rows = slice(start, start + n_rows)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            kl[rows], same_top[rows], loss_base[rows], loss_other[rows] = _block(
                base[rows], other[rows], targets[rows]
            )
    return RowValues(kl, same_top, loss_base, loss_other)


def _block(
    base: _Floats, other: _Floats, targets: NDArray[np.int64]
) -> tuple[_Doubles, NDArray[np.bool_], _Floats, _Floats]:
    target = targets[:, None]
    top = other.max(axis=1, keepdims=True)
    lse = np.log(_running_sum(_expf(other - top))).astype(np.float32)[:, None]
    loss_other = top + lse - np.take_along_axis(other, target, axis=1)
    loss_base = -np.take_along_axis(base, target, axis=1)
    terms = _expf(base) * (base - other + (top + lse))
    kl = _running_sum(np.where(base > _FLOOR, terms, np.float32(0)))
    return kl, other.argmax(axis=1) == base.argmax(axis=1), loss_base[:, 0], loss_other[:, 0]


def _expf(x: _Floats) -> _Floats:
    return np.exp(x.astype(np.float64)).astype(np.float32)


def _running_sum(x: NDArray[Any]) -> _Doubles:
    """Return the sums of the last axis, element after element, unlike numpy.sum."""
    total: _Doubles = np.add.accumulate(x, axis=-1, dtype=np.float64)[..., -1]
    return total


def table(rows: RowValues) -> Table:
    """Return llama.cpp's figures."""
    if not len(rows.kl):
        return comparison.table(rows)
    a, b = rows.loss_other, rows.loss_base
    assert a is not None
    assert b is not None
    delta_p = _expf(-a) - _expf(-b)
    squares = (delta_p * delta_p).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean_square, mean_square_error = _mean(squares, squares * squares)
        rms = np.sqrt(mean_square)
        same = np.float64(np.count_nonzero(rows.same_top) / len(rows.kl))
        return Table(
            perplexity=_perplexities(a, b),
            kl=_spread(rows.kl, rows.kl * rows.kl, KL_PERCENTS),
            delta_p=_spread(delta_p, squares, DELTA_P_PERCENTS),
            delta_p_rms=_estimate(rms, 0.5 / rms * mean_square_error),
            same_top=_estimate(same, np.sqrt(same * (1 - same) / np.float64(len(rows.kl) - 1))),
        )


def _estimate(value: np.float64, error: np.float64) -> Estimate:
    return Estimate(float(value), float(error))


def _mean(values: NDArray[Any], squares: NDArray[Any]) -> tuple[np.float64, np.float64]:
    n = len(values)
    mean = np.float64(_running_sum(values) / n)
    variance = np.float64(_running_sum(squares) / n - mean * mean)
    known = variance > 0 and n >= _MIN_ROWS_OF_MEANS
    return mean, np.sqrt(variance / (n - 1)) if known else np.float64(0)


def _covariance(a: _Floats, b: _Floats) -> np.float64:
    n = len(a)
    if n < _MIN_ROWS_OF_COVARIANCES:
        return np.float64(0)
    mean_product = _running_sum(a * b) / n
    return np.float64((mean_product - _running_sum(a) / n * (_running_sum(b) / n)) / (n - 1))


def _perplexities(a: _Floats, b: _Floats) -> Perplexities:
    (log_a, error_a), (log_b, error_b) = _mean(a, a * a), _mean(b, b * b)
    covariance = _covariance(a, b)
    ppl_a, ppl_b = np.exp(log_a), np.exp(log_b)
    ppl_error_a, ppl_error_b = ppl_a * error_a, ppl_b * error_b
    log_ratio = log_a - log_b
    log_ratio_error = np.sqrt(error_a * error_a + error_b * error_b - 2.0 * covariance)
    ratio = np.exp(log_ratio)
    ppl_covariance = ppl_a * ppl_b * covariance
    return Perplexities(
        other=_estimate(ppl_a, ppl_error_a),
        base=_estimate(ppl_b, ppl_error_b),
        correlation=float(covariance / (error_a * error_b)),
        log_ratio=_estimate(log_ratio, log_ratio_error),
        ratio=_estimate(ratio, ratio * log_ratio_error),
        difference=_estimate(
            ppl_a - ppl_b,
            np.sqrt(ppl_error_a * ppl_error_a + ppl_error_b * ppl_error_b - 2.0 * ppl_covariance),
        ),
    )


def _spread(values: NDArray[Any], squares: NDArray[Any], percents: Sequence[float]) -> Spread:
    ordered = np.sort(values.astype(np.float32))
    return Spread(
        mean=_estimate(*_mean(values, squares)),
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        percentiles={
            percent: float(_median(ordered) if percent == 50 else _percentile(ordered, percent))
            for percent in percents
        },
    )


def _median(ordered: _Floats) -> np.float32:
    n = len(ordered)
    if n % 2:
        return np.float32(ordered[n // 2])
    return np.float32(np.float32(0.5) * (ordered[n // 2] + ordered[n // 2 - 1]))


def _percentile(ordered: _Floats, percent: float) -> np.float32:
    last = len(ordered) - 1
    position = np.float32(percent / 100) * np.float32(last)
    i = min(int(position), last)
    part = position - np.float32(i)
    return np.float32((np.float32(1) - part) * ordered[i] + part * ordered[min(i + 1, last)])


def as_text(figures: Comparison) -> str:
    """Return the table in llama.cpp's layout."""
    ppl, kl, delta_p = figures.perplexity, figures.kl, figures.delta_p
    rms, same_top = figures.delta_p_rms, figures.same_top
    assert ppl is not None
    assert delta_p is not None
    assert rms is not None

    def pair(name: str, of: Estimate) -> str:
        return f"{name}: {of.value:10.6f} ± {of.error:10.6f}"

    def percent(name: str, of: Estimate) -> str:
        return f"{name}: {100.0 * of.value:6.3f} ± {100.0 * of.error:5.3f} %"

    lines = [
        "====== Perplexity statistics ======",
        pair("Mean PPL(Q)                   ", ppl.other),
        pair("Mean PPL(base)                ", ppl.base),
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100.0 * ppl.correlation:6.2f}%",
        pair("Mean ln(PPL(Q)/PPL(base))     ", ppl.log_ratio),
        pair("Mean PPL(Q)/PPL(base)         ", ppl.ratio),
        pair("Mean PPL(Q)-PPL(base)         ", ppl.difference),
        "",
        "====== KL divergence statistics ======",
        pair("Mean    KLD", kl.mean),
        *_quantile_lines(kl, "KLD", lambda value: f"{value:10.6f}"),
        "",
        "====== Token probability statistics ======",
        percent("Mean    Δp", delta_p.mean),
        *_quantile_lines(delta_p, "Δp", lambda value: f"{100.0 * value:6.3f}%"),
        percent("RMS Δp    ", rms),
        percent("Same top p", same_top),
    ]
    return "\n".join(lines)


def _quantile_lines(spread: Spread, what: str, shown: Callable[[float], str]) -> list[str]:
    names = {p: "Median " if p == 50 else f"{p:4.1f}%  " for p in spread.percentiles}
    return [
        f"Maximum {what}: {shown(spread.maximum)}",
        *(f"{names[p]} {what}: {shown(value)}" for p, value in spread.percentiles.items()),
        f"Minimum {what}: {shown(spread.minimum)}",
    ]
