"""The formats of files: which one a file has, what arrays are in it, and readers of their rows.

Headers are hostile input: nothing is unpickled, what they declare must agree with the file's size
before anything of that size is allocated, and what is refused is refused by the file's name. Data are
read into memory of our own, not mapped: a file cut short under a map kills the process.

A format is a module with two functions: ``sources(path, status)``, the arrays in a file by their
headers alone, and ``open_reader(source)``.
"""

from __future__ import annotations

import fnmatch
import glob
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastce.scoring.formats.base import InputError, Kind, Reader, Source, read_head, regular_file

__all__ = ["InputError", "Kind", "Paths", "Reader", "Source", "find", "open_source", "sources_of"]

#: A path, a pattern, or several of them; FILE::NAME names one array of a file.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: How a file starts, or how its name ends, and the module that reads it.
_MAGIC = {b"\x93NUMPY": "npy"}
_SUFFIXES: dict[str, str] = {}

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
Role = Literal["logits", "targets", "mask", "lengths"]


def sources_of(path: Path) -> list[Source]:
    """Return every array of a file, from its header."""
    status = regular_file(path)
    head = read_head(path, 8)
    by_suffix = _SUFFIXES.get(path.suffix.lower(), "npy")
    format_ = next((f for magic, f in _MAGIC.items() if head.startswith(magic)), by_suffix)
    return list(importlib.import_module(f"{__name__}.{format_}").sources(path, status))


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
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found = []
    for item in [os.fspath(path) for path in given]:
        pattern, _, name = item.partition("::")
        for path in _expand(pattern):
            found.extend(_choose(path, name or None, role, bfloat16))
    return found


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


def _choose(path: Path, name: str | None, role: Role, bfloat16: bool) -> list[Source]:
    dtypes, usual_names = _ROLES[role]
    everything = sources_of(path)
    if bfloat16:
        everything = [s.as_bfloat16() if s.dtype.name == "uint16" else s for s in everything]
    if name is not None:
        named = sorted(
            (s for s in everything if _matches(s, name)), key=lambda s: _natural(s.name or "")
        )
        if not named:
            raise InputError(f"{path}: expected an array {name!r}, got {_list(everything)}")
        everything = named
    fitting = [s for s in everything if s.dtype_name in dtypes]
    if not fitting:
        what = everything[0].dtype_name if len(everything) == 1 else _list(everything)
        raise InputError(
            f"{path}: expected {role} of dtype {', '.join(dtypes)}; got {what}; "
            "convert with array.astype and save again"
        )
    if name is None and len(fitting) > 1:
        usual = [s for s in fitting if s.name in usual_names]
        if len(usual) != 1:
            raise InputError(
                f"{path}: expected one array of {role}, got {_list(fitting)}; "
                f"name one as {path}::{fitting[0].name}"
            )
        fitting = usual
    return fitting


def _matches(source: Source, name: str) -> bool:
    return source.name is not None and fnmatch.fnmatchcase(source.name, name)


def _list(sources: Sequence[Source]) -> str:
    shown = [f"{s.name}: {s.dtype_name} {s.shape}" for s in sources[:8]]
    more = [f"and {len(sources) - 8} more"] if len(sources) > 8 else []
    return "; ".join(shown + more) or "none"


def find_all(paths: Paths, *, bfloat16: bool = False) -> list[Source]:
    """Find every array of the files that paths and patterns name, whatever it may be for."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found: list[Source] = []
    for item in [os.fspath(path) for path in given]:
        pattern, _, name = item.partition("::")
        for path in _expand(pattern):
            everything = sources_of(path)
            named = [s for s in everything if not name or _matches(s, name)]
            if not named:
                raise InputError(f"{path}: expected an array {name or ''!r}, got {_list(everything)}")
            found += [s.as_bfloat16() if bfloat16 and s.dtype.name == "uint16" else s for s in named]
    return found
