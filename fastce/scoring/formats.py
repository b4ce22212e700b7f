"""The files: how `.npy` files are found, checked, read in blocks, and written.

A header is hostile input. It is parsed from a few kilobytes already read, never unpickled, and
what it declares must agree with the size of the file before anything of that size is allocated. Data
are read into memory of our own, not mapped: a file cut short under a map kills the process.
"""

from __future__ import annotations

import glob
import io
import math
import os
import re
import stat
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

# The longest header parsed: NumPy's own limit. One of a plain array takes about 120 bytes.
_MAX_HEADER_BYTES = 10_000
_MAGIC_AND_LENGTH_BYTES = 12


class InputError(ValueError):
    """An input file cannot be scored; the message names the file, what is wrong, and the remedy."""


@dataclass(frozen=True, slots=True)
class NpyFile:
    """A checked `.npy` file: what its header says, and which state of the file said it."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int  # of the first element
    n_bytes: int  # of the file
    mtime_ns: int


def expand(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that paths and patterns name; those of a pattern in natural order.

    In natural order logits-2 comes before logits-10, as the rows of numbered shards do.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found: list[Path] = []
    for item in [os.fspath(path) for path in given]:
        if not glob.has_magic(item) or Path(item).exists():
            found.append(Path(item))
            continue
        matches = sorted(glob.glob(item, recursive=True), key=_natural)
        if not matches:
            raise InputError(f"{item}: expected a pattern that matches files, got no match")
        found.extend(map(Path, matches))
    return found


def _natural(name: str) -> list[int | str]:
    # split yields text and digits in turn, so names compare text with text and number with number
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def inspect(path: Path, dtypes: Sequence[str]) -> NpyFile:
    """Read a file's header and check it against the dtypes allowed and the file's size.

    Parameters
    ----------
    path : Path
        A regular file.
    dtypes : sequence of str
        Names of the dtypes allowed, of either byte order.

    Returns
    -------
    NpyFile
        Its shape, dtype and where its data start.

    Raises
    ------
    InputError
        If it cannot be read, is not a `.npy` file of an allowed dtype in C order, or is shorter or
        longer than its header says.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe could wait for ever
            raise InputError(f"{path}: expected a regular file; save the array with numpy.save")
        with path.open("rb") as file:
            head = file.read(_MAGIC_AND_LENGTH_BYTES + _MAX_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    shape, fortran_order, dtype, offset = _parse(path, head)
    if dtype.name not in dtypes:
        raise InputError(
            f"{path}: expected dtype {', '.join(dtypes)}; got {dtype.str}; {_dtype_remedy(dtype)}"
        )
    if fortran_order:
        raise InputError(
            f"{path}: expected C order, got Fortran order; save numpy.ascontiguousarray(array)"
        )
    if any(n < 0 for n in shape):
        raise InputError(f"{path}: expected a shape without negative lengths, got {shape}")
    expected = offset + math.prod(shape) * dtype.itemsize
    if expected != status.st_size:
        wrong = "truncated" if status.st_size < expected else "trailing bytes"
        raise InputError(
            f"{path}: expected {expected} bytes for {dtype.name} of shape {shape}, "
            f"got {status.st_size} ({wrong}); write the file again"
        )
    return NpyFile(path, shape, dtype, offset, status.st_size, status.st_mtime_ns)


def _parse(path: Path, head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    stream = io.BytesIO(head)
    try:
        version = npy_format.read_magic(stream)
    except ValueError as error:
        raise InputError(
            f"{path}: expected a .npy file, got one that starts with {head[:6]!r}; "
            "save the array with numpy.save"
        ) from error
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise InputError(f"{path}: expected .npy format 1.0, 2.0 or 3.0, got {version}")
    length_bytes = 2 if version == (1, 0) else 4
    length = int.from_bytes(head[8 : 8 + length_bytes], "little")
    if length > _MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length}; "
            "save the array with numpy.save"
        )
    # Version 3 differs from 2 in the text encoding alone, which matters for names of fields.
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy warns of headers that only Python 2 wrote
            shape, fortran_order, dtype = read(stream, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # a crafted header can make the parser raise nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path}: expected a valid .npy header, got one that fails: {reason}"
        ) from error
    return shape, fortran_order, dtype, stream.tell()


def _dtype_remedy(dtype: np.dtype[Any]) -> str:
    if dtype.hasobject:
        return "pickled objects are never loaded"
    if dtype.str == "|V2":
        return "if this is bfloat16, save array.view(ml_dtypes.bfloat16).astype(numpy.float32)"
    return "convert with array.astype and save again"


class NpyReader:
    """Reads a checked file from one element on, in order, into arrays of the caller's."""

    def __init__(self, npy: NpyFile, start: int = 0) -> None:
        self._npy = npy
        self._file = npy.path.open("rb", buffering=0)
        self._file.seek(npy.offset + start * npy.dtype.itemsize)
        self._check_unchanged()

    def read_into(self, array: NDArray[Any]) -> None:
        """Fill a C-contiguous array of the file's dtype with the next elements."""
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            n_read = self._file.readinto(rest)  # may stop early; Linux does so at 2 GiB
            if not n_read:
                raise InputError(f"{self._npy.path}: was truncated while it was read; run again")
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
            self._file.close()

    def _check_unchanged(self) -> None:
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self._npy.n_bytes, self._npy.mtime_ns):
            raise InputError(f"{self._npy.path}: was changed while it was read; run again")


class NpyWriter:
    """Writes a `.npy` file of known shape, block by block."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file = file
        self._dtype = dtype
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        npy_format.write_array_header_1_0(file, header)

    def write(self, block: NDArray[Any]) -> None:
        """Append the next elements."""
        self._file.write(np.ascontiguousarray(block, dtype=self._dtype).data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name complete and on disk, or not at all."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and needs no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
