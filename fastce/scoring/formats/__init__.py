"""The formats of files: which one a file has, what arrays are in it, and readers of their rows.

Headers are hostile input: nothing is unpickled (torch's own files excepted, by torch, and tensors
alone), what they declare must agree with the file's size before anything of that size is allocated,
and what is refused is refused by the file's name. Data are read into memory of our own, not mapped: a
file cut short under a map kills the process. What libraries parse is as safe as they are.

A format is a module with two functions: ``sources(path, status)``, the arrays in a file by their
headers alone, and ``open_reader(source)``.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fastce.scoring.formats.base import InputError, Kind, Reader, Source, read_head, regular_file

__all__ = [
    "InputError",
    "Kind",
    "Paths",
    "Reader",
    "Source",
    "asks_for_bfloat16",
    "find",
    "find_all",
    "open_source",
    "own_targets",
    "sources_of",
]

#: A path, a pattern, or several of them; FILE::NAME names one array of a file.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: How a file starts, or how its name ends, and the module that reads it.
_MAGIC = {
    b"\x93NUMPY": "npy",
    b"_logits_": "kld",
    b"PK\x03\x04": "npz",
    b"ARROW1": "arrow",
    b"PAR1": "arrow",
    b"\x89HDF\r\n\x1a\n": "hdf5",
}
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".kld": "kld",
    ".npz": "npz",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".parquet": "arrow",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".pt": "torch",
    ".pth": "torch",
}

#: Longer names, or such that steer a terminal, are not of people's arrays.
_MAX_NAME = 1000

_LOGITS_DTYPES = ("float16", "bfloat16", "float32", "float64")
_TARGETS_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_MASK_DTYPES = ("bool", *_TARGETS_DTYPES)

#: What a file is to be read for: the dtypes, and the names that are taken where a file has several.
_ROLES = {
    "logits": (_LOGITS_DTYPES, ("logits", "logprobs", "log_probs", "probs")),
    "targets": (_TARGETS_DTYPES, ("targets", "labels", "token_ids", "input_ids")),
    "mask": (_MASK_DTYPES, ("mask", "attention_mask")),
    "lengths": (_TARGETS_DTYPES, ("lengths",)),
}
#: What names say of the numbers of logits.
_KINDS: dict[str, Kind] = {"logprobs": "logprobs", "log_probs": "logprobs", "probs": "probs"}
Role = Literal["logits", "targets", "mask", "lengths"]


def sources_of(path: Path) -> list[Source]:
    """Return every array of a file, from its header."""
    if _is_zarr(path):
        format_, status = "zarr", path.stat()
    else:
        status = regular_file(path)
        format_ = _format_of(path)
    found: list[Source] = importlib.import_module(f"{__name__}.{format_}").sources(path, status)
    for name in [source.name for source in found if source.name is not None]:
        if len(name) > _MAX_NAME or not name.isprintable():
            raise InputError(
                f"{path}: expected names of at most {_MAX_NAME} printable characters, got {name!r:.100}"
            )
    return found


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any(
        (path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")
    )


def _format_of(path: Path) -> str:
    head = read_head(path, 256)
    if head.startswith(b"PK") and b"/data.pkl" in head:  # the first member of a file of torch.save
        return "torch"
    by_suffix = _SUFFIXES.get(path.suffix.lower(), "npy")
    return next((f for magic, f in _MAGIC.items() if head.startswith(magic)), by_suffix)


def open_source(source: Source) -> Reader:
    """Return a reader of an array's rows."""
    module = importlib.import_module(f"{__name__}.{source.format}")
    reader: Reader = module.open_reader(source)
    return reader


def find(paths: Paths, role: Role, *, bfloat16: bool = False) -> list[Source]:
    """Find the arrays that paths and patterns name.

    Parameters
    ----------
    paths : path, pattern, or sequence of them
        The files of a pattern are taken in natural order: logits-2 before logits-10, as the rows of
        numbered shards are. ``FILE::NAME`` is one array of a file, and NAME may be a pattern too.
    role : {"logits", "targets", "mask", "lengths"}
        What is to be read, which chooses among a file's arrays by dtype and usual names.
    bfloat16 : bool
        16-bit elements that are not float16 are bfloat16.

    Returns
    -------
    list of Source

    Raises
    ------
    InputError
        If a file cannot be read, is malformed, or holds no array of that role, or several.
    """
    return [s for path, name in _given(paths) for s in _choose(path, name, role, bfloat16)]


