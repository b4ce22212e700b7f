"""Inputs that look wrong: the traps that every script for scoring dumps falls into once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.formats import Kind
from fastce.scoring.scorer import Options
from fastce.stats import row_stats

#: Rows that are looked at.
SAMPLE_ROWS = 256

# An off-by-one shift: the neighbour's target fits better by so much, in nats, ...
_SHIFT_GAIN = 1.0
# ... in a sample of at least so many rows.
_SHIFT_ROWS = 32


def looks_wrong(x: NDArray[Any], y: NDArray[Any], options: Options) -> list[str]:
    """Return what looks wrong in a sample of rows and their targets, -1 where these are ignored."""
    x = x[:, : options.vocab].astype(np.float64)
    if len(x) == 0 or x.shape[1] < 2:
        return []
    found = [_kind(x, options), _unused_tail(x, options), _off_by_one(x, y, options)]
    return [text for text in found if text is not None]


def guess_kind(x: NDArray[np.float64]) -> Kind:
    """Return what the numbers of some rows are: logits, logprobs or probs."""
    if not np.isfinite(x.max(axis=1)).all():
        return "logits"
    if x.min() >= 0 and np.allclose(x.sum(axis=1), 1, atol=0.02):
        return "probs"
    with np.errstate(over="ignore"):
        sums = np.exp(np.minimum(x, 700)).sum(axis=1)
    return "logprobs" if x.max() <= 0 and np.allclose(sums, 1, atol=0.02) else "logits"


def used_columns(x: NDArray[Any], first: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which columns of some rows are neither those of a first row, nor -inf."""
    return np.asarray(np.any((x != first) & ~np.isneginf(x), axis=0))


def unused_tail(used: NDArray[np.bool_]) -> int:
    """Return how many of the last columns are not used; 0 if none is."""
    return int(np.argmax(used[::-1]))


def _kind(x: NDArray[np.float64], options: Options) -> str | None:
    guessed = guess_kind(x)
    if options.kind == "logits" and guessed == "probs":
        return "these look like probabilities, not logits (rows in [0, 1] that sum to 1); kind: probs"
    if options.kind == "probs" and (x.min() < 0 or x.max() > 1.02):
        return "these do not look like probabilities (values outside [0, 1])"
    if options.kind == "logprobs" and guessed != "logprobs":
        return "these do not look like log-probabilities (rows whose exp does not sum to 1)"
    return None


def _unused_tail(x: NDArray[np.float64], options: Options) -> str | None:
    n = unused_tail(used_columns(x, x[0])) if len(x) >= 8 else 0
    if n < 2 or options.kind != "logits":
        return None
    rest = x.shape[1] - n
    return (
        f"the last {n} of {x.shape[1]} classes are the same in every row looked at: "
        f"if the vocabulary is padded, set vocab to {rest}"
    )


def _off_by_one(x: NDArray[np.float64], y: NDArray[Any], options: Options) -> str | None:
    mean = _mean_loss(x, y, options)
    for step, what in ((1, "the next row's"), (-1, "the previous row's")):
        shifted = np.roll(y, -step)
        shifted[-1 if step == 1 else 0] = -1
        if mean is None or (other := _mean_loss(x, shifted, options)) is None:
            continue
        if mean - other > _SHIFT_GAIN and other < mean / 2:
            remedy = "; set shift" if step == 1 else ""
            return (
                f"targets look off by one: with {what} the mean loss of the first rows is {other:.2f} "
                f"instead of {mean:.2f}{remedy}"
            )
    return None


def _mean_loss(x: NDArray[np.float64], y: NDArray[Any], options: Options) -> float | None:
    kept = (y >= 0) & (y < x.shape[1])
    if kept.sum() < _SHIFT_ROWS:
        return None
    logits = x[kept]
    if options.kind == "probs":
        with np.errstate(divide="ignore", invalid="ignore"):
            logits = np.log(logits)
    losses = row_stats(logits, y[kept].astype(np.int64), outputs=["loss"]).loss
    assert losses is not None
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if len(finite) >= _SHIFT_ROWS else None
