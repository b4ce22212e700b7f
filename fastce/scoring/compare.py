"""The loop over two dumps of the same rows: read blocks of both, compare, keep each row's values."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce import registry
from fastce.activations import log_softmax
from fastce.info import kl_divergence_from_logits
from fastce.scoring import comparison, llama
from fastce.scoring.comparison import Comparison, RowValues, WorstRow
from fastce.scoring.figures import Run
from fastce.scoring.formats import InputError, Paths, Source, open_source, own_targets
from fastce.scoring.records import input_of
from fastce.scoring.runner import versions
from fastce.scoring.scorer import kept_rows
from fastce.scoring.shards import Shard, find_logits, find_shards
from fastce.stats import row_stats

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class CompareProgress:
    """How far a comparison is."""

    rows_done: int
    rows_total: int
    row_bytes: int  #: of logits, both dumps together
    mean_kl: float  #: of the rows so far; NaN before the first kept one


@dataclass(frozen=True, slots=True)
class _Options:
    ignore_index: int | None
    num_threads: int | None
    backend: str | None
    llama_compat: bool


@dataclass(frozen=True, slots=True)
class _Dump:
    """The rows of several files as one."""

    sources: list[Source]
    n_classes: int  #: to read of each row, which may hold more

    @property
    def n_rows(self) -> int:
        return sum(map(_n_rows, self.sources))

    @property
    def logprobs(self) -> bool:
        return self.sources[0].kind == "logprobs"

    @property
    def row_bytes(self) -> int:
        return self.sources[0].shape[-1] * self.sources[0].dtype.itemsize

    @property
    def name(self) -> str:
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return f"{self.sources[0].label}{more}"

    def blocks(self, n_rows: int) -> Iterator[NDArray[Any]]:
        """Yield blocks of so many rows, however the files are cut, in the same memory; at least one."""
        block = np.empty((n_rows, self.sources[0].shape[-1]), self.sources[0].dtype)
        filled = 0
        for source in self.sources:
            with open_source(source) as reader:
                row, end = 0, _n_rows(source)
                while row < end:
                    n = min(n_rows - filled, end - row)
                    reader.read_into(row, block[filled : filled + n])
                    row, filled = row + n, filled + n
                    if filled == n_rows:
                        yield self._as_numbers(block)
                        filled = 0
        if filled or not self.n_rows:
            yield self._as_numbers(block[:filled])

    def _as_numbers(self, block: NDArray[Any]) -> NDArray[Any]:
        return self.sources[0].numbers(block)[:, : self.n_classes]


def compare_files(
    base: Paths,
    other: Paths,
    targets: Paths | None = None,
    *,
    ignore_index: int | None = -100,
    vocab: int | None = None,
    worst: int = 10,
    llama_compat: bool = False,
    block_mib: int = 64,
    num_threads: int | None = None,
    backend: str | None = None,
    progress: Callable[[CompareProgress], None] | None = None,
) -> Comparison:
    """Compare two dumps of logits of the same rows: perplexities, KL divergences, probabilities.

    Parameters
    ----------
    base, other : path, pattern, or sequence of them
        Files of logits as `score_files` takes them: the reference, and what is held against it. They
        may be of different dtypes, and cut into files differently.
    targets : path, pattern, or sequence of them, optional
        Integer class ids: one file for all of base's rows in order, or one for each of base's files.
        Default: those that base's files hold themselves, as `.kld` files do; else what needs targets
        is left out, and no row is.
    ignore_index : int or None, default -100
        Rows with this target are left out of every figure.
    vocab : int, optional
        Compare the first so many classes, where a dump has more than the vocabulary.
    worst : int, default 10
        How many of the rows of the largest divergence to name.
    llama_compat : bool, default False
        Compute what llama.cpp's table holds as llama.cpp does, to the same digits, at the cost of
        accuracy and speed. Needs targets.
    block_mib : int, default 64
        Size of the blocks of both dumps read at a time, in MiB; it changes no figure.
    num_threads, backend
        As in `cross_entropy`.
    progress : callable, optional
        Called with a `CompareProgress` after each block.

    Returns
    -------
    Comparison
        llama.cpp's whole table, the divergence in the other direction and by confidence, the worst
        rows; and how they were computed.

    Raises
    ------
    InputError
        If a file is missing, malformed or of the wrong shape, holds a target outside [0, n_classes), or
        the dumps differ in rows or classes; names the file. A subclass of ValueError.
    ValueError
        If an option is wrong.
    BackendUnavailable
        If the backend asked for cannot run here.

    Notes
    -----
    Quantiles need the values of all rows: besides the blocks, up to about 50 bytes a row are kept in
    memory, and as many again while the figures are computed.

    Log-probabilities, where a format says that it holds them, are taken as they are for losses, and as
    logits for everything else.

    Neither the block size, nor the number of threads, nor how the rows are cut into files changes a bit
    of the figures.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, fastce
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dump = pathlib.Path(folder)
    ...     np.save(dump / "base.npy", np.array([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]]))
    ...     np.save(dump / "other.npy", np.array([[2.0, 1.0, 0.2], [0.5, 0.2, 0.3]]))
    ...     comparison = fastce.compare_files(dump / "base.npy", dump / "other.npy")
    >>> comparison.same_top.value, comparison.worst[0].row
    (0.5, 1)
    """
    _check_options(vocab, worst, block_mib)
    sources = find_logits(base)
    known = targets is not None or (sources and all(own_targets(source) for source in sources))
    shards = find_shards(base, targets) if known else []
    if llama_compat and not shards:
        raise ValueError("targets: llama_compat needs them, and none were given")
    dumps = _dumps(sources, find_logits(other), vocab)
    chosen = [registry.choose(backend, _computed_dtype(dump)) for dump in dumps]
    for each in chosen:
        registry.load(each)  # now, so that importing it does not count as comparing
    y = _read_targets(shards, dumps[0].n_classes, ignore_index) if shards else None
    options = _Options(ignore_index, num_threads, backend, llama_compat)
    started = time.perf_counter()
    rows = _compare_rows(dumps, y, options, block_mib * _MIB, progress)
    seconds = time.perf_counter() - started
    n_rows = dumps[0].n_rows
    n_read = sum(source.n_bytes for dump in dumps for source in dump.sources)
    table = llama.table(rows) if llama_compat else comparison.table(rows)
    reverse = rows.kl_reverse
    return Comparison(
        rows=n_rows,
        ignored=n_rows - len(rows.kl),
        nonfinite=int(np.count_nonzero(rows.nonfinite())),
        **table._asdict(),
        kl_reverse=None if reverse is None else comparison.mean_of(reverse),
        buckets=comparison.buckets(rows),
        worst=_worst(rows, worst, dumps[0], y, ignore_index),
        llama_compat=llama_compat,
        base=tuple(map(input_of, dumps[0].sources)),
        other=tuple(map(input_of, dumps[1].sources)),
        targets=tuple(map(input_of, dict.fromkeys(shard.targets for shard in shards))),
        run=Run(
            backend=chosen[0].name,
            isa=chosen[0].isa,
            seconds=seconds,
            rows_per_second=n_rows / seconds,
            bytes_per_second=n_read / seconds,
            versions=versions(),
        ),
    )


def _check_options(vocab: int | None, worst: int, block_mib: int) -> None:
    for name, value, least in (("vocab", vocab, 1), ("worst", worst, 0), ("block_mib", block_mib, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def _n_rows(source: Source) -> int:
    return math.prod(source.shape[:-1])


def _computed_dtype(dump: _Dump) -> str:
    return "float32" if dump.sources[0].bfloat16 else dump.sources[0].dtype_name


def _dumps(base: list[Source], other: list[Source], vocab: int | None) -> tuple[_Dump, _Dump]:
    """Check that both hold the same rows and classes."""
    for name, sources in (("base", base), ("other", other)):
        if not sources:
            raise ValueError(f"{name}: expected at least one file, got none")
        for source in sources:
            _check_kind(source, sources[0])
            if vocab is not None and source.shape[-1] < vocab:
                raise InputError(
                    f"{source.label}: expected at least {vocab} classes, as vocab says; "
                    f"got {source.shape[-1]}"
                )
    p, q = (_Dump(sources, vocab or sources[0].shape[-1]) for sources in (base, other))
    if q.n_rows != p.n_rows:
        raise InputError(
            f"{q.name}: expected {p.n_rows} rows as in {p.name}, got {q.n_rows}; "
            "compare dumps of the same rows"
        )
    if q.n_classes != p.n_classes:
        raise InputError(
            f"{q.name}: expected {p.n_classes} classes as in {p.name}, got {q.n_classes}; "
            "if the larger one is padded, set vocab to the number of classes in use"
        )
    return p, q


def _check_kind(source: Source, first: Source) -> None:
    if source.kind == "probs":
        raise InputError(
            f"{source.label}: expected logits or log-probabilities, got probabilities; "
            "save their logarithms"
        )
    if source.kind != first.kind:
        raise InputError(
            f"{source.label}: expected {first.kind or 'logits'} as in {first.label}, "
            f"got {source.kind or 'logits'}; compare them apart"
        )


def _read_targets(shards: list[Shard], n_classes: int, ignore_index: int | None) -> NDArray[np.int64]:
    """Read all targets; they must be classes that are compared."""
    parts = [np.empty(0, np.int64)]
    for shard in shards:
        y = np.empty(shard.n_rows, shard.targets.dtype)
        with open_source(shard.targets) as reader:
            reader.read_into(shard.first_target, y)
        bad = kept_rows(y, ignore_index) & ((y < 0) | (y >= n_classes))
        if bad.any():
            i = int(bad.argmax())
            raise InputError(
                f"{shard.targets.label}: row {shard.first_target + i} = {int(y[i])} is outside "
                f"[0, {n_classes}) (row {i} of {shard.logits.label}); "
                f"if it is padding, set the ignore index to {int(y[i])}"
            )
        parts.append(y.astype(np.int64))
    return np.concatenate(parts)


def _compare_rows(
    dumps: tuple[_Dump, _Dump],
    y: NDArray[np.int64] | None,
    options: _Options,
    block_bytes: int,
    progress: Callable[[CompareProgress], None] | None,
) -> RowValues:
    row_bytes = sum(dump.row_bytes for dump in dumps)
    n_rows = dumps[0].n_rows
    n_block = max(1, min(block_bytes // row_bytes, n_rows))
    parts: list[RowValues] = []
    row, n_kept, kl_sum = 0, 0, 0.0
    for p, q in zip(*(dump.blocks(n_block) for dump in dumps), strict=True):
        part = _row_values(dumps, p, q, None if y is None else y[row : row + len(p)], options)
        parts.append(part)
        row, n_kept, kl_sum = (
            row + len(p),
            n_kept + len(part.kl),
            kl_sum + float(part.kl.sum(dtype=np.float64)),
        )
        if progress is not None and n_rows:
            mean = kl_sum / n_kept if n_kept else math.nan
            progress(CompareProgress(row, n_rows, row_bytes, mean))
    return comparison.joined(parts)


def _row_values(
    dumps: tuple[_Dump, _Dump],
    p: NDArray[Any],
    q: NDArray[Any],
    y: NDArray[np.int64] | None,
    options: _Options,
) -> RowValues:
    if y is not None:
        kept = kept_rows(y, options.ignore_index)
        if not kept.all():
            p, q, y = p[kept], q[kept], y[kept]
    kernels: dict[str, Any] = {"num_threads": options.num_threads, "backend": options.backend}
    if options.llama_compat:
        assert y is not None
        return _llama_row_values(dumps[0], p, q, y, kernels)
    top_p, loss_p, confidence = _stats(dumps[0], p, y, kernels)
    top_q, loss_q, _ = _stats(dumps[1], q, y, kernels)
    return RowValues(
        kl=kl_divergence_from_logits(p, q, base=None, **kernels),
        same_top=(top_p == top_q) & (top_p >= 0),
        loss_base=loss_p,
        loss_other=loss_q,
        kl_reverse=kl_divergence_from_logits(q, p, base=None, **kernels),
        confidence=confidence,
    )


def _stats(
    dump: _Dump, x: NDArray[Any], y: NDArray[np.int64] | None, kernels: dict[str, Any]
) -> tuple[NDArray[np.int64], NDArray[Any] | None, NDArray[Any]]:
    """Return the class of the largest logit, the loss and the largest probability of each row."""
    wanted = ["argmax", "max_prob", *([] if y is None or dump.logprobs else ["loss"])]
    stats = row_stats(x, y, ignore_index=None, outputs=wanted, **kernels)
    assert stats.argmax is not None
    assert stats.max_prob is not None
    loss = stats.loss if y is None or not dump.logprobs else -_at(x, y)
    return stats.argmax, loss, stats.max_prob


def _at(x: NDArray[Any], y: NDArray[np.int64]) -> NDArray[Any]:
    taken = np.take_along_axis(x, y[:, None], axis=1)[:, 0]
    return taken.astype(np.float64 if taken.itemsize == 8 else np.float32)


def _llama_row_values(
    dump: _Dump, p: NDArray[Any], q: NDArray[Any], y: NDArray[np.int64], kernels: dict[str, Any]
) -> RowValues:
    logprobs = p.astype(np.float32)
    if not dump.logprobs:
        log_softmax(logprobs, out=logprobs, **kernels)
    return llama.row_values(logprobs, q.astype(np.float32), y)


def _worst(
    rows: RowValues, n: int, base: _Dump, y: NDArray[np.int64] | None, ignore_index: int | None
) -> tuple[WorstRow, ...]:
    numbers = np.arange(base.n_rows) if y is None else np.flatnonzero(kept_rows(y, ignore_index))
    first_rows = list(accumulate(map(_n_rows, base.sources), initial=0))
    found = []
    for i in comparison.worst_first(rows, n):
        row = int(numbers[i])
        file = bisect_right(first_rows, row) - 1
        found.append(
            WorstRow(
                path=str(base.sources[file].path),
                row=row - first_rows[file],
                target=None if y is None else int(y[row]),
                kl=float(rows.kl[i]),
                loss_base=None if rows.loss_base is None else float(rows.loss_base[i]),
                loss_other=None if rows.loss_other is None else float(rows.loss_other[i]),
            )
        )
    return tuple(found)
