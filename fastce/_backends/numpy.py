"""The readable specification of the kernels, and the fallback that runs everywhere.

Each block of rows is computed in float64, whatever the logits' dtype, and rounded once. With
float64 logits ``x - m`` rounds; what it rounds away is carried into the exponential, as in the
compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import (
    BINARY_TILE,
    SUMS_AGREE,
    Kernels,
    Soft,
    Stats,
    exact_sum,
    log_scale,
    narrowed,
    tile_rows,
    widened,
)

# Rows are taken a block at a time, so that temporaries stay in cache and memory stays bounded.
_BLOCK_ELEMENTS = 65_536
# log(2) in two parts, the first of 33 bits, so that its products with small integers are exact
_LN2 = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")


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
        row_weights: NDArray[np.float64] | None,
        soft: Soft | None,
        stats: Stats | None,
        scale: NDArray[np.float64] | None,
        grad: NDArray[Any] | None,
        stream: bool,
        num_threads: int,
    ) -> int:
        """See `fastce.kernels.Kernels.rows`."""
        _, inner, n_classes = logits.shape
        ignored = (targets < 0) | (targets >= n_classes)
        n_bad = 0
        losses[ignored] = 0
        for array in stats or ():
            if array is not None:
                array[ignored] = -1 if array.dtype == np.int64 else np.nan
        for at, where in _blocks(np.flatnonzero(~ignored), first_row, inner, n_classes):
            rows = _exponentials(_widened(logits[where]), targets[at])
            if soft is None:
                loss = _loss(rows)
            else:
                t = _given_shares(rows, soft, where)
                n_bad += _count(~(t >= 0).all(axis=1))
                shares = _weighed(t, soft)
                loss = _soft_loss(rows, shares)
            if row_weights is not None:
                loss = np.where(
                    row_weights[at] == 0, np.where(np.isnan(loss), loss, 0.0), loss * row_weights[at]
                )
            losses[at] = loss
            if stats is not None:
                for name, values in _statistics(rows).items():
                    array = getattr(stats, name)
                    if array is not None:
                        array[at] = values
            if grad is not None and scale is not None:
                found = (
                    _gradient(rows, scale[at])
                    if soft is None
                    else _soft_gradient(rows, shares, scale[at])
                )
                grad[where] = narrowed(found, grad.dtype)
        if grad is not None:
            grad[divmod(first_row + np.flatnonzero(ignored), inner)] = 0
        _sum_tiles(losses, tile_sums, n_classes)
        return n_bad if soft is not None and soft.probs is not None else _count(ignored)

    @np.errstate(all="ignore")
    def softmax(
        self,
        logits: NDArray[Any],
        first_row: int,
        n_rows: int,
        out: NDArray[Any],
        *,
        log: bool,
        stream: bool,
        num_threads: int,
    ) -> None:
        """See `fastce.kernels.Kernels.softmax`."""
        _, inner, n_classes = logits.shape
        for at, where in _blocks(np.arange(n_rows), first_row, inner, n_classes):
            rows = _exponentials(_widened(logits[where]), np.zeros(len(at), np.int64))
            found = _log_softmax(rows) if log else _softmax(rows)
            out[where] = narrowed(found, out.dtype)

    @np.errstate(all="ignore")
    def kl_from_logits(
        self,
        p_logits: NDArray[Any],
        q_logits: NDArray[Any],
        first_row: int,
        out: NDArray[Any],
        *,
        num_threads: int,
    ) -> None:
        """See `fastce.kernels.Kernels.kl_from_logits`."""
        _, inner, n_classes = p_logits.shape
        for at, where in _blocks(np.arange(len(out)), first_row, inner, n_classes):
            zeros = np.zeros(len(at), np.int64)
            p, q = (_exponentials(_widened(x[where]), zeros) for x in (p_logits, q_logits))
            out[at] = _divergence(p, q)

    @np.errstate(all="ignore")
    def distributions(
        self,
        measure: str,
        p: NDArray[Any],
        q: NDArray[Any] | None,
        first_row: int,
        out: NDArray[Any],
        *,
        base: float | None,
        num_threads: int,
    ) -> int:
        """See `fastce.kernels.Kernels.distributions`."""
        _, inner, n_classes = p.shape
        n_bad = 0
        for at, where in _blocks(np.arange(len(out)), first_row, inner, n_classes):
            a = _widened(p[where])
            b = a if q is None else _widened(q[where])
            n_bad += _count(~((a >= 0) & (b >= 0)).all(axis=1))
            if measure == "kl_divergence":
                terms = _kl_terms(a, b) * log_scale(base)[1]
                excess = _sum(a - b)
                rounding = SUMS_AGREE * _epsilon(p) * np.maximum(_sum(a), _sum(b))
                excess = np.where(np.abs(excess) <= rounding, 0.0, excess)
                out[at] = _sum(terms) + excess * log_scale(base)[1]
            else:
                out[at] = _sum(np.where(a == 0, 0.0, a * -_log(b, base))) + 0.0
        return n_bad

    @np.errstate(all="ignore")
    def information(
        self, p: NDArray[Any], out: NDArray[Any], *, base: float | None, num_threads: int
    ) -> int:
        """See `fastce.kernels.Kernels.information`."""
        n_bad = 0
        for start in range(0, len(p), _BLOCK_ELEMENTS):
            some = slice(start, start + _BLOCK_ELEMENTS)
            x = _widened(p[some])
            n_bad += _count(~(x >= 0))
            out[some] = 0.0 - _log(x, base)  # not -0
        return n_bad

    @np.errstate(all="ignore")
    def binary(
        self,
        x: NDArray[Any],
        targets: NDArray[Any],
        losses: NDArray[Any] | None,
        sums: NDArray[np.float64],
        *,
        from_logits: bool,
        weight: NDArray[Any] | None,
        pos_weight: NDArray[Any] | None,
        unit: float,
        scale: NDArray[Any] | None,
        grad_unit: float,
        grad: NDArray[Any] | None,
        num_threads: int,
    ) -> int:
        """See `fastce.kernels.Kernels.binary`."""
        n_bad = 0
        for tile, start in enumerate(range(0, len(x), BINARY_TILE)):
            some = slice(start, start + BINARY_TILE)
            v, t = _widened(x[some]), _widened(targets[some])
            w = np.ones(len(v)) if weight is None else weight[some].astype(np.float64)
            a = t if pos_weight is None else t * pos_weight[some]
            bad = ~((t >= 0) & (t <= 1)) | (not from_logits and (v < 0) | (v > 1))
            n_bad += _count(bad & (w != 0))
            loss, slope = (_binary_from_logits if from_logits else _binary_from_probs)(v, a, 1 - t)
            loss = np.where(w == 0, 0.0, loss * (w * unit))
            rounded = loss.astype(np.float64 if x.dtype == np.float64 else np.float32)
            if losses is not None:
                losses[some] = rounded
            found = rounded.tolist()
            sums[tile, 0] = exact_sum(found)
            sums[tile, 1] = exact_sum([*found, -sums[tile, 0]]) if np.isfinite(sums[tile, 0]) else 0.0
            if grad is not None:
                s = np.ones(len(v)) if scale is None else scale[some].astype(np.float64)
                slope = np.where((w == 0) | (s == 0), 0.0, slope * (s * grad_unit))
                grad[some] = narrowed(slope, grad.dtype)
        return n_bad


def _count(found: Any) -> int:
    return int(np.count_nonzero(found))


def _blocks(
    rows: NDArray[np.intp], first_row: int, inner: int, n_classes: int
) -> Iterator[tuple[NDArray[np.intp], Any]]:
    """Yield rows some at a time, and where they stand in an array of two batch axes."""
    step = max(1, _BLOCK_ELEMENTS // max(1, n_classes))
    for start in range(0, len(rows), step):
        at = rows[start : start + step]
        yield at, divmod(first_row + at, inner)


def _widened(x: NDArray[Any]) -> NDArray[np.float64]:
    return widened(x).astype(np.float64)


def _sum(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of each row, by halves, with what is rounded away on the way."""
    lost = np.zeros(len(terms))
    while (n := terms.shape[1]) > 1:
        a, b = terms[:, : n // 2], terms[:, n // 2 : n // 2 * 2]
        sums = a + b
        b1 = sums - a
        lost += ((a - (sums - b1)) + (b - b1)).sum(axis=1)
        terms = np.concatenate([sums, terms[:, -1:]], axis=1) if n % 2 else sums
    if not terms.shape[1]:
        return lost
    total = terms[:, 0]
    return total + np.where(np.isfinite(total), lost, 0.0)


def _exponentials(x: NDArray[np.float64], targets: NDArray[np.int64]) -> _Rows:
    n = np.arange(len(x))
    top = x.argmax(axis=1)  # a NaN counts as the largest
    m = x[n, top]
    d, r = _difference(x, m[:, None])
    exps = np.exp(d)
    exps += exps * r
    exps[n, top] = np.where(np.isfinite(m), 0.0, np.nan)
    return _Rows(x, targets, exps, top, m - x[n, targets], _sum(exps))


def _difference(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return d and r with ``x - y = d + r`` exactly, by Knuth's TwoSum; where d is infinite r is 0."""
    d = x - y
    x1 = d + y
    return d, np.where(np.isfinite(d), (x - x1) - (y - (x1 - d)), 0.0)


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


def _given_shares(rows: _Rows, soft: Soft, where: Any) -> NDArray[np.float64]:
    """Return t: (n, n_classes)."""
    if soft.probs is not None:
        return _widened(soft.probs[where])
    named = np.arange(rows.x.shape[1]) == rows.targets[:, None]
    return np.asarray(named, np.float64)


def _weighed(t: NDArray[np.float64], soft: Soft) -> NDArray[np.float64]:
    """Return q: (n, n_classes)."""
    q: NDArray[np.float64] = (1.0 - soft.smoothing) * t + soft.smoothing / t.shape[1]
    return q if soft.weight is None else q * soft.weight


def _soft_loss(rows: _Rows, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    m = np.take_along_axis(rows.x, rows.top[:, None], axis=1)
    gaps = np.where(shares == 0, 0.0, shares * (m - rows.x))
    loss = _sum(gaps) + _sum(shares) * np.log1p(rows.rest)
    return np.where(np.isnan(rows.rest), np.nan, loss)


def _soft_gradient(
    rows: _Rows, shares: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    n = np.arange(len(rows.x))
    total = 1.0 + rows.rest
    sums = _sum(shares)
    grad = _softmax(rows)
    grad *= sums[:, None]
    grad -= shares
    # The maximum's own: what the others get too much. Nothing of a p next to 1 cancels then.
    others = shares.copy()
    others[n, rows.top] = 0.0
    top = _sum(others) - sums * (rows.rest / total)
    grad[n, rows.top] = np.where(rows.rest < 1, top, grad[n, rows.top])
    return np.where(scale[:, None] == 0, grad * 0.0 + 0.0, grad * scale[:, None])


def _softmax(rows: _Rows) -> NDArray[np.float64]:
    p = rows.exps.copy()
    p[np.arange(len(p)), rows.top] = 1.0
    p /= (1.0 + rows.rest)[:, None]
    p[np.isnan(rows.rest)] = np.nan
    return p


def _log_softmax(rows: _Rows) -> NDArray[np.float64]:
    m = np.take_along_axis(rows.x, rows.top[:, None], axis=1)
    return 0.0 - ((m - rows.x) + np.log1p(rows.rest)[:, None])


def _statistics(rows: _Rows) -> dict[str, NDArray[Any]]:
    n = np.arange(len(rows.x))
    m, x_t = rows.x[n, rows.top], rows.x[n, rows.targets]
    finite = ~np.isnan(rows.rest)
    total = 1.0 + rows.rest
    p = _softmax(rows)
    below = _sum(np.where(p == 0, 0.0, p * (m[:, None] - rows.x)))
    others = np.where(rows.top == rows.targets, rows.rest, total - rows.exps[n, rows.targets]) / total
    p[n, rows.targets] = 0.0
    return {
        "lse": np.where(np.isfinite(m), m + np.log1p(rows.rest), m),
        "target_logit": x_t,
        "max_logit": m,
        "argmax": np.where(finite, rows.top, -1),
        "rank": np.where(finite, _rank(rows), -1),
        "entropy": np.where(finite, np.log1p(rows.rest) + below, np.nan),
        "max_prob": 1.0 / total,
        "brier": np.where(finite, _sum(p * p) + others * others, np.nan),
    }


def _rank(rows: _Rows) -> NDArray[np.int64]:
    target_logit = np.take_along_axis(rows.x, rows.targets[:, None], axis=1)
    ahead = np.count_nonzero(rows.x > target_logit, axis=1)
    tied_before = (rows.x == target_logit) & (np.arange(rows.x.shape[1]) < rows.targets[:, None])
    return np.asarray(ahead + np.count_nonzero(tied_before, axis=1), dtype=np.int64)


def _sum_tiles(losses: NDArray[Any], tile_sums: NDArray[np.float64], n_classes: int) -> None:
    step = tile_rows(n_classes)
    for tile, start in enumerate(range(0, len(losses), step)):
        tile_sums[tile] = exact_sum(losses[start : start + step].tolist())


# ---- Distributions ----


def _divergence(p: _Rows, q: _Rows) -> NDArray[np.float64]:
    """Return the sum of p (exp(-d) - 1 + d), where d = log p - log q is what is left of x_p - x_q.

    Of rows that are close little is left, so what the subtractions round away is carried along. d is
    off by the error of the rows' sums, s, the same for all classes. That adds s^2 / 2 to the result, to
    first order, and makes the sum of q - p, which should be 0, s: so it can be subtracted and, where it
    is not small against the result, the sum be taken again with what is known of s.
    """
    a, b = _softmax(p), _softmax(q)
    m_p, m_q = (np.take_along_axis(rows.x, rows.top[:, None], axis=1) for rows in (p, q))
    u, u_error = _difference(p.x, q.x)
    gap, gap_error = _difference(m_p, m_q)
    shift, shift_error = _difference(gap, (np.log1p(q.rest) - np.log1p(p.rest))[:, None])
    low = gap_error + shift_error
    for _ in range(4):
        v, v_error = _difference(u, shift)
        d = np.where(a == 0, 1.0, v + (v_error + u_error - low))
        near = np.abs(d) < 1
        terms = np.where(near, a * _excess(np.where(near, d, 0.0)), b + a * (d - 1.0))
        terms = _sum(np.where(np.isposinf(u), np.inf, terms))  # however small p is
        s = terms - _sum(a * d)
        s = np.where(np.isfinite(s), s, 0.0)
        square = s * s * (0.5 - s / 3)  # s - log1p(s)
        again = s * s > terms / 64
        if not again.any():
            break
        step = np.where(again, s - square, 0.0)[:, None]
        shift, low = _difference(shift, step - low)
    found = np.maximum(terms - square, 0.0)
    return np.where(np.isnan(p.rest) | np.isnan(q.rest), np.nan, found)


def _excess(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(-d) - 1 + d for |d| <= 1, by its series: d^2 / 2 - d^3 / 6 + ..."""
    term, total = d * d / 2, np.zeros_like(d)
    for k in range(3, 20):
        total += term
        term = term * (-d / k)
    return total


def _log(p: NDArray[np.float64], base: float | None) -> NDArray[np.float64]:
    """Return the logarithm, exact for powers of two if the base is 2."""
    fraction, exponent = np.frexp(p)
    low = fraction < np.sqrt(0.5)  # so that the fraction's logarithm never outweighs the exponent's
    fraction = np.where(low, 2 * fraction, fraction)
    exponent = exponent - low
    of_2, of_e = log_scale(base)
    found = exponent * of_2 + np.log(fraction) * of_e
    return np.where((p == 0) | ~np.isfinite(p), np.log(p) * of_e, found)


def _kl_terms(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p log(p/q) - p + q, without cancellation.

    With s = (p - q) / (p + q), log(p/q) is 2 atanh(s) = 2 s (1 + z A), where z = s^2 and A = 1/3 + z/5
    + z^2/7 + ...; all together (p - q) s (1 + s (1 + s) A). Unless p/q is in [1/2, 2], that is taken of
    p and 2^k q, which is next to p, and the rest is p k log(2) - (2^k q - q).
    """
    near = (p <= 2 * q) & (q <= 2 * p) | (p == 0) | (q == 0)
    k = np.where(near, 0.0, np.rint(np.log2(p) - np.log2(q)))
    q_k = np.ldexp(q, k.astype(np.intc))
    s = (p - q_k) / (p + q_k)
    z = s * s
    a, power = np.zeros_like(z), np.ones_like(z)
    for i in range(3, 37, 2):
        a += power / i
        power = power * z
    close = (p - q_k) * s * (1 + s * (1 + s) * a)
    rest = p * (k * _LN2[0]) - (q_k - q) + p * (k * _LN2[1])
    return np.where(p == 0, q, np.where(q == 0, np.inf, close + rest))


def _epsilon(p: NDArray[Any]) -> float:
    return 2.0**-7 if p.dtype == np.uint16 else float(np.finfo(p.dtype).eps)


# ---- Binary ----


def _binary_from_logits(
    x: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    e = np.exp(-np.abs(x))
    side = np.where(x > 0, b, a)
    loss = (a + b) * np.log1p(e) + np.where(side == 0, 0.0, side * np.abs(x))
    likely, unlikely = 1 / (1 + e), e / (1 + e)  # sigmoid of |x|, of -|x|
    slope = np.where(x > 0, b * likely - a * unlikely, b * unlikely - a * likely)
    return np.where(np.isnan(x), np.nan, loss), np.where(np.isnan(x), np.nan, slope + 0.0)


def _binary_from_probs(
    p: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    loss = np.where(a == 0, 0.0, a * -np.log(p)) + np.where(b == 0, 0.0, b * -np.log1p(-p))
    slope = np.where(b == 0, 0.0, b / (1 - p)) - np.where(a == 0, 0.0, a / p)
    return np.where(np.isnan(p), np.nan, loss + 0.0), np.where(np.isnan(p), np.nan, slope + 0.0)
