"""What a file format gives: arrays described by their headers, and readers of their rows."""

from __future__ import annotations

import importlib
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import widened

#: What the numbers of an array of logits are.
Kind = Literal["logits", "logprobs", "probs"]


#: How many times as long as in the file an array may be, beyond so many bytes: what is deflated grows
#: no more, and other compressors do so only of arrays that say nothing.
_MAX_RATIO = 1032
_EXPANSION_BYTES = 2**28


class InputError(ValueError):
    """An input file cannot be used; the message names the file, what is wrong, and the remedy."""


@dataclass(frozen=True, slots=True)
class Source:
    """An array in a file, as the file's header describes it: checked, and no element read yet.

    Rows are what the array's leading axes count, in C order: of an array of logits all axes but the
    last, of targets all axes.
    """

    path: Path
    name: str | None  #: of the array, in a file of several
    format: str  #: the module of `fastce.scoring.formats` that reads it
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  #: of the elements as they are read; uint16 where they are bfloat16
    n_bytes: int  #: of the file
    mtime_ns: int  #: of the file; a reader refuses a file that is no longer of this size and time
    bfloat16: bool = False
    kind: Kind | None = None  #: where the format says it
    note: str | None = None  #: what users should hear about the file
    offset: int = 0  #: of the first element, in a format that stores them as they are in memory

    @property
    def label(self) -> str:
        """The file, and which of its arrays, as users write it."""
        return str(self.path) if self.name is None else f"{self.path}::{self.name}"

    @property
    def dtype_name(self) -> str:
        """The dtype of the elements: float32, bfloat16 and so on."""
        return "bfloat16" if self.bfloat16 else self.dtype.name

    def as_bfloat16(self) -> Source:
        """Return the same array of 16-bit elements, taken as bfloat16."""
        return replace(self, dtype=np.dtype(self.dtype.str[0].replace("|", "=") + "u2"), bfloat16=True)

    def numbers(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return elements that were read as NumPy can calculate with them."""
        return widened(rows.astype(np.uint16, copy=False)) if self.bfloat16 else rows


class Reader(Protocol):
    """Reads rows of one array; a context manager that refuses a file which changes meanwhile."""

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill a C-contiguous array of the source's dtype with rows from ``first_row`` on.

        ``rows`` is (n, n_classes) for logits and (n,) for targets.
        """
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def regular_file(path: Path) -> os.stat_result:
    """Return the status of a file that can be opened without waiting for ever, as a pipe could."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: expected a regular file; save the array with numpy.save")
    return status


def read_head(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file, fewer if it is shorter."""
    try:
        with path.open("rb") as file:
            return file.read(n_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def check_expansion(label: str, what: str, n_bytes: int, stored: int) -> None:
    """Refuse what a library would make of a file, if it is far more than compression explains."""
    if n_bytes > _MAX_RATIO * stored + _EXPANSION_BYTES:
        raise InputError(
            f"{label}: expected {what} of at most {_MAX_RATIO} times the {stored} bytes of the file, "
            f"got {n_bytes} bytes; save the array without compression"
        )


def library(module: str, path: Path, install: str) -> Any:
    """Import the library that reads a format."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{path}: needs {module.partition('.')[0]}, which cannot be imported ({error}); "
            f"python -m pip install {install}"
        ) from error


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library says of a malformed file into our error."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: expected a valid {what}, got one that fails: {said:.200}") from error


def selections(
    axes: tuple[int, ...], first_row: int, rows: NDArray[Any]
) -> Iterator[tuple[tuple[int | slice, ...], NDArray[Any]]]:
    """Yield indices of an array that select rows, counted over its leading axes, and where they go.

    What an index selects is of the shape of the part of ``rows`` that comes with it.
    """
    for index, first, n in _leading(axes, first_row, len(rows)):
        part = rows[first - first_row : first - first_row + n]
        yield index, part.reshape(-1, *axes[len(index) :], *rows.shape[1:])


def _leading(
    axes: tuple[int, ...], first: int, n: int
) -> Iterator[tuple[tuple[int | slice, ...], int, int]]:
    if len(axes) == 1:
        yield (slice(first, first + n),), first, n
        return
    inner = math.prod(axes[1:])
    while n:
        i, j = divmod(first, inner)
        if j == 0 and n >= inner:
            taken = n // inner * inner
            yield (slice(i, i + n // inner),), first, taken
        else:
            taken = min(inner - j, n)
            for rest, at, m in _leading(axes[1:], j, taken):
                yield (i, *rest), first - j + at, m
        first, n = first + taken, n - taken


class FileReader:
    """A file open for reading that must stay as its source says."""

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            self.file = source.path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{source.path}: cannot be read: {error.strerror}") from error
        try:
            self._check_unchanged()
        except InputError:
            self.file.close()
            raise

    def read_at(self, offset: int, array: NDArray[Any]) -> None:
        """Fill a C-contiguous array with the file's bytes from an offset on."""
        self.file.seek(offset)
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            try:
                n_read = self.file.readinto(rest)  # may stop early; Linux does so at 2 GiB
            except OSError as error:
                raise InputError(f"{self.source.path}: cannot be read: {error.strerror}") from error
            if not n_read:
                raise InputError(f"{self.source.path}: was truncated while it was read; run again")
            rest = rest[n_read:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._check_unchanged()
        finally:
            self.file.close()

    def _check_unchanged(self) -> None:
        status = os.fstat(self.file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.source.n_bytes, self.source.mtime_ns):
            raise InputError(f"{self.source.path}: was changed while it was read; run again")


class RawReader(FileReader):
    """Reads elements that stand in the file as they do in memory, one after another."""

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first_row`` on."""
        row_bytes = math.prod(rows.shape[1:]) * rows.itemsize
        self.read_at(self.source.offset + first_row * row_bytes, rows)
