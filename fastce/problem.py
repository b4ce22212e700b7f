"""Arguments in, one checked `Problem` out: all validation and all messages are here.

A problem is a batch of rows, whatever the shape and layout of the arrays it came in: the class axis is
last, the targets are flat and int64. Kernels take the rows where they lie, if the memory is aligned, of
native byte order, and its batch axes merge into two; other layouts are copied a block at a time, so
that no layout costs a full copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce.kernels import tile_rows

REDUCTIONS = ("none", "sum", "mean")

# A call hands the kernels at most this many elements at a time, so that Ctrl-C is heard between
# two slices: 10 ms of kernel time at 1 ns an element and 2 threads, against 10 us for the hand-over.
_SLICE_ELEMENTS = 2**24
# Rows that must be copied first go in smaller slices, which stay in the last-level cache.
_COPY_ELEMENTS = 2**20


class Format(NamedTuple):
    """How the elements of an array are seen."""

    name: str  #: the public name of the dtype
    memory: np.dtype[Any]  #: as the kernels see the memory: uint16 holds the bits of bfloat16
    result: np.dtype[Any]  #: of per-row results


_F32, _F64, _INT64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
_FORMATS = {
    f.name: f
    for f in (
        Format("float32", _F32, _F32),
        Format("float64", _F64, _F64),
        Format("float16", np.dtype(np.float16), _F32),
        Format("bfloat16", np.dtype(np.uint16), _F32),
    )
}
FLOAT32 = _FORMATS["float32"]
_NAMES = "float32, float64, float16 or bfloat16"
# A dtype's name is a slow property: one of the first look-ups that a small call would notice.
_BY_DTYPE: dict[np.dtype[Any], Format] = {
    f.memory: f for f in _FORMATS.values() if f.name != "bfloat16"
}
FORMAT_NAMES = {dtype: f.name for dtype, f in _BY_DTYPE.items()}


class RowView:
    """An array whose last axis is the classes, seen as ``n_rows`` rows in a format the kernels take."""

    __slots__ = ("array", "blocks", "direct", "format", "n_rows", "own")

    def __init__(self, array: NDArray[Any], own: Format, format: Format) -> None:
        self.array = array
        self.own = own  # what the elements are
        self.format = format  # what the kernels get
        self.blocks: NDArray[Any] | None  # (outer, inner, n_classes), the same memory
        if array.ndim == 2:
            self.n_rows = len(array)
            self.blocks = array[None]
        else:
            self.n_rows = math.prod(array.shape[:-1])
            self.blocks = _two_batch_axes(array, self.n_rows)
        #: Whether a kernel can work on the memory itself.
        self.direct = own is format and self.blocks is not None and self._is_plain(self.blocks)

    def _is_plain(self, blocks: NDArray[Any]) -> bool:
        if blocks.dtype is not self.format.memory:
            if blocks.dtype.itemsize != self.format.memory.itemsize or not blocks.dtype.isnative:
                return False
            self.blocks = blocks = blocks.view(self.format.memory)
        if blocks.flags.c_contiguous:
            return blocks.flags.aligned
        size = blocks.itemsize
        return blocks.flags.aligned and not any(step % size for step in blocks.strides)

    def read(self, rows: slice) -> NDArray[Any]:
        """Return a copy of these rows, (1, n_rows, n_classes), in the kernels' format."""
        block: NDArray[Any] = self.array[self._index(rows)]
        if self.own is self.format:
            native = block.dtype if block.dtype.isnative else self.format.memory
            return np.array(block, native, order="C").view(self.format.memory)[None]
        if block.dtype == np.uint16:  # the bits of bfloat16
            return (block.astype(np.uint32) << np.uint32(16)).view(np.float32)[None]
        return np.array(block, self.format.memory, order="C")[None]

    def write(self, rows: slice, block: NDArray[Any]) -> None:
        """Store what a kernel has written in a block of these rows."""
        if self.own is self.format and self.array.dtype.isnative:
            block = block.view(self.array.dtype)  # the bits of bfloat16, elsewhere no change
        self.array[self._index(rows)] = block[0]

    def _index(self, rows: slice) -> Any:
        if self.array.ndim == 2:
            return rows
        return np.unravel_index(np.arange(rows.start, rows.stop), self.array.shape[:-1])


