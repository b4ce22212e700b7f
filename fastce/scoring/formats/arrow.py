"""Arrow IPC files (Feather too) and Parquet, through pyarrow: a column of lists is an array of rows.

Memory is bounded by one record batch, or one row group. Rows of an Arrow file are found by reading
the batches before them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.formats.base import (
    FileReader,
    InputError,
    Reader,
    Source,
    check_expansion,
    library,
    read_head,
    refusing,
)

# Lists are decoded from Parquet so many elements at a time, and read from the file so many bytes.
_BATCH_ELEMENTS = 2**20
_BUFFER_BYTES = 2**20


_EXTRA = "'fastce[arrow]'"


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read a file's schema and number of rows, and the first row of lists of unstated length."""
    pa = _pyarrow(path)
    with path.open("rb", buffering=0) as file, refusing(path, "Arrow or Parquet file"):
        schema, n_rows = _schema(pa, file, _is_parquet(path))
        if len(set(schema.names)) < len(schema.names):
            raise InputError(f"{path}: expected columns of different names, got {schema.names!s:.200}")
        found = []
        for field in schema:
            is_list = _is_list(pa, field.type)
            dtype = _dtype(pa, field.type.value_type if is_list else field.type)
            if dtype is None:
                continue
            shape: tuple[int, ...] = (n_rows,)
            if is_list:
                shape += (_list_length(pa, file, path, field),)
            source = Source(path, field.name, "arrow", shape, dtype, status.st_size, status.st_mtime_ns)
            n_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
            check_expansion(source.label, "an array", n_bytes, status.st_size)
            found.append(source)
    return found


def open_reader(source: Source) -> Reader:
    """Return a reader of a column's rows."""
    return _ColumnReader(source)


def _pyarrow(path: Path) -> Any:
    for module in ("pyarrow.dataset", "pyarrow.ipc", "pyarrow.parquet"):
        library(module, path, _EXTRA)
    return library("pyarrow", path, _EXTRA)


def _is_parquet(path: Path) -> bool:
    return read_head(path, 4) == b"PAR1"


def _schema(pa: Any, file: Any, is_parquet: bool) -> tuple[Any, int]:
    if is_parquet:
        parquet = pa.parquet.ParquetFile(_handle(pa, file))
        return parquet.schema_arrow, parquet.metadata.num_rows
    fragment = pa.dataset.IpcFileFormat().make_fragment(_handle(pa, file))
    return fragment.physical_schema, fragment.count_rows()


def _handle(pa: Any, file: Any) -> Any:
    file.seek(0)
    return pa.PythonFile(file, mode="r")


def _is_list(pa: Any, type_: Any) -> bool:
    types = pa.types
    return bool(types.is_fixed_size_list(type_) or types.is_list(type_) or types.is_large_list(type_))


def _dtype(pa: Any, type_: Any) -> np.dtype[Any] | None:
    types = pa.types
    if types.is_floating(type_) or types.is_integer(type_) or types.is_boolean(type_):
        dtype: np.dtype[Any] = np.dtype(type_.to_pandas_dtype())
        return dtype
    return None


def _list_length(pa: Any, file: Any, path: Path, field: Any) -> int:
    if pa.types.is_fixed_size_list(field.type):
        return int(field.type.list_size)
    for _, column in _columns(pa, file, path, field.name, 0, 1):
        if len(column):
            return len(_checked(column[:1])[0])
    return 0


def _columns(
    pa: Any, file: Any, path: Path, name: str, first_row: int, batch_rows: int
) -> Iterator[tuple[int, Any]]:
    """Yield pieces of a column and their first rows, from one at or before ``first_row``."""
    if not _is_parquet(path):
        schema = pa.ipc.open_file(_handle(pa, file)).schema
        options = pa.ipc.IpcReadOptions(
            included_fields=[schema.get_field_index(name)], use_threads=False
        )
        batches = pa.ipc.open_file(_handle(pa, file), options=options)
        row = 0
        for i in range(batches.num_record_batches):
            column = batches.get_batch(i).column(0)
            yield row, column
            row += len(column)
        return
    parquet = pa.parquet.ParquetFile(_handle(pa, file), buffer_size=_BUFFER_BYTES)
    row = 0
    for group in range(parquet.num_row_groups):
        n_rows = parquet.metadata.row_group(group).num_rows
        if row + n_rows > first_row:
            for batch in parquet.iter_batches(batch_rows, [group], [name], use_threads=False):
                yield row, batch.column(0)
                row += batch.num_rows
        else:
            row += n_rows


