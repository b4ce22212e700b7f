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

from fastce.kernels import Soft, array_sum, narrowed, tile_rows, widened

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
        return np.array(widened(block), self.format.memory, order="C")[None]

    def write(self, rows: slice, block: NDArray[Any]) -> None:
        """Store what a kernel has written in a block of these rows."""
        if self.own is self.format and self.array.dtype.isnative:
            block = block.view(self.array.dtype)  # the bits of bfloat16, elsewhere no change
        else:
            block = narrowed(block, self.array.dtype)
        self.array[self._index(rows)] = block[0]

    def _index(self, rows: slice) -> Any:
        if self.array.ndim == 1:
            return np.newaxis
        if self.array.ndim == 2:
            return rows
        return unraveled(np.arange(rows.start, rows.stop), self.array.shape[:-1])


class Problem(NamedTuple):
    """A checked batch of rows, with what is asked of them."""

    rows: RowView
    targets: NDArray[np.int64]  #: (n_rows,), any stride: a class id, or an ignored row; see `n_kept`
    n_classes: int
    batch_shape: tuple[int, ...]
    axis: int  #: of the classes in the caller's logits
    ignore_index: int | None = None
    given_targets: NDArray[Any] | None = None  #: ids, flat, of the caller's dtype; or probabilities
    probs: RowView | None = None  #: class probabilities, instead of ids
    smoothing: float = 0.0
    weight: NDArray[np.float64] | None = None  #: (n_classes,)
    sample_weight: NDArray[np.float64] | None = None  #: (n_rows,)
    row_weights: NDArray[np.float64] | None = None  #: (n_rows,) of losses as the kernels compute them

    @property
    def n_rows(self) -> int:
        """The number of rows, the ignored ones included."""
        return self.rows.n_rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of per-row results."""
        return self.rows.format.result

    def n_kept(self, n_bad: int | None = None) -> int:
        """Return how many rows are kept; raise if a target is neither valid nor ignored.

        ``n_bad`` is what the kernels have found, if they ran: targets outside [0, n_classes), or rows
        with invalid probabilities, which only they look for.
        """
        if self.probs is not None:
            kept = self.kept()
            if n_bad:
                assert self.given_targets is not None
                error = invalid_probs(self.given_targets, "targets", self.axis, kept)
                raise error or ValueError("targets: they changed while they were read")
            return int(np.count_nonzero(kept))
        if n_bad == 0 or self.given_targets is None:
            return self.n_rows
        y, n_classes = self.given_targets, self.n_classes
        # as unsigned numbers the negative ones are the largest: one pass finds that all is well
        if n_bad is None and self.targets.view(np.uint64).max(initial=0) < n_classes:
            return self.n_rows
        inside = (y >= 0) & (y < n_classes)
        ignored = (y == self.ignore_index) if self.ignore_index is not None else np.zeros(y.shape, bool)
        bad = ~(inside | ignored)
        if bad.any():
            first = bad.argmax()
            value = int(y[first])
            raise IndexError(
                f"{place('targets', unraveled(first, self.batch_shape))} = {value} is outside "
                f"[0, {n_classes}); "
                f"pass ignore_index={value} if it is padding"
            )
        if self.sample_weight is not None:
            ignored |= self.sample_weight == 0
        return len(y) - int(np.count_nonzero(ignored))

    def total_weight(self, n_kept: int) -> float:
        """Return what the mean divides by: PyTorch's rule.

        For class ids the sum of ``weight[y] * sample_weight`` over the kept rows, for probabilities
        that of ``sample_weight``; either is 1 where it is not given.
        """
        if self.probs is not None or self.weight is None:
            return n_kept if self.sample_weight is None else array_sum(self.sample_weight[self.kept()])
        kept = self.kept()
        weights = self.weight[self.targets[kept]]
        return array_sum(weights if self.sample_weight is None else weights * self.sample_weight[kept])

    def kept(self) -> NDArray[np.bool_]:
        """Return which rows are kept."""
        return self.targets.view(np.uint64) < np.uint64(self.n_classes)

    def soft(self) -> Soft | None:
        """Return the kernels' description of soft targets, but for the probabilities, or None."""
        if self.probs is None and not self.smoothing:
            return None
        weight = None if self.weight is None else self.weight.astype(self.dtype)
        return Soft(None, weight, self.smoothing)


