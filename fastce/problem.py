"""Arguments in, one checked `Problem` out: all validation and all messages are here.

A problem is a batch of rows, whatever the shape and layout of the arrays it came in: the class axis is
last, the targets are flat and int64, and an ignored row is marked by a negative target. Blocks of
rows are taken from it as the kernels want them: in place where the layout allows, else copied
a block at a time, so that no layout costs a full copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce.kernels import tile_rows

_REDUCTIONS = ("none", "sum", "mean")

# The dtypes accepted for logits and the dtype their kernels compute in.
_COMPUTE: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}

# A call hands the kernels at most this many elements at a time, so that Ctrl-C is heard between
# two slices: 10 ms of kernel time at 1 ns an element and 2 threads, against 10 us for the hand-over.
_SLICE_ELEMENTS = 2**24
# Rows that must be copied first go in smaller slices, which stay in the last-level cache.
_COPY_ELEMENTS = 2**20


class RowView:
    """An array whose last axis is the classes, seen as ``n_rows`` rows."""

    def __init__(self, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
        self.array = array
        self.dtype = dtype
        self.n_rows = math.prod(array.shape[:-1])
        self.flat = _without_copy(array, (self.n_rows, array.shape[-1]))
        #: Whether a kernel can work on the memory itself.
        self.direct = (
            self.flat is not None
            and array.dtype == dtype  # which a foreign byte order is not
            and array.flags.aligned
            and (array.shape[-1] <= 1 or array.strides[-1] == array.itemsize)
            and self.flat.strides[0] % array.itemsize == 0
        )

    def read(self, rows: slice) -> NDArray[Any]:
        """Return these rows as a kernel wants them; a view where it can be one."""
        if self.flat is None:
            return np.ascontiguousarray(self.array[self._index(rows)], dtype=self.dtype)
        block = self.flat[rows]
        return block if self.direct else np.ascontiguousarray(block, dtype=self.dtype)

    def buffer(self, rows: slice) -> NDArray[Any]:
        """Return memory in which a kernel may write these rows; `write` puts it in place."""
        if self.direct:
            return self.read(rows)
        return np.empty((rows.stop - rows.start, self.array.shape[-1]), self.dtype)

    def write(self, rows: slice, block: NDArray[Any]) -> None:
        """Store what a kernel has written in a buffer of these rows."""
        if self.direct:
            return  # it is in place
        if self.flat is not None:
            self.flat[rows] = block
        else:
            self.array[self._index(rows)] = block

    def _index(self, rows: slice) -> tuple[NDArray[np.intp], ...]:
        return np.unravel_index(np.arange(rows.start, rows.stop), self.array.shape[:-1])


@dataclass(frozen=True, slots=True)
class Problem:
    """A checked batch of rows and targets."""

    rows: RowView
    targets: NDArray[np.int64]  # (n_rows,) a class id, or negative: the row is ignored
    n_classes: int
    n_kept: int
    batch_shape: tuple[int, ...]
    axis: int  # of the classes in the caller's logits

    @property
    def n_rows(self) -> int:
        """The number of rows, the ignored ones included."""
        return self.rows.n_rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the kernels and of per-row results."""
        return self.rows.dtype

    def slices(self, *others: RowView) -> Iterator[slice]:
        """Cut the rows into slices of whole tiles; the cuts do not change any result."""
        direct = self.rows.direct and all(other.direct for other in others)
        elements = _SLICE_ELEMENTS if direct else _COPY_ELEMENTS
        tile = tile_rows(self.n_classes)
        step = tile * max(1, elements // max(1, tile * self.n_classes))
        for start in range(0, self.n_rows, step):
            yield slice(start, min(start + step, self.n_rows))


def check(logits: ArrayLike, targets: ArrayLike, *, axis: int, ignore_index: int | None) -> Problem:
    """Check logits, targets and ignore_index, and return them as a `Problem`."""
    x = np.asarray(logits)
    compute = _COMPUTE.get(x.dtype.name)
    if compute is None:
        raise TypeError(
            f"logits: expected dtype {' or '.join(_COMPUTE)}, got {x.dtype}; "
            "convert with logits.astype(numpy.float32)"
        )
    if x.ndim == 0:
        raise ValueError("logits: expected at least one axis, of classes; got a scalar")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"axis: expected a value in [{-x.ndim}, {x.ndim}) for logits of shape {x.shape}, got {axis}"
        )
    x = np.moveaxis(x, axis, -1)
    batch_shape, n_classes = x.shape[:-1], x.shape[-1]
    view = RowView(x, compute)
    if n_classes == 0 and view.n_rows > 0:
        raise ValueError(
            f"logits: expected at least one class, got none along axis {axis}, shape {np.shape(logits)}"
        )
    flat = _check_targets(targets, batch_shape)
    kept_targets, n_kept = _check_range(flat, n_classes, ignore_index, batch_shape)
    return Problem(view, kept_targets, n_classes, n_kept, batch_shape, axis % x.ndim)