def find_all(paths: Paths, *, bfloat16: bool = False) -> list[Source]:
    """Find every array of the files that paths and patterns name, whatever it may be for."""
    found = []
    for path, name in _given(paths):
        named = _named(path, name, bfloat16)
        if not named:
            raise InputError(f"{path}: expected an array '', got none")
        found += named
    return found


def asks_for_bfloat16(dtype: str | None) -> bool:
    """Return whether 16-bit integers are to be taken as bfloat16: the one dtype users may give."""
    if dtype not in (None, "bfloat16", "bf16"):
        raise ValueError(f"dtype: expected bfloat16 or nothing, got {dtype!r}")
    return dtype is not None


def own_targets(logits: Source) -> Source | None:
    """Return the targets that are in the same file under a usual name, if one alone is."""
    dtypes, usual_names = _ROLES["targets"]
    found = [s for s in sources_of(logits.path) if s.name in usual_names and s.dtype_name in dtypes]
    return found[0] if len(found) == 1 else None


def _given(paths: Paths) -> Iterator[tuple[Path, str]]:
    """Yield each file that is meant, and which of its arrays; "" stands for no name."""
    for item in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        pattern, _, name = os.fspath(item).partition("::")
        for path in _expand(pattern):
            yield path, name


def _expand(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [Path(pattern)]
    matches = sorted(glob.glob(pattern, recursive=True), key=_natural)
    if not matches:
        raise InputError(f"{pattern}: expected a pattern that matches files, got no match")
    return [Path(match) for match in matches]


def _natural(name: str) -> list[int | str]:
    # split yields text and digits in turn, so names compare text with text and number with number
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def _named(path: Path, name: str, bfloat16: bool) -> list[Source]:
    """Return the arrays of a file that a name or pattern means; all without one."""
    everything = sources_of(path)
    if bfloat16:
        everything = [s.as_bfloat16() if s.dtype.name == "uint16" else s for s in everything]
    if not name:
        return everything
    named = [s for s in everything if _matches(s, name)]
    if not named:
        raise InputError(f"{path}: expected an array {name!r}, got {_list(everything)}")
    return named


def _choose(path: Path, name: str, role: Role, bfloat16: bool) -> list[Source]:
    dtypes, usual_names = _ROLES[role]
    everything = _named(path, name, bfloat16)
    if name:
        everything.sort(key=lambda s: _natural(s.name or ""))
    fitting = [s for s in everything if s.dtype_name in dtypes]
    if not fitting:
        what = everything[0].dtype_name if len(everything) == 1 else _list(everything)
        raise InputError(
            f"{path}: expected {role} of dtype {', '.join(dtypes)}; got {what}; "
            "convert with array.astype and save again"
        )
    if not name and len(fitting) > 1:
        usual = [s for s in fitting if s.name in usual_names]
        if len(usual) != 1:
            raise InputError(
                f"{path}: expected one array of {role}, got {_list(fitting)}; "
                f"name one as {path}::{fitting[0].name}"
            )
        fitting = usual
    if role == "logits":
        fitting = [replace(s, kind=s.kind or _KINDS.get(s.name or "")) for s in fitting]
    return fitting


def _matches(source: Source, name: str) -> bool:
    # a name may hold brackets, which mean something in a pattern
    return source.name is not None and (source.name == name or fnmatch.fnmatchcase(source.name, name))


def _list(sources: Sequence[Source]) -> str:
    shown = [f"{s.name}: {s.dtype_name} {s.shape}" for s in sources[:8]]
    more = [f"and {len(sources) - 8} more"] if len(sources) > 8 else []
    return "; ".join(shown + more) or "none"