def sliced(
    n_classes: int, views: list[RowView], out: RowView | None = None
) -> Iterator[tuple[slice, int, list[NDArray[Any]], NDArray[Any] | None]]:
    """Cut rows into slices of whole tiles; the cuts do not change any result.

    Yields the rows, the first one's place in the blocks, the views' blocks, and a block for ``out``,
    which is written back, if it is a copy, when the next slice is asked for.
    """
    n_rows = views[0].n_rows
    every = views if out is None else [*views, out]
    direct = _share_batch_axes(every)
    elements = _SLICE_ELEMENTS if direct else _COPY_ELEMENTS
    tile = tile_rows(n_classes)
    step = max(n_rows, 1)
    if n_rows * n_classes > elements:
        step = tile * max(1, elements // max(1, tile * n_classes))
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        if direct:
            blocks = [view.blocks for view in views]
            yield rows, start, blocks, None if out is None else out.blocks  # type: ignore[misc]
            continue
        copies = [view.read(rows) for view in views]
        block = None if out is None else np.empty(copies[0].shape, out.format.memory)
        yield rows, 0, copies, block
        if out is not None and block is not None:
            out.write(rows, block)


def _share_batch_axes(views: list[RowView]) -> bool:
    """Give the views' blocks one shape, and return whether kernels can work on them directly."""
    if not all(view.direct for view in views):
        return False
    given = [view.blocks for view in views if view.blocks is not None]
    shapes = {block.shape for block in given}
    if len(shapes) == 1:
        return True
    for shape in shapes:
        try:
            blocks = [block.reshape(shape, copy=False) for block in given]
        except ValueError:
            continue
        for view, block in zip(views, blocks, strict=True):
            view.blocks = block
        return True
    return False


class Operand(NamedTuple):
    """An array that is worked on element by element."""

    array: NDArray[Any]
    own: Format  #: what the elements are
    format: Format  #: what the kernels get

    @classmethod
    def of(cls, array: NDArray[Any]) -> Operand:
        """Return an array of float32 or float64 as it is."""
        own = _BY_DTYPE[array.dtype]
        return cls(array, own, own)


def elementwise(
    inputs: list[Operand], outputs: list[Operand]
) -> Iterator[tuple[list[NDArray[Any]], list[NDArray[Any]]]]:
    """Cut arrays of one shape, in C order, into aligned contiguous pieces of one axis.

    Pieces of memory where it allows that, else copies of some elements at a time; those of outputs are
    written back when the next piece is asked for. An output may be one of the inputs.
    """
    operands = [*inputs, *outputs]
    arrays = [o.array.view(o.own.memory) if o.own.name == "bfloat16" else o.array for o in operands]
    flags: list[Any] = ["contig", "aligned", "nbo", "overlap_assume_elementwise"]
    reads, writes = [["readonly", *flags]] * len(inputs), [["writeonly", *flags]] * len(outputs)
    same = all(o.own is o.format for o in operands)
    with np.nditer(
        arrays,
        ["external_loop", "buffered", "growinner", "zerosize_ok", "copy_if_overlap"],
        [*reads, *writes],
        [array.dtype.newbyteorder("=") for array in arrays],
        order="C",
        buffersize=_COPY_ELEMENTS,
    ) as pieces:
        most = _SLICE_ELEMENTS if same else _COPY_ELEMENTS
        for whole in pieces:
            for start in range(0, len(whole[0]), most):
                piece = [part[start : start + most] for part in whole]
                work = [
                    part if o.own is o.format else widened(part).astype(o.format.memory)
                    for part, o in zip(piece, inputs, strict=False)
                ]
                work += [
                    part if o.own is o.format else np.empty(part.shape, o.format.memory)
                    for part, o in zip(piece[len(inputs) :], outputs, strict=True)
                ]
                yield work[: len(inputs)], work[len(inputs) :]
                for part, done in list(zip(piece, work, strict=True))[len(inputs) :]:
                    if done is not part:
                        part[...] = narrowed(done, part.dtype)


def check_rows(
    array: ArrayLike,
    *,
    axis: int,
    dtype: DTypeLike | None = None,
    out: object = None,
    name: str = "logits",
) -> Problem:
    """Check an array of rows, and return it as a `Problem` without targets."""
    x = np.asarray(array)
    own = format_of(x, name, dtype)
    x = _classes_last(x, axis, name)
    # A gradient of another dtype than half logits' is computed in float32, and rounded once.
    widen = own.memory.itemsize == 2 and out is not None and _other_dtype(out, x)
    view = RowView(x, own, FLOAT32 if widen else own)
    *batch, n_classes = x.shape
    if n_classes == 0 and view.n_rows > 0:
        raise ValueError(
            f"{name}: expected at least one class, got none along axis {axis}, shape {np.shape(array)}"
        )
    targets = repeated(0, view.n_rows, np.int64)
    return Problem(view, targets, n_classes, tuple(batch), axis % x.ndim)


def check_pair(
    p: ArrayLike, q: ArrayLike, *, axis: int, dtype: DTypeLike | None, names: tuple[str, str]
) -> tuple[Problem, RowView]:
    """Check two arrays of rows of one shape, and return them in one format."""
    problem = check_rows(p, axis=axis, dtype=dtype, name=names[0])
    other = np.asarray(q)
    own = format_beside(other, names[1], dtype)
    if other.shape != np.shape(p):
        raise ValueError(
            f"{names[1]}: expected the shape of {names[0]}, {np.shape(p)}; got {other.shape}"
        )
    rows = problem.rows
    common = rows.own
    if own is not rows.own:
        wide = "float64" in (own.name, rows.own.name)
        common = _FORMATS["float64"] if wide else FLOAT32
    view = RowView(_classes_last(other, axis, names[1]), own, common)
    return problem._replace(rows=RowView(rows.array, rows.own, common)), view


def check(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int,
    ignore_index: int | None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    base: float | None = None,
    dtype: DTypeLike | None = None,
    out: object = None,
    name: str = "logits",
) -> Problem:
    """Check logits, targets and what weighs them, and return them as a `Problem`.

    Only the values of the targets are left to `Problem.n_kept`, which must be called before an array of
    the caller's is written to, and before a result is returned.
    """
    problem = check_rows(logits, axis=axis, dtype=dtype, out=out, name=name)
    x, n_classes = problem.rows, problem.n_classes
    y = np.asarray(targets)
    if y.dtype.kind in "iu" and not (
        dtype is not None and y.dtype == np.uint16 and y.ndim == x.array.ndim
    ):
        y = _check_ids(y, problem.batch_shape, name)
        flat = y if y.dtype is _INT64 else y.astype(np.int64)  # what does not fit becomes negative, and
        # `n_kept` sees the original
        if ignore_index is not None and 0 <= ignore_index < n_classes:
            flat = np.where(y == ignore_index, np.int64(-1), flat)
        elif not flat.flags.c_contiguous or not flat.flags.aligned:
            flat = np.array(flat)
        problem = problem._replace(targets=flat, ignore_index=ignore_index, given_targets=y)
    else:
        problem = _with_probs(problem, y, axis, dtype, np.shape(logits))
    if weight is sample_weight is base is None and label_smoothing == 0.0:
        return problem
    return _with_options(problem, weight, sample_weight, label_smoothing, base)


def _with_probs(
    problem: Problem, y: NDArray[Any], axis: int, dtype: DTypeLike | None, shape: tuple[int, ...]
) -> Problem:
    found = _BY_DTYPE.get(y.dtype) or _FORMATS.get(y.dtype.name)
    if y.dtype == np.uint16:
        found = format_of(y, "targets", dtype)
    if found is None or y.shape == problem.batch_shape != shape:
        raise TypeError(
            f"targets: expected integer class ids, got dtype {y.dtype}"
            + (f"; class probabilities would have the shape of the logits, {shape}" if found else "")
        )
    if y.shape != shape:
        raise ValueError(
            f"targets: expected class probabilities of the logits' shape {shape}, got {y.shape}"
        )
    rows = problem.rows
    if rows.own.memory.itemsize == 2 and found is not rows.own:
        rows = RowView(rows.array, rows.own, FLOAT32)
    probs = RowView(_classes_last(y, axis, "targets"), found, rows.format)
    return problem._replace(rows=rows, probs=probs, given_targets=y)


def _with_options(
    problem: Problem,
    weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    label_smoothing: float,
    base: float | None,
) -> Problem:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing!r}")
    problem = problem._replace(smoothing=float(label_smoothing))
    if weight is not None:
        w = finite_numbers(real_numbers(weight, "weight", [(problem.n_classes,)]), "weight")
        if (w < 0).any():
            raise ValueError(f"weight: expected no negative class weight, got {w[w < 0][0]}")
        problem = problem._replace(weight=w)
    if sample_weight is not None:
        w = real_numbers(sample_weight, "sample_weight", [problem.batch_shape]).reshape(-1)
        w = finite_numbers(w, "sample_weight")
        targets = np.where(w == 0, np.int64(-1), problem.targets)
        problem = problem._replace(sample_weight=w, targets=targets)
    return problem._replace(row_weights=_row_weights(problem, check_base(base)))


