"""Zarr folders of version 2 and 3, through zarr: one array, or a group's arrays by their paths."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from fastce.scoring.formats.base import (
    InputError,
    Reader,
    Source,
    check_expansion,
    library,
    refusing,
    selections,
)

_EXTRA = "'fastce[zarr]'"
_WHAT = "Zarr folder"

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
_MAX_METADATA_BYTES = 2**20

#: Codecs that only turn bytes into bytes; others, such as pickle, run what the file says.
_CODECS = frozenset(
    ["blosc", "bz2", "bytes", "crc32c", "delta", "gzip", "lz4", "lzma", "sharding_indexed"]
    + ["shuffle", "transpose", "zlib", "zstd"]
)


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read the metadata of a folder's arrays."""
    zarr = library("zarr", path, _EXTRA)
    n_bytes, mtime_ns = _size_and_time(path)
    with refusing(path, _WHAT):
        opened = zarr.open(str(path), mode="r")
        if isinstance(opened, zarr.Array):
            members = [(None, opened)]
        else:
            members = [
                (name, member)
                for name, member in opened.members(max_depth=None)
                if isinstance(member, zarr.Array)
            ]
        found = []
        for name, array in members:
            if array.dtype.kind in "fiub":
                note = _check(str(path) if name is None else f"{path}::{name}", array, n_bytes)
                found.append(
                    Source(path, name, "zarr", array.shape, array.dtype, n_bytes, mtime_ns, note=note)
                )
    return found


def open_reader(source: Source) -> Reader:
    """Return a reader of an array's rows."""
    return _ArrayReader(source)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return the bytes of all files of a folder and the time of the latest change."""
    n_bytes, mtime_ns = 0, 0
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            found = Path(folder, name)
            status = found.lstat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise InputError(f"{path}: expected files and folders alone, got {found}")
            if name in _METADATA and status.st_size > _MAX_METADATA_BYTES:
                raise InputError(
                    f"{path}: expected metadata of at most {_MAX_METADATA_BYTES} bytes, "
                    f"got {status.st_size} in {found}"
                )
            if stat.S_ISREG(status.st_mode):
                n_bytes += status.st_size
            mtime_ns = max(mtime_ns, status.st_mtime_ns)
    return n_bytes, mtime_ns


def _check(label: str, array: Any, n_bytes: int) -> str | None:
    """Refuse an array that cannot be what it says; return what users should hear about it."""
    metadata = array.metadata.to_dict()
    coding = [metadata.get(key) for key in ("codecs", "filters", "compressor")]
    unknown = {name.removeprefix("numcodecs.") for name in _codec_names(coding)} - _CODECS
    if unknown:
        raise InputError(
            f"{label}: expected codecs out of {', '.join(sorted(_CODECS))}; got "
            f"{', '.join(map(repr, sorted(unknown)))[:200]}"
        )
    check_expansion(label, "an array", math.prod(array.shape) * array.dtype.itemsize, n_bytes)
    chunk = array.shards or array.chunks
    check_expansion(label, "a chunk", math.prod(chunk) * array.dtype.itemsize, n_bytes)
    n_chunks, n_written = array.nchunks, array.nchunks_initialized
    if n_written < n_chunks:
        # written so if they hold nothing else, and not written yet by a run that was killed
        return (
            f"{n_chunks - n_written} of {n_chunks} chunks are not there and read as {array.fill_value}"
        )
    return None


def _codec_names(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {str(value[key]) for key in ("name", "id") if key in value}
        return own | _codec_names(list((value.get("configuration") or {}).values()))
    if isinstance(value, (list, tuple)):
        return {name for item in value for name in _codec_names(item)}
    return set()


class _ArrayReader:
    """Reads as many rows at a time as a row of chunks has; refuses a folder that changes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._check_unchanged()
        zarr = library("zarr", source.path, _EXTRA)
        with refusing(source.path, _WHAT):
            opened = zarr.open(str(source.path), mode="r")
            self._array = opened if source.name is None else opened[source.name]

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first_row`` on."""
        axes = self._source.shape[: len(self._source.shape) + 1 - rows.ndim]
        step = max(1, self._array.chunks[0] * math.prod(axes[1:]))
        at = 0
        with refusing(self._source.path, _WHAT):
            while at < len(rows):
                n = step - (first_row + at) % step
                for index, part in selections(axes, first_row + at, rows[at : at + n]):
                    part[...] = self._array[index]
                at += n

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is None:
            self._check_unchanged()

    def _check_unchanged(self) -> None:
        if _size_and_time(self._source.path) != (self._source.n_bytes, self._source.mtime_ns):
            raise InputError(f"{self._source.path}: was changed while it was read; run again")
