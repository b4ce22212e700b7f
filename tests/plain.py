"""The figures by their definitions: plain Python and NumPy in float64, on whole arrays."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest


def row_values(x, y, *, kind="logits", vocab=None, temperature=1.0):
    """Return loss, rank, entropy, largest probability and Brier score of each row."""
    x = np.asarray(x, np.float64)[:, :vocab]
    if kind == "probs":
        with np.errstate(divide="ignore"):
            x = np.log(x)
    x = x / temperature
    found = []
    for row, target in zip(x.tolist(), y.tolist(), strict=True):
        top = max(row)
        powers = [math.exp(value - top) for value in row]
        total = math.fsum(powers)
        p = [power / total for power in powers]
        given = kind != "logits" and temperature == 1
        found.append(
            (
                -row[target] if given else math.log(total) + top - row[target],
                sum(v > row[target] or (v == row[target] and j < target) for j, v in enumerate(row)),
                -math.fsum(q * math.log(q) for q in p if q),
                max(p),
                math.fsum((q - (j == target)) ** 2 for j, q in enumerate(p)),
            )
        )
    return np.array(found).reshape(-1, 5).T


def figures(x, y, kept, *, starts=None, top_k=(1, 5), n_bins=15, **options):
    """Return the figures of flat rows; ``starts`` are those of sequences, and the end."""
    loss, rank, entropy, confidence, brier = row_values(x[kept], y[kept], **options)
    n = len(loss)
    mean = math.fsum(loss) / n
    bins = [[] for _ in range(n_bins)]
    for c, r in zip(confidence, rank, strict=True):
        i = next(i for i in range(n_bins) if c <= (i + 1) / n_bins or i == n_bins - 1)
        bins[i].append((c, r == 0))
    gaps = [
        (len(rows), abs(math.fsum(c for c, _ in rows) - sum(hit for _, hit in rows)) / len(rows))
        for rows in bins
        if rows
    ]
    values = {
        "rows": len(kept),
        "ignored": len(kept) - n,
        "nll_sum": math.fsum(loss),
        "mean_nll": mean,
        "standard_error": math.sqrt(math.fsum((loss - mean) ** 2) / (n - 1) / n),
        "perplexity": math.exp(mean),
        "top_k_accuracy": {k: float((rank < k).mean()) for k in top_k},
        "mean_rank": rank.mean(),
        "mean_entropy": math.fsum(entropy) / n,
        "mean_confidence": math.fsum(confidence) / n,
        "brier": math.fsum(brier) / n,
        "ece": math.fsum(m * gap for m, gap in gaps) / n,
        "mce": max(gap for _, gap in gaps),
        "bin_rows": [len(rows) for rows in bins],
        "loss_histogram": [
            sum(0.25 * i <= value < (0.25 * (i + 1) if i < 80 else math.inf) for value in loss)
            for i in range(81)
        ],
    }
    if starts is not None:
        values |= _of_sequences(loss, np.flatnonzero(kept), np.asarray(starts))
    return values


def _of_sequences(loss, rows, starts):
    index = np.searchsorted(starts, rows, side="right") - 1
    means = [loss[index == i].mean() for i in range(len(starts) - 1) if (index == i).any()]
    firsts = [*range(8), *((4 + quarter) << octave for octave in range(1, 20) for quarter in range(4))]
    positions = rows - starts[index]
    found = []
    for first, end in pairwise(firsts):
        there = (positions >= first) & (positions < end)
        if there.any():
            found.append((first, end - 1, int(there.sum()), loss[there].mean()))
    return {
        "sequences": len(means),
        "mean_sequence_perplexity": np.exp(means).mean(),
        "positions": found,
    }


def assert_figures(found, expected, *, rel):
    """Compare `Figures` with what `figures` returned."""
    expected = dict(expected)
    for name in ("rows", "ignored", "sequences"):
        if name in expected:
            assert getattr(found, name) == expected.pop(name), name
    assert [b.rows for b in found.reliability] == expected.pop("bin_rows")
    assert list(found.loss_histogram) == expected.pop("loss_histogram")
    positions = expected.pop("positions", [])
    assert [(b.first, b.last, b.rows) for b in found.positions] == [row[:3] for row in positions]
    assert [b.mean_nll for b in found.positions] == _near([row[3] for row in positions], rel)
    for name, value in expected.items():
        assert getattr(found, name) == _near(value, rel), name


def _near(value, rel):
    """Compare to a relative error; differences as of ECE are of numbers of order 1."""
    return pytest.approx(value, rel=rel, abs=rel)