def _row_weights(problem: Problem, unit: float) -> NDArray[np.float64] | None:
    """Return what multiplies the loss of each row, in nats; ``unit`` is the base's."""
    weights = problem.sample_weight
    if problem.weight is not None and problem.probs is None and not problem.smoothing:
        of_class = problem.weight.take(problem.targets, mode="clip")
        weights = of_class if weights is None else weights * of_class
    if unit == 1.0:
        return weights
    return repeated(unit, problem.n_rows) if weights is None else weights * unit


def real_numbers(
    values: ArrayLike, name: str, shapes: list[tuple[int, ...]] | tuple[int, ...]
) -> NDArray[np.float64]:
    """Check real numbers of one of some shapes, or of one that broadcasts to a shape."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if isinstance(shapes, list):
        if array.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected shape {expected}, got {array.shape}")
    elif array.ndim > len(shapes) or any(
        n not in (1, full) for n, full in zip(reversed(array.shape), reversed(shapes), strict=False)
    ):
        raise ValueError(f"{name}: expected a shape that broadcasts to {shapes}, got {array.shape}")
    return array.astype(np.float64)


def finite_numbers(array: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Check that numbers are finite."""
    finite = np.isfinite(array)
    if not finite.all():
        raise ValueError(f"{name}: expected finite numbers, got {array[~finite][0]}")
    return array


