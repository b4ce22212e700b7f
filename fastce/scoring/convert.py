"""From one format of files to another, a block of rows at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import narrowed, widened
from fastce.scoring.atomic import atomic_file
from fastce.scoring.formats import InputError, Source, find, open_source, own_targets
from fastce.scoring.formats.arrow import batch_writer
from fastce.scoring.formats.base import Kind
from fastce.scoring.formats.kld import KldWriter
from fastce.scoring.formats.npy import NpyWriter
from fastce.scoring.formats.safetensors import SafetensorsWriter

_MIB = 2**20
_DTYPES = ("float16", "bfloat16", "float32", "float64")

#: Rows of each array, by its name in the new file.
_Block = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Array:
    """An array to be written: whence, and of which dtype it becomes."""

    source: Source
    n_axes: int  #: that count rows
    dtype_name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[: self.n_axes])

    @property
    def block_shape(self) -> tuple[int, ...]:
        return self.shape[self.n_axes :]


_Arrays = dict[str, _Array]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    targets: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    block_mib: int = 64,
    progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write an array of logits, or of targets, to a file of another format.

    Parameters
    ----------
    source : path
        A file of any format that `score_files` reads; FILE::NAME is one array of a file.
    target : path
        A name that ends in `.npy`, `.safetensors`, `.kld`, `.arrow` or `.parquet`. The file appears
        complete or not at all.
    targets : path, optional
        Class ids to write with the logits, one for each row. Default: those that ``source`` holds under
        a usual name, as `.kld` does, unless ``source`` names one array. They become the array "targets"
        beside "logits" ("logprobs", "probs"), or, of a `.npy`, the file ``<stem>.targets.npy``.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        Of the logits written. Default: that of the source.
    block_mib : int, default 64
        Size of the block read at a time, in MiB.
    progress : callable, optional
        Called with the rows done and the rows in all after each block.
    on_note : callable, optional
        Called with what is to be known of a source, such as that it is truncated.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError
        If a file cannot be read, or the new one cannot hold what it says.
    ValueError
        If an option is wrong.
    """
    path = Path(target)
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise ValueError(f"target: expected a name that ends in {', '.join(_WRITERS)}, got {path}")
    if dtype is not None and (dtype not in _DTYPES or path.suffix.lower() == ".kld"):
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, and none for .kld; got {dtype}")
    if block_mib < 1:
        raise ValueError(f"block_mib: expected at least 1, got {block_mib}")
    arrays = _arrays(os.fspath(source), targets, dtype)
    for note in dict.fromkeys(a.source.note for a in arrays.values()):
        if note is not None and on_note is not None:
            on_note(f"{next(iter(arrays.values())).source.path}: {note}")
    return write(path, arrays, _blocks(arrays, block_mib * _MIB, progress))


def _arrays(source: str, targets: str | os.PathLike[str] | None, dtype: str | None) -> _Arrays:
    try:
        x = _one(source, find(source, "logits"))
    except InputError:
        try:
            y = _one(source, find(source, "targets"))
        except InputError:
            y = None
        if y is None or targets is not None or dtype is not None:
            raise
        return {"targets": _Array(y, len(y.shape), y.dtype_name)}
    if len(x.shape) < 2 or x.shape[-1] == 0:
        raise InputError(f"{x.label}: expected logits of shape (n_rows, n_classes), got {x.shape}")
    arrays: _Arrays = {x.kind or "logits": _Array(x, len(x.shape) - 1, dtype or x.dtype_name)}
    if targets is not None:
        y = _one(os.fspath(targets), find(targets, "targets"))
    else:
        y = None if "::" in source else own_targets(x)
    if y is not None:
        if math.prod(y.shape) != math.prod(x.shape[:-1]):
            raise InputError(
                f"{y.path}: expected one target for each row of {x.label}, {x.shape[:-1]}; "
                f"got {y.shape}"
            )
        arrays["targets"] = _Array(y, len(y.shape), y.dtype_name)
    return arrays


def _one(path: str, found: list[Source]) -> Source:
    if len(found) != 1:
        raise InputError(f"{path}: expected one array, got {len(found)}; convert one at a time")
    return found[0]


