"""Files of ``torch.save``, through torch: a tensor, or a dict's tensors by their keys.

Such a file is a zip file of a pickle and the tensors' numbers. torch unpickles it with
``weights_only``, and only after the pickle has been seen to name nothing but tensors and dicts.
"""

from __future__ import annotations

import os
import pickletools
from pathlib import Path
from types import TracebackType
from typing import Any
from zipfile import ZIP_STORED

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.formats.archive import open_zip
from fastce.scoring.formats.base import (
    FileReader,
    InputError,
    Reader,
    Source,
    library,
    refusing,
    selections,
)

_WHAT = "file of torch.save"
_MAX_PICKLE_BYTES = 2**20
_DTYPES = (
    *("bool", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
)
_REBUILD = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read what tensors a file has."""
    found = []
    for name, tensor in _load(path, status.st_size).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype in _DTYPES:
            found.append(
                Source(
                    path,
                    name,
                    "torch",
                    tuple(tensor.shape),
                    np.dtype("uint16" if dtype == "bfloat16" else dtype),
                    status.st_size,
                    status.st_mtime_ns,
                    bfloat16=dtype == "bfloat16",
                )
            )
    return found


def open_reader(source: Source) -> Reader:
    """Return a reader of a tensor's rows."""
    return _TensorReader(source)


def _load(path: Path, n_bytes: int) -> dict[str | None, Any]:
    torch = library("torch", path, "torch")
    _check_pickle(path)
    with refusing(path, _WHAT):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = {None: content} if isinstance(content, torch.Tensor) else content
    if not isinstance(tensors, dict):
        raise InputError(
            f"{path}: expected a tensor or a dict of tensors, got {type(content).__name__}"
        )
    found = {
        name if name is None else str(name): tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    }
    for name, tensor in found.items():
        size = tensor.numel() * tensor.element_size()
        if size > n_bytes:
            raise InputError(
                f"{path}: expected tensors of at most the file's {n_bytes} bytes, "
                f"got {size} of {name!r:.100}; save tensor.contiguous()"
            )
    return found


def _check_pickle(path: Path) -> None:
    """Refuse a file whose pickle is more than tensors and dicts need."""
    with path.open("rb", buffering=0) as file, open_zip(path, file) as opened:
        pickles = [m for m in opened.infolist() if m.filename.endswith("data.pkl")]
        if len(pickles) != 1 or any(m.compress_type != ZIP_STORED for m in opened.infolist()):
            raise InputError(f"{path}: expected a file of torch.save, got another zip file")
        if pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise InputError(
                f"{path}: expected a pickle of at most {_MAX_PICKLE_BYTES} bytes, "
                f"got {pickles[0].file_size}; save fewer tensors in a file"
            )
        with refusing(path, _WHAT):
            names = {
                str(argument)
                for code, argument, _ in pickletools.genops(opened.read(pickles[0]))
                if code.name in ("GLOBAL", "STACK_GLOBAL", "INST")
            }
    for name in names:
        module, _, what = name.partition(" ")
        if not (
            (module in ("torch", "torch.storage") and what.endswith("Storage"))
            or (module == "torch" and what in _DTYPES)
            or (module == "torch._utils" and what in _REBUILD)
            or name == "collections OrderedDict"
        ):
            raise InputError(
                f"{path}: expected tensors alone, got {name!r:.100}; save a dict of tensors"
            )


class _TensorReader(FileReader):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._torch = library("torch", source.path, "torch")
        tensor = _load(source.path, source.n_bytes)[source.name]
        # bits, so that bfloat16 and the unsigned go the way of all
        self._tensor = tensor.view(getattr(self._torch, f"int{8 * source.dtype.itemsize}"))

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first_row`` on."""
        # torch maps the file: a page that is gone would end the process
        self._check_unchanged()
        axes = self.source.shape[: len(self.source.shape) + 1 - rows.ndim]
        bits = rows.view(f"i{rows.itemsize}")
        for index, part in selections(axes, first_row, bits):
            self._torch.from_numpy(part).copy_(self._tensor[index])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        del self._tensor
        super().__exit__(kind, error, at)