def check_base(base: float | None) -> float:
    """Return the unit of a logarithm's base in nats."""
    if base is None:
        return 1.0
    if not 0 < base < math.inf or base == 1:
        raise ValueError(f"base: expected a positive number other than 1, or None for e; got {base!r}")
    return 1.0 / math.log(base)


def check_normalizer(normalizer: float | None, reduction: str) -> None:
    """Check the number that the mean divides by."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer: needs reduction='mean', which it divides; got {reduction!r}")
    if not 0 <= normalizer < math.inf:
        raise ValueError(
            f"normalizer: expected a finite number that is not negative, got {normalizer!r}"
        )


def invalid_probs(
    array: ArrayLike, name: str, axis: int | None = None, kept: NDArray[np.bool_] | None = None
) -> ValueError | None:
    """Return an error that names the first negative or NaN probability, in a row that is kept."""
    p = widened(np.asarray(array))
    bad = ~(p >= 0)
    if kept is not None and axis is not None:
        bad &= np.expand_dims(kept.reshape(np.delete(p.shape, axis)), axis)
    if not bad.any():
        return None
    at = unraveled(bad.argmax(), p.shape)
    return ValueError(f"{place(name, at)} = {p[at]}: expected a probability, neither negative nor NaN")


def unraveled(flat: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return what numpy.unravel_index would, which refuses arrays of indices for the shape ()."""
    return np.unravel_index(flat, shape) if shape else ()


def place(name: str, at: tuple[Any, ...]) -> str:
    """Return how an array's element is written."""
    return f"{name}[{', '.join(map(str, at))}]" if at else name


