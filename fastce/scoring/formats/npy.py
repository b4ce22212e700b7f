"""`.npy` files, version 1.0 to 3.0.

A header is hostile input. It is parsed from a few kilobytes already read, never unpickled, and
what it declares must agree with the size of the file before anything of that size is allocated.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from fastce.scoring.formats.base import InputError, RawReader, Source, read_head

open_reader = RawReader

# The longest header parsed: NumPy's own limit. One of a plain array takes about 120 bytes.
_MAX_HEADER_BYTES = 10_000
#: So many bytes hold any header that is parsed.
HEAD_BYTES = 12 + _MAX_HEADER_BYTES


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read a file's header and check it against the file's size."""
    head = read_head(path, HEAD_BYTES)
    shape, dtype, offset = describe(str(path), head, status.st_size)
    found = Source(path, None, "npy", shape, dtype, status.st_size, status.st_mtime_ns, offset=offset)
    return [found.as_bfloat16() if is_bfloat16(dtype) else found]


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether a header means bfloat16, which NumPy writes as two bytes without a meaning."""
    return dtype.str == "|V2"


def describe(label: str, head: bytes, n_bytes: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and the place of the first element of an array, by its first bytes.

    Parameters
    ----------
    label : str
        What messages call it.
    head : bytes
        Its first `HEAD_BYTES`, or all.
    n_bytes : int
        Its size, header included, which the header must agree with.
    """
    shape, fortran_order, dtype, offset = _parse(label, head)
    if dtype.hasobject:
        raise InputError(f"{label}: expected numbers, got objects; pickled objects are never loaded")
    if fortran_order and len(shape) > 1:
        raise InputError(
            f"{label}: expected C order, got Fortran order; save numpy.ascontiguousarray(array)"
        )
    if any(n < 0 for n in shape):
        raise InputError(f"{label}: expected a shape without negative lengths, got {shape}")
    expected = offset + math.prod(shape) * dtype.itemsize
    if expected != n_bytes:
        wrong = "truncated" if n_bytes < expected else "trailing bytes"
        raise InputError(
            f"{label}: expected {expected} bytes for {dtype.name} of shape {shape}, "
            f"got {n_bytes} ({wrong}); write the file again"
        )
    return shape, dtype, offset


def _parse(label: str, head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    stream = io.BytesIO(head)
    try:
        version = npy_format.read_magic(stream)
    except ValueError as error:
        raise InputError(
            f"{label}: expected a .npy file, got one that starts with {head[:6]!r}; "
            "save the array with numpy.save"
        ) from error
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise InputError(f"{label}: expected .npy format 1.0, 2.0 or 3.0, got {version}")
    length_bytes = 2 if version == (1, 0) else 4
    length = int.from_bytes(head[8 : 8 + length_bytes], "little")
    if length > _MAX_HEADER_BYTES:
        raise InputError(
            f"{label}: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length}; "
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
            f"{label}: expected a valid .npy header, got one that fails: {reason}"
        ) from error
    return shape, fortran_order, dtype, stream.tell()


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
