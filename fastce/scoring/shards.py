"""Which files belong together: logits files, and for each the targets of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from fastce.scoring.formats import InputError, Paths, Source, find


@dataclass(frozen=True, slots=True)
class Shard:
    """One logits file and where its targets are."""

    logits: Source
    targets: Source
    first_target: int

    @property
    def n_rows(self) -> int:
        """Rows of logits, all leading axes together."""
        return math.prod(self.logits.shape[:-1])

    @property
    def n_classes(self) -> int:
        """The length of the last axis."""
        return self.logits.shape[-1]

    @property
    def loss_dtype(self) -> np.dtype[Any]:
        """The dtype the kernels compute in, of native byte order."""
        return np.dtype(np.float64 if self.logits.dtype.itemsize == 8 else np.float32)


def find_shards(logits: Paths, targets: Paths) -> list[Shard]:
    """Check every file and say which targets belong to which logits, before any row is read."""
    xs, ys = find_logits(logits), find(targets, "targets")
    if not xs or len(ys) not in (1, len(xs)):
        raise ValueError(
            f"targets: expected one file, or one for each of the {len(xs)} logits files; got {len(ys)}"
        )
    groups = [xs] if len(ys) == 1 else [[x] for x in xs]
    return [shard for group, y in zip(groups, ys, strict=True) for shard in _shards_of(group, y)]


def find_logits(paths: Paths) -> list[Source]:
    """Check files of logits, which must be of one dtype and number of classes."""
    xs = find(paths, "logits")
    for x in xs:
        _check_logits(x, xs[0])
    return xs


def _check_logits(x: Source, first: Source) -> None:
    if len(x.shape) not in (2, 3) or x.shape[-1] == 0:
        raise InputError(
            f"{x.path}: expected logits of shape (n_rows, n_classes) or (n, m, n_classes), "
            f"got {x.shape}; reshape and save again"
        )
    if (x.dtype, x.shape[-1]) != (first.dtype, first.shape[-1]):
        raise InputError(
            f"{x.path}: expected {first.dtype.name} logits of {first.shape[-1]} classes as in "
            f"{first.path}, got {x.dtype.name} of {x.shape[-1]}; score them apart"
        )


def _shards_of(xs: list[Source], y: Source) -> list[Shard]:
    """Return the shards whose targets follow one another in one file."""
    n_rows = [math.prod(x.shape[:-1]) for x in xs]
    allowed: list[tuple[int, ...]] = [(sum(n_rows),)]
    if all(len(x.shape) == 3 and x.shape[1] == xs[0].shape[1] for x in xs):
        allowed.append((sum(x.shape[0] for x in xs), xs[0].shape[1]))
    if y.shape not in allowed:
        what = str(xs[0].path) if len(xs) == 1 else f"{len(xs)} logits files"
        raise InputError(
            f"{y.path}: expected targets of shape {' or '.join(map(str, allowed))} for {what}, "
            f"got {y.shape}"
        )
    first_targets = accumulate(n_rows[:-1], initial=0)
    return [Shard(x, y, first) for x, first in zip(xs, first_targets, strict=True)]