def _checked(column: Any) -> Any:
    """Return a column that is what it says, without nulls."""
    column.validate(full=True)
    numbers = column.flatten() if hasattr(column.type, "value_type") else column
    if column.null_count or numbers.null_count:
        raise ValueError("nulls, where numbers are expected; fill them, or leave their rows out")
    return column


class _ColumnReader(FileReader):
    """Reads forward; for rows before those read last it begins again."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._pa = _pyarrow(source.path)
        self._begin(0)

    def _begin(self, first_row: int) -> None:
        self._pieces = _columns(
            self._pa, self.file, self.source.path, str(self.source.name), first_row, self._batch_rows
        )
        self._start, self._piece = first_row, np.empty(0)

    @property
    def _batch_rows(self) -> int:
        n_classes = max(1, *self.source.shape[1:], 1)
        return max(1, _BATCH_ELEMENTS // n_classes)

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first_row`` on."""
        if first_row < self._start:
            self._begin(first_row)
        filled = 0
        while filled < len(rows):
            at = first_row + filled - self._start
            if at >= len(self._piece):
                self._next()
                continue
            part = self._piece[at : at + len(rows) - filled]
            rows[filled : filled + len(part)] = part
            filled += len(part)

    def _next(self) -> None:
        with refusing(self.source.path, "Arrow or Parquet file"):
            found = next(self._pieces, None)
            if found is None:
                raise InputError(
                    f"{self.source.label}: expected {self.source.shape[0]} rows, got fewer; "
                    "write the file again"
                )
            self._start, column = found
            self._piece = self._numbers(_checked(column))

    def _numbers(self, column: Any) -> NDArray[Any]:
        if len(self.source.shape) == 1:
            return np.asarray(column.to_numpy(zero_copy_only=False))
        n_classes = self.source.shape[1]
        if hasattr(column, "offsets"):
            lengths = np.diff(column.offsets.to_numpy())
            if (lengths != n_classes).any():
                i = int((lengths != n_classes).argmax())
                raise InputError(
                    f"{self.source.label}: expected rows of {n_classes} numbers, got {lengths[i]} "
                    f"in row {self._start + i}"
                )
        numbers = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(numbers).reshape(len(column), n_classes)


@contextmanager
def batch_writer(
    path: Path, file: BinaryIO, columns: dict[str, tuple[str, tuple[int, ...]]]
) -> Iterator[Callable[[dict[str, NDArray[Any]]], None]]:
    """Give a function that appends a batch of rows to a new file: Parquet by its name, else Arrow.

    Parameters
    ----------
    path : path
        By whose suffix the format is chosen.
    file : binary file
        Empty, and open for writing; it is left open.
    columns : dict
        Of each column its dtype's name and the shape of a row: () for numbers, (n,) for lists.
    """
    pa = _pyarrow(path)
    types = {name: _type(pa, dtype, shape) for name, (dtype, shape) in columns.items()}
    schema = pa.schema(types)
    if path.suffix.lower() == ".parquet":
        # what is tried for numbers that repeat only costs time with those of logits
        writer = pa.parquet.ParquetWriter(file, schema, use_dictionary=False)
    else:
        writer = pa.ipc.new_file(file, schema)

    def write(block: dict[str, NDArray[Any]]) -> None:
        made = [_column(pa, block[name], type_) for name, type_ in types.items()]
        writer.write_batch(pa.record_batch(made, schema=schema))

    with writer:
        yield write


def _type(pa: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    element = pa.from_numpy_dtype(np.dtype(dtype))
    return pa.list_(element, *shape) if shape else element


def _column(pa: Any, rows: NDArray[Any], type_: Any) -> Any:
    flat = pa.array(rows.reshape(-1))
    return flat if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, type=type_)