def _blocks(
    arrays: _Arrays, block_bytes: int, progress: Callable[[int, int], None] | None
) -> Iterator[_Block]:
    """Yield blocks of rows of all arrays, as they are to be written."""
    n_rows = next(iter(arrays.values())).n_rows
    row_bytes = sum(math.prod(a.block_shape) * a.source.dtype.itemsize for a in arrays.values())
    step = max(1, block_bytes // row_bytes)
    with ExitStack() as stack:
        readers = {
            name: stack.enter_context(open_source(array.source)) for name, array in arrays.items()
        }
        for row in range(0, n_rows, step):
            n = min(step, n_rows - row)
            block = {}
            for name, array in arrays.items():
                rows = np.empty((n, *array.block_shape), array.source.dtype)
                readers[name].read_into(row, rows)
                block[name] = _converted(rows, array, row)
            yield block
            if progress is not None:
                progress(row + n, n_rows)


def _converted(rows: NDArray[Any], array: _Array, row: int) -> NDArray[Any]:
    """Return rows in the dtype they become, of the machine's byte order; uint16 holds bfloat16."""
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    if array.dtype_name == array.source.dtype_name:
        return rows
    if array.source.bfloat16:
        rows = widened(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.where(np.isnan(rows), np.float32(np.nan), rows)  # of whose bits none gets lost
        found = narrowed(rows, _memory(array.dtype_name))
    lost = np.isfinite(rows) & ~np.isfinite(widened(found) if array.dtype_name == "bfloat16" else found)
    if lost.any():
        i, j = np.argwhere(lost)[0]
        raise InputError(
            f"{array.source.label}: expected numbers that {array.dtype_name} holds, got {rows[i, j]} "
            f"in row {row + i}; choose another dtype"
        )
    return found


def _memory(dtype_name: str) -> np.dtype[Any]:
    return np.dtype("uint16" if dtype_name == "bfloat16" else dtype_name)


def _write_npy(path: Path, arrays: _Arrays, blocks: Iterator[_Block]) -> list[Path]:
    names = [path, path.with_name(f"{path.stem}.targets.npy")]
    paths = dict(zip(arrays, names, strict=False))
    with ExitStack() as stack:
        writers = {}
        for name, array in arrays.items():
            file = stack.enter_context(atomic_file(paths[name]))
            dtype = np.dtype("V2" if array.dtype_name == "bfloat16" else array.dtype_name)
            writers[name] = NpyWriter(file, array.shape, dtype)
        for block in blocks:
            for name, rows in block.items():
                bits = arrays[name].dtype_name == "bfloat16"
                writers[name].write(rows.view("V2") if bits else rows)
    return list(paths.values())


def _write_safetensors(path: Path, arrays: _Arrays, blocks: Iterator[_Block]) -> list[Path]:
    tensors = {name: (array.dtype_name, array.shape) for name, array in arrays.items()}
    with atomic_file(path) as file:
        writer = SafetensorsWriter(file, tensors)
        for block in blocks:
            for name, rows in block.items():
                writer.write(name, rows)
    return [path]


def _write_kld(path: Path, arrays: _Arrays, blocks: Iterator[_Block]) -> list[Path]:
    x = next(iter(arrays.values()))
    kind: Kind | None = next((k for k in get_args(Kind) if k in arrays), None)
    if kind is None or "targets" not in arrays:
        raise InputError(
            f"{x.source.path}: expected logits and their targets for a .kld file, "
            f"got {', '.join(arrays)}; name the others' file as well"
        )
    try:
        with atomic_file(path) as file:
            writer = KldWriter(file, (x.n_rows, x.shape[-1]), kind)
            for block in blocks:
                writer.write(block[kind], block["targets"])
    except InputError:
        raise
    except ValueError as error:  # which names the argument at fault
        at_fault = arrays["targets"] if str(error).startswith("targets") else x
        raise InputError(f"{at_fault.source.path}: cannot be written as .kld: {error}") from error
    return [path]


def _write_arrow(path: Path, arrays: _Arrays, blocks: Iterator[_Block]) -> list[Path]:
    for array in arrays.values():
        if array.dtype_name == "bfloat16":
            raise InputError(
                f"{array.source.path}: expected a dtype that Arrow has, got bfloat16; "
                "choose float32, which holds the same numbers"
            )
    columns = {name: (a.dtype_name, a.block_shape) for name, a in arrays.items()}
    with atomic_file(path) as file, batch_writer(path, file, columns) as write:
        for block in blocks:
            write(block)
    return [path]


_WRITERS: dict[str, Callable[[Path, _Arrays, Iterator[_Block]], list[Path]]] = {
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
    ".kld": _write_kld,
    ".arrow": _write_arrow,
    ".parquet": _write_arrow,
}
