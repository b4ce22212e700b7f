"""Which files belong together, and the parts that the rows of a run are cut into."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.formats import InputError, Paths, Source, find, open_source, own_targets
from fastce.scoring.scorer import Options

# A part has about so many bytes of logits: what is read again at most after a kill, and small beside
# it what making its record safe on disk costs.
PART_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one array of logits, and where their targets are."""

    name: str  #: of the files written for it
    logits: Source
    targets: Source
    mask: Source | None
    first_target: int  #: row of targets that belongs to the first row
    first_mask: int  #: row of the mask that does

    @property
    def n_rows(self) -> int:
        """Rows of logits, all leading axes together."""
        return math.prod(self.logits.shape[:-1])

    @property
    def n_classes(self) -> int:
        """The length of the last axis."""
        return self.logits.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of logits, as read."""
        return self.n_classes * self.logits.dtype.itemsize

    @property
    def loss_dtype(self) -> np.dtype[Any]:
        """The dtype the kernels compute in, of native byte order."""
        return np.dtype(np.float64 if self.logits.dtype.itemsize == 8 else np.float32)


@dataclass(frozen=True, slots=True)
class Part:
    """A range of rows of a shard: what is scored, recorded and done again as a whole.

    Parts depend on the shapes of the inputs alone. They travel to workers as this, never with data.
    """

    shard: Shard
    first_row: int
    n_rows: int
    starts: tuple[int, ...] | None  #: of its sequences, counted from first_row, and their end
    shift: bool  #: the target of a row is that of the next one, within its sequence

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.shard.name}-{self.first_row:012}"

    def key(self, options: Options, by: dict[str, Any]) -> str:
        """Return a hash of all that its results depend on; ``by`` is what computes them."""
        identity = {
            "logits": _identity(self.shard.logits),
            "targets": _identity(self.shard.targets),
            "mask": self.shard.mask and _identity(self.shard.mask),
            "rows": [self.first_row, self.n_rows, self.shard.first_target, self.shard.first_mask],
            "sequences": self.starts and hashlib.sha256(repr(self.starts).encode()).hexdigest(),
            "shift": self.shift,
            "options": options.as_json(),
            "by": by,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _identity(source: Source) -> list[Any]:
    place = [str(source.path.absolute()), source.name, source.n_bytes, source.mtime_ns]
    return [*place, list(source.shape), source.dtype_name]


def find_shards(
    logits: Paths, targets: Paths | None, mask: Paths | None = None, *, bfloat16: bool = False
) -> list[Shard]:
    """Check every file and say which targets belong to which logits, before any row is read."""
    xs = find_logits(logits, bfloat16=bfloat16)
    if not xs:
        raise ValueError("logits: expected at least one file, got none")
    ys = _own_targets(xs) if targets is None else find(targets, "targets")
    first_and_targets = _along(xs, ys, "targets")
    masks = [(None, 0)] * len(xs) if mask is None else _along(xs, find(mask, "mask"), "mask")
    return [
        Shard(name, x, y, m, first, first_mask)
        for name, x, (y, first), (m, first_mask) in zip(
            _names(xs), xs, first_and_targets, masks, strict=True
        )
    ]


def find_logits(paths: Paths, *, bfloat16: bool = False) -> list[Source]:
    """Check files of logits, which must be of one dtype and number of classes."""
    xs = find(paths, "logits", bfloat16=bfloat16)
    for x in xs:
        _check_logits(x, xs[0])
    return xs


def _own_targets(xs: list[Source]) -> list[Source]:
    found = []
    for x in xs:
        y = own_targets(x)
        if y is None:
            raise ValueError(f"targets: expected files of class ids, as {x.path} holds none itself")
        found.append(y)
    return found


def _check_logits(x: Source, first: Source) -> None:
    if len(x.shape) not in (2, 3) or x.shape[-1] == 0:
        raise InputError(
            f"{x.label}: expected logits of shape (n_rows, n_classes) or (n, m, n_classes), "
            f"got {x.shape}; reshape and save again"
        )
    if (x.dtype_name, x.dtype, x.shape[-1]) != (first.dtype_name, first.dtype, first.shape[-1]):
        raise InputError(
            f"{x.label}: expected {first.dtype_name} logits of {first.shape[-1]} classes as in "
            f"{first.label}, got {x.dtype_name} of {x.shape[-1]}; score them apart"
        )


def _along(xs: list[Source], ys: list[Source], what: str) -> list[tuple[Source, int]]:
    """Return for each array of logits the array of its targets, and the row where they start."""
    if len(ys) not in (1, len(xs)):
        raise ValueError(
            f"{what}: expected one file, or one for each of the {len(xs)} logits files; got {len(ys)}"
        )
    groups = [xs] if len(ys) == 1 else [[x] for x in xs]
    found = []
    for group, y in zip(groups, ys, strict=True):
        n_rows = [math.prod(x.shape[:-1]) for x in group]
        allowed: list[tuple[int, ...]] = [(sum(n_rows),)]
        if all(len(x.shape) == 3 and x.shape[1] == group[0].shape[1] for x in group):
            allowed.append((sum(x.shape[0] for x in group), group[0].shape[1]))
        if y.shape not in allowed:
            whose = group[0].label if len(group) == 1 else f"{len(group)} logits files"
            raise InputError(
                f"{y.label}: expected {what} of shape {' or '.join(map(str, allowed))} for {whose}, "
                f"got {y.shape}"
            )
        found += [(y, first) for first in accumulate(n_rows[:-1], initial=0)]
    return found


def _names(xs: list[Source]) -> list[str]:
    """Return a name for the outputs of each array of logits: its file's, and what tells it apart."""
    names = [x.path.stem for x in xs]
    if len({x.path for x in xs}) > len(set(names)):  # files of one name in several folders
        folder = os.path.commonpath([x.path.absolute().parent for x in xs])
        names = [str(x.path.absolute().relative_to(folder).with_suffix("")) for x in xs]
    if len(set(names)) < len(xs):
        names = [f"{name}.{x.name or i}" for i, (name, x) in enumerate(zip(names, xs, strict=True))]
    names = [name.replace("/", "_").replace("\\", "_") for name in names]
    return names if len(set(names)) == len(xs) else [f"{name}.{i}" for i, name in enumerate(names)]


