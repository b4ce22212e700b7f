"""`.safetensors` files: eight bytes of length, a JSON header, and the tensors one after another.

The rules are those of the format: the header is an object, its keys differ, and the tensors fill the
rest of the file without overlap or hole.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.formats.base import InputError, RawReader, Source, read_head

open_reader = RawReader

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 2**20
_MAX_TENSORS = 10_000

_DTYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
#: Bits of an element of the dtypes that can be in a file and are not read: they are only measured.
_OTHER_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "C64": 64,
}
#: What the format calls a dtype.
_NAMES = {np.dtype(d).name: name for name, d in _DTYPES.items() if name != "BF16"} | {
    "bfloat16": "BF16"
}


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read a file's header and check it against the file's size."""
    header, start = _header(path, status.st_size)
    found, spans = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        if dtype in _DTYPES:
            found.append(
                Source(
                    path,
                    name,
                    "safetensors",
                    shape,
                    np.dtype(_DTYPES[dtype]),
                    status.st_size,
                    status.st_mtime_ns,
                    bfloat16=dtype == "BF16",
                    offset=start + begin,
                )
            )
    _check_spans(path, spans, status.st_size - start)
    return found


def _header(path: Path, n_bytes: int) -> tuple[dict[str, Any], int]:
    head = read_head(path, _LENGTH_BYTES + _MAX_HEADER_BYTES)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if len(head) < _LENGTH_BYTES or head[_LENGTH_BYTES : _LENGTH_BYTES + 1] not in (b"{", b""):
        raise InputError(
            f"{path}: expected a .safetensors file, got one that starts with {head[:9]!r}; "
            "save the tensors with safetensors"
        )
    if length > _MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: expected a header of at most {_MAX_HEADER_BYTES} bytes, got {length}; "
            "save fewer tensors in a file"
        )
    if _LENGTH_BYTES + length > n_bytes:
        raise InputError(
            f"{path}: expected a header of {length} bytes, got a file of {n_bytes} bytes "
            "(truncated); write the file again"
        )
    text = head[_LENGTH_BYTES : _LENGTH_BYTES + length]
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected a valid .safetensors header, got one that fails: {error!s:.200}"
        ) from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: expected a header that is an object, got {header!s:.50}")
    if len(header) > _MAX_TENSORS:
        raise InputError(f"{path}: expected at most {_MAX_TENSORS} tensors, got {len(header)}")
    return header, _LENGTH_BYTES + length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (
        isinstance(dtype, str)
        and _are_sizes(shape)
        and _are_sizes(offsets)
        and len(offsets) == 2
        and set(fields) == {"dtype", "shape", "data_offsets"}
    ):
        raise InputError(
            f"{path}: expected dtype, shape and data_offsets of tensor {name!r:.100}, "
            f"got {entry!r:.200}"
        )
    bits = 8 * np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else _OTHER_BITS.get(dtype)
    if bits is None:
        raise InputError(f"{path}: expected a known dtype of tensor {name!r:.100}, got {dtype!r:.50}")
    begin, end = offsets
    n_bits = math.prod(shape) * bits
    if n_bits != 8 * (end - begin):
        raise InputError(
            f"{path}: expected {n_bits // 8} bytes for tensor {name!r:.100}, {dtype} of shape "
            f"{tuple(shape)!s:.200}, got data_offsets {offsets!s:.100}"
        )
    return dtype, tuple(shape), begin, end


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # more axes than arrays have, or numbers of thousands of digits, would only cost time
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(n) is int and 0 <= n < 2**63 for n in values)
    )


def _check_spans(path: Path, spans: list[tuple[int, int, str]], n_bytes: int) -> None:
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            wrong = "overlaps another" if begin < at else f"leaves a hole of {begin - at} bytes"
            raise InputError(
                f"{path}: expected tensors one after another, got {name!r:.100}, which {wrong}"
            )
        at = end
    if at != n_bytes:
        wrong = "truncated" if n_bytes < at else "trailing bytes"
        raise InputError(
            f"{path}: expected {at} bytes of tensors, got {n_bytes} ({wrong}); write the file again"
        )


class SafetensorsWriter:
    """Writes a `.safetensors` file of known tensors, each of them block by block."""

    def __init__(self, file: BinaryIO, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self._file = file
        self._at: dict[str, int] = {}
        header, end = {}, 0
        for name, (dtype_name, shape) in tensors.items():
            dtype = _NAMES[dtype_name]
            begin, end = end, end + math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            self._at[name] = begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        self._at = {name: begin + file.tell() for name, begin in self._at.items()}

    def write(self, name: str, block: NDArray[Any]) -> None:
        """Append the next elements of a tensor, of the dtype it was declared with."""
        self._file.seek(self._at[name])
        little = np.ascontiguousarray(block, dtype=block.dtype.newbyteorder("<"))
        self._file.write(little.reshape(-1).view(np.uint8).data)
        self._at[name] += block.nbytes
