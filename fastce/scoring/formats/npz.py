"""`.npz` files: zip files of `.npy` files, stored or deflated."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.formats.archive import data_offset, open_zip
from fastce.scoring.formats.base import FileReader, InputError, RawReader, Reader, Source, refusing
from fastce.scoring.formats.npy import HEAD_BYTES, describe, is_bfloat16

_WHAT = "member"

# What is inflated at a time.
_PIECE_BYTES = 2**18


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read the headers of a file's arrays and check them against the sizes of its members."""
    with path.open("rb", buffering=0) as file, open_zip(path, file) as opened:
        members = [m for m in opened.infolist() if m.filename.endswith(".npy")]
        return [_source(path, status, file, opened, member) for member in members]


def _source(
    path: Path, status: os.stat_result, file: io.RawIOBase, opened: ZipFile, member: ZipInfo
) -> Source:
    name = member.filename.removesuffix(".npy")
    with refusing(path, _WHAT), opened.open(member) as stream:
        head = stream.read(HEAD_BYTES)
    shape, dtype, offset = describe(f"{path}::{name}", head, member.file_size)
    at = 0
    if member.compress_type == ZIP_STORED:
        at = data_offset(file, member) + offset
        if at - offset + member.file_size > status.st_size:
            raise InputError(
                f"{path}: expected the data of {name!r:.100} within the file; write it again"
            )
    found = Source(path, name, "npz", shape, dtype, status.st_size, status.st_mtime_ns, offset=at)
    return found.as_bfloat16() if is_bfloat16(dtype) else found


def open_reader(source: Source) -> Reader:
    """Return a reader of an array's rows: in place, or of the stream where it is deflated."""
    return RawReader(source) if source.offset else _InflatingReader(source)


class _InflatingReader(FileReader):
    """Reads forward; for rows before those read last it begins again."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._zip = open_zip(source.path, self.file)
        self._member = self._zip.getinfo(f"{source.name}.npy")
        n_bytes = math.prod(source.shape) * source.dtype.itemsize
        self._data_at = self._member.file_size - n_bytes
        self._begin()

    def _begin(self) -> None:
        with refusing(self.source.path, _WHAT):
            self._stream, self._at = self._zip.open(self._member), 0

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first_row`` on."""
        at = self._data_at + first_row * math.prod(rows.shape[1:]) * rows.itemsize
        if at < self._at:
            self._begin()
        while self._at < at:
            self._next(at - self._at)
        rest = rows.reshape(-1).view(np.uint8).data
        while rest:
            piece = self._next(len(rest))
            rest[: len(piece)] = piece
            rest = rest[len(piece) :]

    def _next(self, n: int) -> bytes:
        with refusing(self.source.path, _WHAT):
            piece = self._stream.read(min(n, _PIECE_BYTES))
        if not piece:
            raise InputError(
                f"{self.source.label}: expected {self._member.file_size} bytes, got {self._at} "
                "(truncated); write the file again"
            )
        self._at += len(piece)
        return piece