def cut(shards: list[Shard], starts: list[NDArray[np.int64]] | None, *, shift: bool) -> list[Part]:
    """Cut shards into parts, which hold whole sequences where these are known."""
    parts = []
    for i, shard in enumerate(shards):
        per_part = max(1, PART_BYTES // shard.row_bytes)
        if starts is None:
            for first in range(0, shard.n_rows, per_part):
                n_rows = min(per_part, shard.n_rows - first)
                parts.append(Part(shard, first, n_rows, None, shift))
        else:
            for begin, end in _groups(starts[i], per_part):
                own = starts[i][begin : end + 1] - starts[i][begin]
                first = int(starts[i][begin])
                parts.append(Part(shard, first, int(own[-1]), tuple(own.tolist()), shift))
    return parts


def _groups(starts: NDArray[np.int64], per_part: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of sequences that have up to so many rows, or are one sequence."""
    begin = 0
    while begin < len(starts) - 1:
        end = int(np.searchsorted(starts, starts[begin] + per_part, side="right")) - 1
        yield begin, (end := max(end, begin + 1))
        begin = end


def find_sequences(
    shards: list[Shard], *, seq_len: int | None, lengths: Paths | None, shift: bool
) -> list[NDArray[np.int64]] | None:
    """Return where the sequences of each shard start, and its end; None if they are not known.

    Three axes of logits are sequences along the middle one. With ``shift`` alone, a file is one.
    """
    if seq_len is not None and lengths is not None:
        raise ValueError("seq_len: expected this or lengths, got both")
    if lengths is not None:
        return _starts_of_lengths(shards, lengths)
    found = []
    for shard in shards:
        if seq_len is not None:
            length = seq_len
            if length < 1 or shard.n_rows % length:
                raise ValueError(
                    f"seq_len: expected a length that divides the {shard.n_rows} rows of "
                    f"{shard.logits.label}, got {length}"
                )
        elif len(shard.logits.shape) == 3:
            length = shard.logits.shape[1]
        elif shift:
            length = shard.n_rows
        else:
            return None
        if length == 0 or shard.n_rows == 0:
            found.append(np.zeros(1, np.int64))
        else:
            found.append(np.arange(0, shard.n_rows + 1, length, dtype=np.int64))
    return found


def _starts_of_lengths(shards: list[Shard], paths: Paths) -> list[NDArray[np.int64]]:
    arrays = []
    sources = find(paths, "lengths")
    for source in sources:
        array = np.empty(math.prod(source.shape), source.dtype)
        with open_source(source) as reader:
            reader.read_into(0, array)
        arrays.append(array.astype(np.int64))
    label = sources[0].label
    all_lengths = np.concatenate(arrays)
    ends = np.concatenate(([0], np.cumsum(all_lengths)))
    total = sum(shard.n_rows for shard in shards)
    wrong = np.flatnonzero(ends[1:] <= ends[:-1])  # also where the sum leaves int64
    if len(wrong):
        raise InputError(
            f"{label}: expected lengths of at least 1, which sum to the {total} rows, "
            f"got {all_lengths[wrong[0]]}"
        )
    if ends[-1] != total:
        raise InputError(f"{label}: expected lengths that sum to the {total} rows, got {ends[-1]}")
    found, first = [], 0
    for shard in shards:
        begin, end = np.searchsorted(ends, [first, first + shard.n_rows])
        if (ends[begin], ends[end]) != (first, first + shard.n_rows):
            raise InputError(f"{label}: expected sequences that end where {shard.logits.label} does")
        found.append(ends[begin : end + 1] - first)
        first += shard.n_rows
    return found
