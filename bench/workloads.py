"""What is timed: the grid of shapes, their seeded data, and the bytes each task must move."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce.bench import TASKS as _TASKS
from fastce.bench import numpy_dtype, sample_logits

#: Losses and gradient, in an array that the library allocates.
FRESH = "loss+grad, fresh"

#: Model bytes per element, in units of its size. The fresh gradient has the same model: that its pages
#: must be supplied first is part of what it costs.
TASKS = {**_TASKS, FRESH: _TASKS["loss+grad"]}

_LINE = 64  # bytes: what memory delivers at a time


@dataclasses.dataclass(frozen=True)
class Workload:
    """One shape, layout and dtype, and why it is in the grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str  # the table it is shown in
    why: str
    axis: int = -1  # of the classes
    step: int = 1  # elements from one class to the next, where the class axis is the last
    scale: int = 1  # of the logits
    fresh: bool = False  # whether the fresh gradient is timed too
    scaling: bool = False  # whether it is timed with fewer threads too

    @property
    def n_classes(self) -> int:
        """The length of the class axis."""
        return self.shape[self.axis]

    @property
    def n_elements(self) -> int:
        """The number of logits."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """The size of the logits."""
        return self.n_elements * numpy_dtype(self.dtype).itemsize

    @property
    def tasks(self) -> list[str]:
        """The tasks to time."""
        return [task for task in TASKS if task != FRESH or self.fresh]

    def model_bytes(self, task: str) -> int:
        """Return the bytes a task must move between memory and processor, at the least.

        Where classes lie apart, whole cache lines must be read all the same.
        """
        apart = min(self.step, _LINE // numpy_dtype(self.dtype).itemsize)
        return self.n_bytes * (TASKS[task] - 1 + apart)

    def scaled(self, factor: float) -> Workload:
        """Return the same workload with ``factor`` times the rows, at least 8, for a quick look."""
        shape = list(self.shape)
        rows = max((i for i in range(len(shape)) if i != self.axis % len(shape)), key=shape.__getitem__)
        shape[rows] = min(shape[rows], max(8, math.ceil(shape[rows] * factor)))
        return dataclasses.replace(self, shape=tuple(shape))

    def data(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return logits and targets, the same in every process.

        Every other target is its row's largest logit, as a trained model would have it: there the
        loss is small, and its relative error the hardest to keep. The others are uniform.
        """
        *batch, last = self.shape
        logits = sample_logits((*batch, last * self.step), self.dtype)[..., :: self.step]
        if self.scale != 1:
            logits *= logits.dtype.type(self.scale)
        rows = np.moveaxis(logits, self.axis, -1)
        targets = np.random.default_rng(1).integers(self.n_classes, size=rows.shape[:-1])
        some = (slice(None, None, 2), *([slice(None)] * (targets.ndim - 1)))
        real = np.float64 if self.dtype == "float64" else np.float32  # half has no fast argmax
        targets[some] = rows[some].astype(real, copy=False).argmax(axis=-1)
        return logits, targets


def _rows(
    n_rows: int, n_classes: int, dtype: str, why: str, group: str | None = None, **more: bool
) -> Workload:
    name = f"{n_rows}x{n_classes}-{dtype}"
    return Workload(name, (n_rows, n_classes), dtype, group or dtype, why, **more)


_MAIN = (
    (1_000_000, 10, "few classes: the cost per row (log, target, loop ends) is the cost"),
    (100_000, 100, "rows of a few vectors: neither the row's nor the element's cost hides"),
    (10_000, 1000, "ImageNet's classes: a row fits L1; all of it may fit L3"),
    (2048, 32_000, "a language model's vocabulary: a row exceeds L1, the whole any L3"),
    (512, 128_256, "a recent, larger vocabulary: a row fills a quarter of a 2 MB L2"),
)

WORKLOADS = {
    workload.name: workload
    for workload in (
        _rows(1_000_000, 2, "float32", "two classes: even less work per row than with ten"),
        *(
            _rows(n, c, "float32", why, fresh=c == 32_000, scaling=c in (10, 1000, 32_000))
            for n, c, why in _MAIN
        ),
        _rows(1, 4_000_000, "float32", "one row: threads must share its columns", scaling=True),
        *(
            _rows(n, c, dtype, f"{why}; in {dtype}", fresh=c == 32_000 and dtype != "float16")
            for dtype in ("bfloat16", "float16", "float64")
            for n, c, why in _MAIN
        ),
        Workload(
            "64x1000x256-float32-axis1",
            (64, 1000, 256),
            "float32",
            "layouts",
            "class axis in the middle: pixels or positions are neighbours, not classes",
            axis=1,
        ),
        Workload(
            "1000x16384-float32-axis0",
            (1000, 16_384),
            "float32",
            "layouts",
            "class axis first: as a product W @ x.T leaves its logits",
            axis=0,
        ),
        Workload(
            "10000x1000-float32-step2",
            (10_000, 1000),
            "float32",
            "layouts",
            "every other column of a wider array: memory delivers twice the bytes",
            step=2,
        ),
        Workload(
            "10000x1000-float32-scale20",
            (10_000, 1000),
            "float32",
            "layouts",
            "logits far apart: exponentials that are nearly 0, or subnormal on the way there",
            scale=20,
        ),
        _rows(8, 10, "float32", "a small call: checks and dispatch are the cost", group="small calls"),
    )
}
