"""What is in files of logits and targets, what it looks like, and what scoring it would take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce import registry
from fastce.scoring.checks import SAMPLE_ROWS, guess_kind, unused_tail, used_columns
from fastce.scoring.figures import SCHEMA_VERSION, Tally, finite_or_none
from fastce.scoring.formats import Kind, Paths, Source, asks_for_bfloat16, find_all, open_source
from fastce.scoring.scorer import Options, score_rows

#: Arrays up to this size are read whole; of larger ones a sample of it.
SAMPLE_BYTES = 64 * 2**20

#: Distinct ids are counted up to this many.
MAX_DISTINCT = 2**20

_BLOCK_BYTES = 4 * 2**20

# The blocks that `score_files` has in memory, if nothing else is said.
_SCORING_BYTES = 64 * 2**20

# What a rehearsal of the kernels may take, in seconds.
_REHEARSAL_SECONDS = 0.05

# Bytes that scoring keeps of each row of a block: the five statistics, the target, and copies of them.
_BYTES_PER_ROW = 100


@dataclass(frozen=True, slots=True)
class Estimate:
    """What scoring an array would take here, from a rehearsal on some of its rows. An estimate."""

    seconds: float  #: with rows read as fast as the sample was, while others are scored
    memory_bytes: int  #: beside the interpreter and its libraries
    backend: str


@dataclass(frozen=True, slots=True)
class Floats:
    """What was found in the rows of an array of floats that were read."""

    rows: int  #: all axes but the last, together
    classes: int  #: the last axis; 1 where there is only one axis
    rows_read: int
    nan: int
    posinf: int
    neginf: int
    minimum: float | None  #: of the finite numbers; None if there are none
    maximum: float | None
    looks_like: Kind
    unused: int  #: the last columns that are the same in all rows read, or -inf
    estimate: Estimate | None  #: None where there is nothing to score


@dataclass(frozen=True, slots=True)
class Integers:
    """What was found in the elements of an array of integers or bools that were read."""

    size: int
    size_read: int
    minimum: int | None  #: of those that are not -100
    maximum: int | None
    distinct: int  #: up to `MAX_DISTINCT`
    ignored: int  #: equal to -100
    fits: tuple[str, ...]  #: whether these could be targets of the arrays of floats beside them


@dataclass(frozen=True, slots=True)
class Inspection:
    """One array of a file: its header, and what its elements look like.

    Attributes
    ----------
    path, name : str, str or None
        The file, and the array's name in a file of several.
    format, shape, dtype, file_bytes
        As the header has them.
    kind : str or None
        What the numbers are where the format says it; `Floats.looks_like` is a guess.
    note : str or None
        What the format has to say.
    looks_like : str
        All in one sentence.
    floats, integers : Floats or None, Integers or None
        What was found; both None for elements of other dtypes, which are not read.
    """

    path: str
    name: str | None
    format: str
    shape: tuple[int, ...]
    dtype: str
    file_bytes: int
    kind: Kind | None
    note: str | None
    looks_like: str
    floats: Floats | None
    integers: Integers | None

    @property
    def label(self) -> str:
        """The file, and which of its arrays."""
        return self.path if self.name is None else f"{self.path}::{self.name}"

    @property
    def is_sample(self) -> bool:
        """Whether part of the array was read."""
        if self.floats is not None:
            return 0 < self.floats.rows_read < self.floats.rows
        return self.integers is not None and 0 < self.integers.size_read < self.integers.size

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON, with a schema version; numbers that are not finite become None."""
        values: dict[str, Any] = finite_or_none(asdict(self))
        return {"schema_version": SCHEMA_VERSION, **values, "is_sample": self.is_sample}