def check_reduction(reduction: str) -> None:
    """Check the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def check_losses_out(out: NDArray[Any], problem: Problem, reduction: str) -> None:
    """Check the array that is to receive the losses of the rows."""
    if reduction != "none":
        raise ValueError(
            f"out: takes the losses of the rows, which needs reduction='none'; got {reduction!r}"
        )
    check_result_out(out, problem)


def check_result_out(out: NDArray[Any], problem: Problem) -> None:
    """Check the array that is to receive one number for each row."""
    check_loss_dtype(out)
    check_out(out, problem.batch_shape, _inputs(problem))


def check_loss_dtype(out: object) -> None:
    """Check that an array has a dtype of losses, which is not that of half logits."""
    if isinstance(out, np.ndarray) and out.dtype not in (_F32, _F64):
        raise TypeError(f"out: expected dtype float32 or float64, got {out.dtype}")


def check_grad_out(out: NDArray[Any], problem: Problem, shape: tuple[int, ...]) -> None:
    """Check the array that is to receive the gradient; it may be the logits themselves."""
    check_out(out, shape, _inputs(problem), "logits")


def grad_view(grad: NDArray[Any], problem: Problem) -> RowView:
    """Return an array of the logits' shape as rows that the kernels write."""
    bits = "bfloat16" if grad.dtype == np.uint16 else None
    if problem.axis != grad.ndim - 1:
        grad = np.moveaxis(grad, problem.axis, -1)
    return RowView(grad, format_of(grad, "out", bits), problem.rows.format)


def check_scale(
    grad_output: ArrayLike | None, problem: Problem, reduction: str, divisor: float
) -> NDArray[np.float64]:
    """Return what multiplies each row's gradient: grad_output, weights, unit, the mean's division."""
    scale: NDArray[np.float64] | float = 1.0
    if grad_output is not None:
        shapes: list[tuple[int, ...]] = [()]
        if reduction == "none":
            shapes.append(problem.batch_shape)
        scale = real_numbers(grad_output, "grad_output", shapes).reshape(-1)
        scale = scale if scale.size != 1 else float(scale[0])
    if problem.row_weights is not None:
        scale = scale * problem.row_weights
    if reduction == "mean":  # over nothing: the gradient is 0, not NaN
        scale = scale / divisor if divisor else scale * 0.0
    return scale if isinstance(scale, np.ndarray) else repeated(scale, problem.n_rows)


def repeated(value: float, n: int, dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Return what numpy.broadcast_to would, in a tenth of the time."""
    return np.ndarray((n,), dtype, np.array([value], dtype), strides=(0,))


def _inputs(problem: Problem) -> list[tuple[str, NDArray[Any]]]:
    logits = problem.rows.array
    if problem.axis != logits.ndim - 1:
        logits = np.moveaxis(logits, -1, problem.axis)
    targets = problem.given_targets
    return [("logits", logits)] + ([("targets", targets)] if targets is not None else [])


def check_out(
    out: NDArray[Any],
    shape: tuple[int, ...],
    inputs: list[tuple[str, NDArray[Any]]],
    in_place: str | None = None,
) -> None:
    """Check an array for results, which may not overlap the inputs, but may be the one ``in_place``."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    format_of(out, "out", "bfloat16" if out.dtype == np.uint16 == inputs[0][1].dtype else None)
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if not out.flags.c_contiguous and any(
        n > 1 and step == 0 for n, step in zip(out.shape, out.strides, strict=True)
    ):
        raise ValueError("out: expected an element of its own for each result, got a broadcast array")
    for name, array in inputs:
        if not np.may_share_memory(out, array):
            continue
        if name == in_place and _same_memory(out, array):
            continue
        if _overlap(out, array):
            hint = f"; pass out={name} to work in place" if name == in_place else ""
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


def format_beside(array: NDArray[Any], name: str, dtype: DTypeLike | None) -> Format:
    """Return the format of an array beside the logits, which may be of another dtype than ``dtype``."""
    return format_of(array, name, dtype if array.dtype == np.uint16 else None)


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


def _classes_last(array: NDArray[Any], axis: int, name: str) -> NDArray[Any]:
    if array.ndim == 0:
        raise ValueError(f"{name}: expected at least one axis, of classes; got a scalar")
    if axis == -1:
        return array
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(
            f"axis: expected a value in [{-array.ndim}, {array.ndim}) for {name} of shape "
            f"{array.shape}, got {axis}"
        )
    return np.moveaxis(array, axis, -1)


def _check_ids(y: NDArray[Any], batch_shape: tuple[int, ...], name: str) -> NDArray[Any]:
    if y.shape != batch_shape:
        raise ValueError(
            f"targets: expected shape {batch_shape} ({name} without the class axis), got {y.shape}"
        )
    return y if y.ndim == 1 else y.reshape(-1)