class Problem(NamedTuple):
    """A checked batch of rows and targets."""

    rows: RowView
    targets: NDArray[np.int64]  #: (n_rows,) a class id, or a row that is ignored: `n_kept` knows
    n_classes: int
    batch_shape: tuple[int, ...]
    axis: int  #: of the classes in the caller's logits
    ignore_index: int | None
    given_targets: NDArray[Any]  #: flat, of the caller's dtype

    @property
    def n_rows(self) -> int:
        """The number of rows, the ignored ones included."""
        return self.rows.n_rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of per-row results."""
        return self.rows.format.result

    def n_kept(self, n_outside: int | None = None) -> int:
        """Return how many rows are kept; IndexError if a target is neither a class nor ignored.

        ``n_outside`` is how many targets the kernels found outside [0, n_classes), if they ran.
        """
        if n_outside == 0:
            return self.n_rows
        y, n_classes = self.given_targets, self.n_classes
        # as unsigned numbers the negative ones are the largest: one pass finds that all is well
        if n_outside is None and self.targets.view(np.uint64).max(initial=0) < n_classes:
            return self.n_rows
        inside = (y >= 0) & (y < n_classes)
        ignored = (y == self.ignore_index) if self.ignore_index is not None else np.zeros(y.shape, bool)
        bad = ~(inside | ignored)
        if bad.any():
            first = int(bad.argmax())
            where = ", ".join(map(str, np.unravel_index(first, self.batch_shape)))
            value = int(y[first])
            raise IndexError(
                f"targets[{where}] = {value} is outside [0, {n_classes}); "
                f"pass ignore_index={value} if it is padding"
            )
        return len(y) - int(np.count_nonzero(ignored))

    def slices(self, *others: RowView) -> Iterator[slice]:
        """Cut the rows into slices of whole tiles; the cuts do not change any result."""
        direct = self.rows.direct and all(other.direct for other in others)
        elements = _SLICE_ELEMENTS if direct else _COPY_ELEMENTS
        n_rows = self.rows.n_rows
        if n_rows * self.n_classes <= elements:
            if n_rows:
                yield slice(0, n_rows)
            return
        tile = tile_rows(self.n_classes)
        step = tile * max(1, elements // max(1, tile * self.n_classes))
        for start in range(0, n_rows, step):
            yield slice(start, min(start + step, n_rows))


def check(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int,
    ignore_index: int | None,
    dtype: DTypeLike | None = None,
    out: object = None,
) -> Problem:
    """Check logits, targets and ignore_index, and return them as a `Problem`.

    Only the values of the targets are left to `Problem.n_kept`, which must be called before an array of
    the caller's is written to, and before a result is returned.
    """
    x = np.asarray(logits)
    own = format_of(x, "logits", dtype)
    if x.ndim == 0:
        raise ValueError("logits: expected at least one axis, of classes; got a scalar")
    if axis != -1:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"axis: expected a value in [{-x.ndim}, {x.ndim}) for logits of shape {x.shape}, "
                f"got {axis}"
            )
        x = np.moveaxis(x, axis, -1)
    *batch, n_classes = x.shape
    batch_shape = tuple(batch)
    # A gradient of another dtype than half logits' is computed in float32, and rounded once.
    widen = own.memory.itemsize == 2 and out is not None and _other_dtype(out, x)
    view = RowView(x, own, FLOAT32 if widen else own)
    if n_classes == 0 and view.n_rows > 0:
        raise ValueError(
            f"logits: expected at least one class, got none along axis {axis}, shape {np.shape(logits)}"
        )
    y = _check_targets(targets, batch_shape)
    flat = y
    if y.dtype is not _INT64:
        flat = y.astype(np.int64)  # what does not fit becomes negative, and `n_kept` sees the original
    if ignore_index is not None and 0 <= ignore_index < n_classes:
        flat = np.where(y == ignore_index, np.int64(-1), flat)
    elif not flat.flags.c_contiguous or not flat.flags.aligned:
        flat = np.array(flat)
    return Problem(view, flat, n_classes, batch_shape, axis % x.ndim, ignore_index, y)


def check_reduction(reduction: str) -> None:
    """Check the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def check_losses_out(out: NDArray[Any] | None, problem: Problem, reduction: str) -> None:
    """Check the array that is to receive the losses of the rows."""
    if out is None:
        return
    if reduction != "none":
        raise ValueError(
            f"out: takes the losses of the rows, which needs reduction='none'; got {reduction!r}"
        )
    _check_out(out, problem.batch_shape, problem)


