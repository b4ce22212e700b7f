"""What is timed: the grid of shapes, their seeded data, and the bytes each task must move."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Model bytes per element, in units of its size. The loss reads each logit once; the gradient adds
# one write. A second look at a row comes from cache, as even a row of 128 256 float32 logits fits L2.
TASKS = {"loss": 1, "loss+grad": 2}

# Standard normal logits would give rows without a favourite class. Four times wider, as from a
# trained model, some rows are confident: there naive formulas cancel, and their errors show. Yet no
# exponential is subnormal in float32, which would slow down contenders that do not flush it.
_SPREAD = 4.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape and dtype, and why it is in the grid."""

    name: str
    n_rows: int
    n_classes: int
    dtype: str
    why: str

    @property
    def n_elements(self) -> int:
        """The number of logits."""
        return self.n_rows * self.n_classes

    def model_bytes(self, task: str) -> int:
        """Return the bytes a task must move between memory and processor, at the least."""
        return self.n_elements * np.dtype(self.dtype).itemsize * TASKS[task]

    def scaled(self, factor: float) -> Workload:
        """Return the same workload with ``factor`` times the rows, for a quick look."""
        return dataclasses.replace(self, n_rows=max(1, math.ceil(self.n_rows * factor)))

    def data(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return logits and targets, the same in every process.

        Every other target is its row's largest logit, as a trained model would have it: there the
        loss is small, and its relative error the hardest to keep. The others are uniform.
        """
        rng = np.random.default_rng(0)
        dtype = np.dtype(self.dtype)
        logits = rng.standard_normal((self.n_rows, self.n_classes), dtype=dtype.type)
        logits *= dtype.type(_SPREAD)
        targets = rng.integers(self.n_classes, size=self.n_rows)
        targets[::2] = logits[::2].argmax(axis=1)
        return logits, targets


def _grid(*rows: tuple[int, int, str, str]) -> dict[str, Workload]:
    return {
        name: Workload(name, n_rows, n_classes, dtype, why)
        for n_rows, n_classes, dtype, why in rows
        for name in [f"{n_rows}x{n_classes}-{dtype}"]
    }


WORKLOADS = _grid(
    (1_000_000, 10, "float32", "few classes: the cost per row (log, target, loop ends) is the cost"),
    (100_000, 100, "float32", "rows of a few vectors: neither the row's nor the element's cost hides"),
    (10_000, 1000, "float32", "ImageNet's classes: a row fits L1; at 40 MB all of it may fit L3"),
    (2048, 32_000, "float32", "a language model's vocabulary: a row exceeds L1, the whole any L3"),
    (512, 128_256, "float32", "a recent, larger vocabulary: a row fills a quarter of a 2 MB L2"),
    (10_000, 1000, "float64", "float64 while rows fit L1: arithmetic, not memory, sets the pace"),
    (2048, 32_000, "float64", "float64 from memory: twice the bytes of float32, same bandwidth"),
)
