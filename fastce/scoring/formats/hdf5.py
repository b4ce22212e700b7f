"""HDF5 files, through h5py: datasets by their paths."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from fastce.scoring.formats.base import (
    FileReader,
    InputError,
    Reader,
    Source,
    check_expansion,
    library,
    refusing,
    selections,
)

_EXTRA = "'fastce[hdf5]'"


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read a file's tree of datasets."""
    h5py = library("h5py", path, _EXTRA)
    found = []
    with refusing(path, "HDF5 file"), path.open("rb") as file, h5py.File(file, "r") as opened:
        datasets: dict[str, Any] = {}
        opened.visititems(datasets.__setitem__)  # which follows no link to another file
        for name, dataset in datasets.items():
            if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
                continue
            if dataset.dtype.kind in "fiub":
                _check(path, name, dataset, status.st_size)
                found.append(
                    Source(
                        path,
                        name,
                        "hdf5",
                        dataset.shape,
                        dataset.dtype,
                        status.st_size,
                        status.st_mtime_ns,
                    )
                )
    return found


def open_reader(source: Source) -> Reader:
    """Return a reader of a dataset's rows."""
    return _DatasetReader(source)


def _check(path: Path, name: str, dataset: Any, n_bytes: int) -> None:
    label = f"{path}::{name}"
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{label}: expected the data in this file, got a link to other files")
    if dataset.chunks is None:
        if dataset.nbytes > n_bytes:
            raise InputError(
                f"{label}: expected {dataset.nbytes} bytes for shape {dataset.shape}, got a file of "
                f"{n_bytes}; write the file again"
            )
        return
    check_expansion(label, "an array", dataset.nbytes, n_bytes)
    check_expansion(label, "a chunk", math.prod(dataset.chunks) * dataset.dtype.itemsize, n_bytes)
    expected = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    n_chunks = dataset.id.get_num_chunks()
    if n_chunks < expected:
        raise InputError(
            f"{label}: expected {expected} chunks, got {n_chunks}: some were never written; "
            "write the file again"
        )


class _DatasetReader(FileReader):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        h5py = library("h5py", source.path, _EXTRA)
        with refusing(source.path, "HDF5 file"):
            self._opened = h5py.File(self.file, "r")
            self._dataset = self._opened[source.name]

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first_row`` on."""
        axes = self.source.shape[: len(self.source.shape) + 1 - rows.ndim]
        with refusing(self.source.path, "HDF5 file"):
            for index, part in selections(axes, first_row, rows):
                self._dataset.read_direct(part, index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._opened.close()
        super().__exit__(kind, error, at)