def check_grad_out(out: NDArray[Any], problem: Problem, shape: tuple[int, ...]) -> None:
    """Check the array that is to receive the gradient; it may be the logits themselves."""
    _check_out(out, shape, problem, may_be_logits=True)


def check_scale(
    grad_output: ArrayLike | None, problem: Problem, reduction: str, n_kept: int
) -> NDArray[np.float64]:
    """Return the upstream gradient of each row's loss, the mean's division included."""
    if grad_output is None:
        factor = 1.0 / max(1, n_kept) if reduction == "mean" else 1.0
        return _repeated(factor, problem.n_rows)
    upstream = np.asarray(grad_output)
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
        scale = scale / max(1, n_kept)  # nothing kept: the gradient is 0 all the same
    return scale.reshape(-1) if scale.ndim else _repeated(float(scale), problem.n_rows)


def _repeated(value: float, n: int) -> NDArray[np.float64]:
    """Return what numpy.broadcast_to would, in a tenth of the time."""
    return np.ndarray((n,), np.float64, np.array([value]), strides=(0,))


def _check_out(
    out: NDArray[Any], shape: tuple[int, ...], problem: Problem, may_be_logits: bool = False
) -> None:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    format_of(out, "out", "bfloat16" if out.dtype == np.uint16 == problem.rows.array.dtype else None)
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if not out.flags.c_contiguous and any(
        n > 1 and step == 0 for n, step in zip(out.shape, out.strides, strict=True)
    ):
        raise ValueError("out: expected an element of its own for each result, got a broadcast array")
    logits = problem.rows.array
    if problem.axis != logits.ndim - 1:
        logits = np.moveaxis(logits, -1, problem.axis)
    for name, array in (("logits", logits), ("targets", problem.given_targets)):
        if not np.may_share_memory(out, array):
            continue
        if name == "logits" and may_be_logits and _same_memory(out, array):
            continue
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


def format_of(array: NDArray[Any], name: str, dtype: DTypeLike | None) -> Format:
    """Return the format of an array's elements; ``dtype`` says what the bits of uint16 are."""
    found = _BY_DTYPE.get(array.dtype)
    if found is None:
        found = _FORMATS.get(array.dtype.name)  # bfloat16, and foreign byte orders
    if dtype is not None:
        asked = dtype if isinstance(dtype, str) else np.dtype(dtype).name
        if asked == "bfloat16" and array.dtype == np.uint16:
            found = _FORMATS["bfloat16"]
        elif found is None or found.name != asked:
            raise TypeError(
                f"dtype: expected 'bfloat16', for the bits of bfloat16 in a uint16 array, or None; "
                f"got {dtype!r} for {name} of dtype {array.dtype}"
            )
    if found is None:
        remedy = (
            "pass dtype='bfloat16' if these are its bits"
            if array.dtype == np.uint16 and name == "logits"
            else f"convert with {name}.astype(numpy.float32)"
        )
        raise TypeError(f"{name}: expected dtype {_NAMES}, got {array.dtype}; {remedy}")
    return found


def _other_dtype(out: object, logits: NDArray[Any]) -> bool:
    native = out.dtype.newbyteorder("=") if isinstance(out, np.ndarray) else None
    return native is not None and native != logits.dtype.newbyteorder("=")


def _two_batch_axes(array: NDArray[Any], n_rows: int) -> NDArray[Any] | None:
    """Return the array as (outer, inner, n_classes) without a copy, or None if that is impossible."""
    *batch, n_classes = array.shape
    shapes = [(1, n_rows, n_classes)]
    shapes += [(math.prod(batch[:k]), math.prod(batch[k:]), n_classes) for k in range(1, len(batch))]
    for shape in shapes:
        try:
            return array.reshape(shape, copy=False)
        except ValueError:
            continue
    return None


def _check_targets(targets: ArrayLike, batch_shape: tuple[int, ...]) -> NDArray[Any]:
    y = np.asarray(targets)
    if y.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integer class ids, got dtype {y.dtype}")
    if y.shape != batch_shape:
        raise ValueError(
            f"targets: expected shape {batch_shape} (logits without the class axis), got {y.shape}"
        )
    return y if y.ndim == 1 else y.reshape(-1)