def inspect_files(
    paths: Paths,
    *,
    full: bool = False,
    dtype: str | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> list[Inspection]:
    """Say what is in files: every array, and what its elements look like.

    Parameters
    ----------
    paths : path, pattern, or sequence of them
        Files as `score_files` takes them, of logits or targets or both.
    full : bool, default False
        Read arrays whole. Default: those up to 64 MiB; of larger ones blocks of rows, evenly spread.
    dtype : {"bfloat16"}, optional
        16-bit integers are the bits of bfloat16.
    num_threads, backend
        As in `cross_entropy`, for the estimate of what scoring would take.

    Returns
    -------
    list of Inspection
        In the order of the files, and of the arrays in each.

    Raises
    ------
    InputError
        If a file cannot be read or is malformed; names the file. A subclass of ValueError.
    ValueError, BackendUnavailable
        If an option is wrong, or the backend cannot run here.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, fastce
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(pathlib.Path(folder) / "x.npy", fastce.log_softmax(np.eye(4, 3)))
    ...     (found,) = fastce.inspect_files(pathlib.Path(folder) / "x.npy")
    >>> found.looks_like
    'looks like log-probabilities, 4 rows of 3 columns'
    """
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads: expected at least 1, got {num_threads}")
    sources = find_all(paths, bfloat16=asks_for_bfloat16(dtype))
    found = [_inspect(source, full, num_threads, backend) for source in sources]
    floats = [(one.label, one.floats) for one in found if one.floats and one.floats.classes > 1]
    return [_with_fits(one, floats) if one.integers is not None else one for one in found]


def _inspect(source: Source, full: bool, num_threads: int | None, backend: str | None) -> Inspection:
    floats = integers = None
    looks_like = f"holds {source.dtype_name}, which is neither logits nor targets"
    if source.bfloat16 or source.dtype.kind == "f":
        floats = _floats(source, full, num_threads, backend)
        looks_like = _floats_sentence(floats)
    elif source.dtype.kind in "iub":
        integers = _integers(source, full)
        looks_like = _integers_sentence(source, integers)
    return Inspection(
        path=str(source.path),
        name=source.name,
        format=source.format,
        shape=source.shape,
        dtype=source.dtype_name,
        file_bytes=source.n_bytes,
        kind=source.kind,
        note=source.note,
        looks_like=looks_like,
        floats=floats,
        integers=integers,
    )


def _read(
    source: Source, row_shape: tuple[int, ...], n_rows: int, full: bool
) -> Iterator[tuple[NDArray[Any], float]]:
    """Yield blocks of rows, all or evenly spread ones, in the same memory; and what reading took."""
    row_bytes = max(1, math.prod(row_shape) * source.dtype.itemsize)
    step = max(1, min(n_rows, _BLOCK_BYTES // row_bytes))
    firsts = list(range(0, n_rows, step))
    if not full and n_rows * row_bytes > SAMPLE_BYTES:
        n_blocks = max(1, SAMPLE_BYTES // (step * row_bytes))
        firsts = np.linspace(0, n_rows - step, n_blocks, dtype=np.int64).tolist()
    block = np.empty((step, *row_shape), source.dtype)
    with open_source(source) as reader:
        for first in firsts:
            rows = block[: min(step, n_rows - first)]
            started = time.perf_counter()
            reader.read_into(first, rows)
            yield rows, time.perf_counter() - started


def _floats(source: Source, full: bool, num_threads: int | None, backend: str | None) -> Floats:
    n_rows, n_classes = math.prod(source.shape[:-1]), source.shape[-1] if source.shape else 1
    flat = len(source.shape) < 2  # not logits: a number for each row
    if flat:
        n_rows, n_classes = math.prod(source.shape), 1
    row_shape = () if flat else (n_classes,)
    rows_read = nan = posinf = neginf = 0
    low, high, read_seconds = math.inf, -math.inf, 0.0
    used, first, sample = np.zeros(n_classes, bool), None, np.empty((0, n_classes))
    rehearsed = None
    for rows, seconds in _read(source, row_shape, n_rows if n_classes else 0, full):
        rows_read, read_seconds = rows_read + len(rows), read_seconds + seconds
        x = _as_numbers(source, rows.reshape(-1, n_classes))
        finite = np.isfinite(x)
        if not finite.all():
            nan += int(np.isnan(x).sum())
            posinf += int(np.isposinf(x).sum())
            neginf += int(np.isneginf(x).sum())
        if finite.any():
            low = min(low, float(x.min(where=finite, initial=np.inf)))
            high = max(high, float(x.max(where=finite, initial=-np.inf)))
        if first is None:
            first, sample = x[0].copy(), x[:SAMPLE_ROWS].astype(np.float64)
            if not flat:
                rehearsed = _rehearse(source, rows, num_threads, backend)
        used |= used_columns(x, first)
    estimate = None
    if rehearsed is not None:
        per_row = max(rehearsed[0], read_seconds / rows_read)
        estimate = Estimate(n_rows * per_row, _memory(source, n_rows, n_classes), rehearsed[1])
    return Floats(
        rows=n_rows,
        classes=n_classes,
        rows_read=rows_read,
        nan=nan,
        posinf=posinf,
        neginf=neginf,
        minimum=None if low == math.inf else low,
        maximum=None if high == -math.inf else high,
        looks_like=_guess(sample),
        unused=unused_tail(used) if rows_read > 1 else 0,
        estimate=estimate,
    )


def _guess(sample: NDArray[np.float64]) -> Kind:
    sample = sample[~np.isnan(sample).any(axis=1)]
    return guess_kind(sample) if sample.shape[1] > 1 and len(sample) else "logits"


def _as_numbers(source: Source, rows: NDArray[Any]) -> NDArray[Any]:
    x = source.numbers(rows)
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)


def _rehearse(
    source: Source, rows: NDArray[Any], num_threads: int | None, backend: str | None
) -> tuple[float, str]:
    """Return the seconds that scoring a row takes here, and the backend that does it."""
    chosen = registry.choose(backend, source.dtype_name)
    targets, options = np.zeros(len(rows), np.int64), Options()
    dtype = "bfloat16" if source.bfloat16 else None

    def seconds() -> float:
        started = time.perf_counter()
        stats = score_rows(rows, targets, options, dtype, num_threads, chosen.name)
        Tally(options.top_k, options.n_bins).add(stats, targets == 0)
        return time.perf_counter() - started

    seconds()  # the first call may compile
    best, ends = seconds(), time.perf_counter() + _REHEARSAL_SECONDS
    while time.perf_counter() < ends:
        best = min(best, seconds())
    return best / len(rows), chosen.name


def _memory(source: Source, n_rows: int, n_classes: int) -> int:
    row_bytes = n_classes * source.dtype.itemsize
    block_rows = max(1, min(_SCORING_BYTES // 2 // row_bytes, n_rows))
    return block_rows * (2 * row_bytes + _BYTES_PER_ROW)


def _integers(source: Source, full: bool) -> Integers:
    size = math.prod(source.shape)
    size_read = ignored = 0
    low: int | None = None
    high: int | None = None
    distinct = np.empty(0, source.dtype)
    for block, _ in _read(source, (), size, full):
        size_read += len(block)
        ids = block
        if np.issubdtype(source.dtype, np.signedinteger):
            ids = block[block != -100]
            ignored += len(block) - len(ids)
        if len(ids):
            low = min(int(ids.min()), int(ids.min()) if low is None else low)
            high = max(int(ids.max()), int(ids.max()) if high is None else high)
        if len(distinct) < MAX_DISTINCT:
            distinct = np.union1d(distinct, ids)
    return Integers(size, size_read, low, high, min(len(distinct), MAX_DISTINCT), ignored, ())


def _with_fits(one: Inspection, floats: list[tuple[str, Floats]]) -> Inspection:
    """Say of an array of integers how it goes with arrays of floats, each or all together."""
    integers = one.integers
    assert integers is not None
    rows = sum(each.rows for _, each in floats)
    if len(floats) > 1 and integers.size == rows and len({each.classes for _, each in floats}) == 1:
        floats = [(f"the {len(floats)} arrays of logits together", replace(floats[0][1], rows=rows))]
    fits = tuple(_fit(integers, label, each) for label, each in floats)
    return replace(one, integers=replace(integers, fits=fits))


def _fit(integers: Integers, label: str, floats: Floats) -> str:
    if integers.size != floats.rows:
        return f"does not fit {label}: {integers.size:,} ids for {floats.rows:,} rows"
    if integers.minimum is not None and integers.minimum < 0:
        return f"does not fit {label}: id {integers.minimum} is below 0 and not -100"
    if integers.maximum is not None and integers.maximum >= floats.classes:
        return f"does not fit {label}: id {integers.maximum} is outside [0, {floats.classes})"
    seen = " as far as it was read" if integers.size_read < integers.size else ""
    return f"fits {label}{seen}"


def _floats_sentence(floats: Floats) -> str:
    if floats.classes == 1:
        return f"holds one number for each of {floats.rows:,} rows"
    kind = {"logits": "logits", "logprobs": "log-probabilities", "probs": "probabilities"}
    text = f"looks like {kind[floats.looks_like]}, {floats.rows:,} rows of {floats.classes:,} columns"
    if not floats.rows_read:
        text = f"is empty: {floats.rows:,} rows of {floats.classes:,} columns"
    if floats.unused == 1:
        text += ", the last one never used"
    elif floats.unused:
        text += f", the last {floats.unused:,} never used"
    return text


def _integers_sentence(source: Source, integers: Integers) -> str:
    if integers.minimum is None or integers.maximum is None:
        return f"holds {integers.size:,} integers" + (", all of them -100" if integers.ignored else "")
    if source.dtype.kind == "b" or (integers.minimum >= 0 and integers.maximum <= 1):
        return f"looks like a mask, or targets of two classes, for {integers.size:,} rows"
    return (
        f"looks like targets for {integers.size:,} rows, of at least {integers.maximum + 1:,} classes"
    )
