"""The truth, from mpmath with 200 bits. Never imports fastce: the specification is tested too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import mpmath
import numpy as np
from numpy.typing import NDArray

_PRECISION = 200


def _exps(row: Sequence[float]) -> tuple[list[mpmath.mpf], mpmath.mpf] | None:
    """Return exp(x - max) of each class and their sum, or None for a row that is not finite."""
    top = max(row, key=lambda x: math.inf if math.isnan(x) else x)
    if not math.isfinite(top):
        return None
    m = mpmath.mpf(top)
    exps = [mpmath.mpf(0) if x == -math.inf else mpmath.exp(mpmath.mpf(x) - m) for x in row]
    return exps, mpmath.fsum(exps)


def loss_and_gradient(row: Sequence[float], target: int) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """Return the softmax cross-entropy of one row and its gradient."""
    with mpmath.workprec(_PRECISION):
        terms = _exps(row)
        if terms is None:
            return mpmath.nan, [mpmath.nan] * len(row)
        exps, total = terms
        others = mpmath.fsum(e for j, e in enumerate(exps) if j != target)
        grad = [e / total for e in exps]
        grad[target] = -others / total
        if exps[target] == 0:
            return mpmath.inf, grad
        # -log p_t = log1p(others / e_t): mpmath's log1p keeps every digit of a small argument
        return mpmath.log1p(others / exps[target]), grad


def rank(row: Sequence[float], target: int) -> int:
    """Return the target's place by decreasing logit, equal logits by class id."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    return order.index(target)


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def as_pair(values: Sequence[mpmath.mpf]) -> Pair:
    """Return exact values as unevaluated sums of two float64 numbers, 106 bits together."""
    high = np.array([float(v) for v in values])
    low = [
        float(v - mpmath.mpf(h)) if np.isfinite(h) else 0.0
        for v, h in zip(values, high.tolist(), strict=True)
    ]
    return high, np.array(low)


def ulp_errors(values: NDArray, exact: Pair) -> NDArray[np.float64]:
    """Return how many units in the last place of their dtype the values are from the exact ones.

    Below the smallest normal number, any number of the right sign down to 0 counts as exact.
    """
    half = values.dtype
    high, low = (np.reshape(part, values.shape) for part in exact)
    tiny = float(ml_dtypes.finfo(values.dtype).tiny)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = high.astype(values.dtype).astype(np.float64)
        ulp = np.spacing(np.abs(rounded).astype(values.dtype)).astype(np.float64)
        values = values.astype(np.float64)
        errors = np.abs((values - high) - low) / ulp
    same = (values == rounded) | (np.isnan(values) & np.isnan(rounded))
    small = (np.abs(high) < tiny) & (np.abs(values) <= tiny) & (values * np.sign(high) >= 0)
    small &= half != np.float16
    errors[(same & ~np.isfinite(rounded)) | small] = 0.0
    errors[np.isnan(errors)] = np.inf
    return errors