def check_reduction(reduction: str) -> None:
    """Check the name of a reduction."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")


def check_losses_out(out: NDArray[Any] | None, problem: Problem, reduction: str) -> None:
    """Check the array that is to receive the losses of the rows."""
    if out is None:
        return
    if reduction != "none":
        raise ValueError(
            f"out: takes the losses of the rows, which needs reduction='none'; got {reduction!r}"
        )
    _check_out(out, problem.batch_shape, problem)


def check_grad_out(out: NDArray[Any] | None, problem: Problem, shape: tuple[int, ...]) -> None:
    """Check the array that is to receive the gradient; it may be the logits themselves."""
    if out is not None:
        _check_out(out, shape, problem, may_be_logits=True)


def check_scale(grad_output: ArrayLike | None, problem: Problem, reduction: str) -> NDArray[np.float64]:
    """Return the upstream gradient of each row's loss, the mean's division included."""
    upstream = np.asarray(1.0 if grad_output is None else grad_output)
    if upstream.dtype.kind not in "fiu":
        raise TypeError(f"grad_output: expected real numbers, got dtype {upstream.dtype}")
    allowed = [()] if reduction != "none" else [(), problem.batch_shape]
    if upstream.shape not in allowed:
        raise ValueError(
            f"grad_output: expected shape {' or '.join(map(str, allowed))} with "
            f"reduction={reduction!r}, got {upstream.shape}"
        )
    scale = upstream.astype(np.float64)
    if reduction == "mean":
        scale = scale / max(1, problem.n_kept)  # nothing kept: the gradient is 0 all the same
    return np.broadcast_to(scale.reshape(-1), (problem.n_rows,))


def _check_out(
    out: NDArray[Any], shape: tuple[int, ...], problem: Problem, may_be_logits: bool = False
) -> None:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    if out.dtype.name not in _COMPUTE:
        raise TypeError(f"out: expected dtype {' or '.join(_COMPUTE)}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if any(n > 1 and step == 0 for n, step in zip(out.shape, out.strides, strict=True)):
        raise ValueError("out: expected an element of its own for each result, got a broadcast array")
    logits = np.moveaxis(problem.rows.array, -1, problem.axis)
    if may_be_logits and _same_memory(out, logits):
        return
    for name, array in (("logits", logits), ("targets", problem.targets)):
        if _overlap(out, array):
            hint = "; pass out=logits to work in place" if may_be_logits and name == "logits" else ""
            raise ValueError(f"out: overlaps {name}{hint}")


def _same_memory(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True  # interlaced beyond quick proof: refuse, as for a real overlap


def _without_copy(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any] | None:
    try:
        return array.reshape(shape, copy=False)
    except ValueError:
        return None


def _check_targets(targets: ArrayLike, batch_shape: tuple[int, ...]) -> NDArray[Any]:
    y = np.asarray(targets)
    if y.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integer class ids, got dtype {y.dtype}")
    if y.shape != batch_shape:
        raise ValueError(
            f"targets: expected shape {batch_shape} (logits without the class axis), got {y.shape}"
        )
    return y.reshape(-1)


def _check_range(
    y: NDArray[Any], n_classes: int, ignore_index: int | None, batch_shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], int]:
    """Return the targets as int64 with ignored rows negative, and how many rows are kept."""
    inside = (y >= 0) & (y < n_classes)
    ignored = (y == ignore_index) if ignore_index is not None else np.zeros(y.shape, bool)
    if not inside.all():
        bad = ~(inside | ignored)
        if bad.any():
            first = int(bad.argmax())
            where = ", ".join(map(str, np.unravel_index(first, batch_shape))) if batch_shape else ""
            value = int(y[first])
            raise IndexError(
                f"targets[{where}] = {value} is outside [0, {n_classes}); "
                f"pass ignore_index={value} if it is padding"
            )
    n_ignored = int(np.count_nonzero(ignored))
    if n_ignored and ignore_index is not None and ignore_index >= 0:
        return np.where(ignored, np.int64(-1), y.astype(np.int64)), len(y) - n_ignored
    return np.ascontiguousarray(y, dtype=np.int64), len(y) - n_ignored
