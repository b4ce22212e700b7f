"""The truth, from mpmath with 200 bits. Never imports fastce: the specification is tested too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Row:
    """What everything about a row of finite logits, and some of -inf, is made of."""

    maximum: mpmath.mpf
    gaps: list[mpmath.mpf]  # from the maximum down to each logit
    exps: list[mpmath.mpf]
    top: int  # the class of the maximum
    rest: mpmath.mpf  # the sum of the other classes' exps

    @classmethod
    @mpmath.workprec(_PRECISION)
    def of(cls, row: Sequence[float]) -> Row:
        """Return what a row of logits is made of."""
        top = max(range(len(row)), key=row.__getitem__)
        gaps = [mpmath.mpf(row[top]) - mpmath.mpf(x) for x in row]
        exps = [mpmath.mpf(0) if gap == math.inf else mpmath.exp(-gap) for gap in gaps]
        others = mpmath.fsum(e for j, e in enumerate(exps) if j != top)
        return cls(mpmath.mpf(row[top]), gaps, exps, top, others)

    @mpmath.workprec(_PRECISION)
    def softmax(self) -> list[mpmath.mpf]:
        """Return the probability of each class."""
        total = 1 + self.rest
        return [e / total for e in self.exps]

    @mpmath.workprec(_PRECISION)
    def log_softmax(self) -> list[mpmath.mpf]:
        """Return its logarithm."""
        log_total = mpmath.log1p(self.rest)
        return [-(gap + log_total) for gap in self.gaps]

    @mpmath.workprec(_PRECISION)
    def lse(self) -> mpmath.mpf:
        """Return the logarithm of the sum of the exponentials."""
        return self.maximum + mpmath.log1p(self.rest)

    @mpmath.workprec(_PRECISION)
    def entropy(self) -> mpmath.mpf:
        """Return the entropy of the softmax, in nats."""
        total = 1 + self.rest
        below = mpmath.fsum(e * gap for e, gap in zip(self.exps, self.gaps, strict=True) if e)
        return mpmath.log1p(self.rest) + below / total

    @mpmath.workprec(_PRECISION)
    def brier(self, target: int) -> mpmath.mpf:
        """Return the sum of the squares of softmax less one-hot."""
        p = self.softmax()
        others = self.rest / (1 + self.rest) if target == self.top else 1 - p[target]
        return mpmath.fsum(x * x for j, x in enumerate(p) if j != target) + others * others

    @mpmath.workprec(_PRECISION)
    def soft_loss(self, shares: Sequence[mpmath.mpf]) -> mpmath.mpf:
        """Return the loss of a target with a share for each class."""
        below = mpmath.fsum(q * gap for q, gap in zip(shares, self.gaps, strict=True) if q)
        return below + mpmath.fsum(shares) * mpmath.log1p(self.rest)

    @mpmath.workprec(_PRECISION)
    def soft_gradient(self, shares: Sequence[mpmath.mpf]) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
        """Return the gradient for such a target, and the larger term of each difference."""
        sums, total = mpmath.fsum(shares), 1 + self.rest
        terms = [(sums * e / total, q) for e, q in zip(self.exps, shares, strict=True)]
        larger = [max(pair) for pair in terms]
        others = mpmath.fsum(q for j, q in enumerate(shares) if j != self.top)
        terms[self.top] = others, sums * self.rest / total
        if others == 0:  # as of a class id, which is no difference
            larger[self.top] = terms[self.top][1]
        return [a - b for a, b in terms], larger

    @mpmath.workprec(_PRECISION)
    def divergence_from(self, other: Row) -> tuple[mpmath.mpf, mpmath.mpf]:
        """Return the KL divergence of another row's softmax from this one's, and the cross-entropy."""
        p, log_p, log_q = self.softmax(), self.log_softmax(), other.log_softmax()
        kept = [j for j, x in enumerate(p) if x]
        kl = mpmath.fsum(p[j] * (log_p[j] - log_q[j]) for j in kept)
        return kl, mpmath.fsum(-p[j] * log_q[j] for j in kept)


@mpmath.workprec(_PRECISION)
def shares(
    targets: Sequence[float], weight: Sequence[float] | None, smoothing: float
) -> list[mpmath.mpf]:
    """Return the share of each class of a target, whose probabilities are given."""
    eps, n = mpmath.mpf(smoothing), len(targets)
    q = [(1 - eps) * mpmath.mpf(t) + eps / n for t in targets]
    return q if weight is None else [mpmath.mpf(w) * x for w, x in zip(weight, q, strict=True)]


@mpmath.workprec(_PRECISION)
def information(p: float, base: float | None) -> mpmath.mpf:
    """Return what an event of probability p > 0 tells."""
    nats = -mpmath.log(mpmath.mpf(p))
    return nats if base is None else nats / mpmath.log(base)


@mpmath.workprec(_PRECISION)
def measures(
    p: Sequence[float], q: Sequence[float], base: float | None
) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Return entropy, cross-entropy and KL divergence of probabilities as they are."""
    log = {x: -information(x, base) for x in {*p, *q} if x}
    log[0.0] = -mpmath.inf
    kept = [(mpmath.mpf(x), log[x], log[y]) for x, y in zip(p, q, strict=True) if x]
    return (
        mpmath.fsum(-x * log_x for x, log_x, _ in kept),
        mpmath.fsum(-x * log_y for x, _, log_y in kept),
        mpmath.fsum(x * (log_x - log_y) for x, log_x, log_y in kept),
    )


@mpmath.workprec(_PRECISION)
def binary(x: float, target: float, pos_weight: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Return loss, gradient and the gradient's larger term, of a finite logit."""
    a, b = mpmath.mpf(target) * mpmath.mpf(pos_weight), 1 - mpmath.mpf(target)
    e, sign = mpmath.exp(-abs(mpmath.mpf(x))), (b if x > 0 else a)
    loss = (a + b) * mpmath.log1p(e) + sign * abs(mpmath.mpf(x))
    likely, unlikely = 1 / (1 + e), e / (1 + e)
    up, down = (b * likely, a * unlikely) if x > 0 else (b * unlikely, a * likely)
    return loss, up - down, max(up, down)


@mpmath.workprec(_PRECISION)
def binary_of_probability(p: float, target: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Return loss, gradient and the gradient's larger term, of a probability between 0 and 1."""
    p, a = mpmath.mpf(p), mpmath.mpf(target)
    up, down = (1 - a) / (1 - p), a / p
    return -a * mpmath.log(p) - (1 - a) * mpmath.log1p(-p), up - down, max(up, down)


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


def ulp_errors(
    values: NDArray, exact: Pair, larger_terms: Sequence[mpmath.mpf] | None = None
) -> NDArray[np.float64]:
    """Return how many units in the last place of their dtype the values are from the exact ones.

    Of a difference, those of the larger term. Below the smallest normal number, any number of the right
    sign down to 0 counts as exact.
    """
    half = values.dtype
    high, low = (np.reshape(part, values.shape) for part in exact)
    tiny = float(ml_dtypes.finfo(values.dtype).tiny)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = high.astype(values.dtype).astype(np.float64)
        size = np.abs(rounded)
        if larger_terms is not None:
            terms = np.array([float(abs(term)) for term in larger_terms])
            size = np.maximum(size, np.reshape(terms, values.shape))
        ulp = np.spacing(size.astype(values.dtype)).astype(np.float64)
        values = values.astype(np.float64)
        errors = np.abs((values - high) - low) / ulp
    same = (values == rounded) | (np.isnan(values) & np.isnan(rounded))
    small = (np.abs(high) < tiny) & (np.abs(values) <= tiny) & (values * np.sign(high) >= 0)
    small &= half != np.float16
    errors[(same & ~np.isfinite(rounded)) | small] = 0.0
    errors[np.isnan(errors)] = np.inf
    return errors
