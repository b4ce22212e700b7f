"""A run: what is to be done, the loop over parts and blocks, here or on an executor's workers."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastce import __version__, registry, threads
from fastce.scoring import records
from fastce.scoring.checks import SAMPLE_ROWS, looks_wrong
from fastce.scoring.figures import Figures, Run, Tally
from fastce.scoring.formats import InputError, Kind, Paths, Reader, asks_for_bfloat16, open_source
from fastce.scoring.formats.npy import NpyWriter
from fastce.scoring.records import Folder
from fastce.scoring.scorer import (
    Options,
    Sequences,
    kept_rows,
    masked,
    positions_of,
    score_rows,
    scored_options,
)
from fastce.scoring.shards import Part, Shard, cut, find_sequences, find_shards

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    rows_done: int  #: with those of earlier runs
    rows_before: int  #: those of earlier runs
    rows_total: int
    row_bytes: int  #: of logits
    mean_nll: float  #: of the rows so far; NaN before the first kept one
    standard_error: float  #: of it


@dataclass(frozen=True, slots=True)
class Settings:
    """How parts are scored; none of it changes a figure but for the backend."""

    backend: str
    isa: str | None
    num_threads: int
    block_bytes: int


def score_files(
    logits: Paths,
    targets: Paths | None = None,
    *,
    mask: Paths | None = None,
    ignore_index: int | None = -100,
    kind: Kind | None = None,
    vocab: int | None = None,
    temperature: float = 1.0,
    dtype: str | None = None,
    seq_len: int | None = None,
    lengths: Paths | None = None,
    shift: bool = False,
    top_k: Sequence[int] = (1, 5),
    n_bins: int = 15,
    n_bytes: int | None = None,
    n_words: int | None = None,
    out: str | os.PathLike[str] | None = None,
    loss_format: Literal["npy", "parquet"] = "npy",
    hash_inputs: bool = False,
    resume: bool = True,
    shard: tuple[int, int] | None = None,
    executor: Executor | None = None,
    block_mib: int = 64,
    num_threads: int | None = None,
    backend: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Figures:
    """Score files of logits against files of targets, a block of rows at a time.

    Parameters
    ----------
    logits : path, pattern, or sequence of them
        Arrays of float16, bfloat16, float32 or float64, all of one dtype and number of classes, of
        shape (n_rows, n_classes) or with two leading axes, whose rows are then taken in order. Files a
        pattern matches are taken in natural order: logits-2 before logits-10. ``FILE::NAME`` is one
        array of a file that has several. Formats: see the README.
    targets : path, pattern, or sequence of them, optional
        Arrays of integer class ids: one for all the logits files' rows in order, or one for each logits
        file; flat, or of the logits' leading axes. Default: those in the same file, as a
        ``.kld`` file has them.
    mask : path, pattern, or sequence of them, optional
        As targets, of integers or bool: rows where it is 0 are not scored.
    ignore_index : int or None, default -100
        Rows with this target are not scored.
    kind : {"logits", "logprobs", "probs"}, optional
        What the numbers are. Default: what the format says, else logits. See `Scorer`.
    vocab : int, optional
        Use the first so many classes alone: a padded vocabulary.
    temperature : float, default 1
        Logits are divided by it.
    dtype : {"bfloat16"}, optional
        16-bit integers are the bits of bfloat16.
    seq_len : int, optional
        Rows of a sequence. Default: the middle axis of three.
    lengths : path, pattern, or sequence of them, optional
        Rows of each sequence, in order, where these differ.
    shift : bool, default False
        The target of a row is that of the next row: logits that predict the next token, beside the
        tokens themselves. The last row of a sequence is not scored. A file is one sequence if nothing
        else is said.
    top_k, n_bins
        As in `Scorer`.
    n_bytes, n_words : int, optional
        Bytes and words of text the kept rows stand for, for figures per byte and word.
    out : path, optional
        Folder for ``<stem>.loss.npy``, the rows' losses, for each logits file, and ``figures.json``;
        made if it is missing. A file appears there complete or not at all.
    loss_format : {"npy", "parquet"}, default "npy"
        How the losses are written; Parquet has them in a column ``loss``.
    hash_inputs : bool, default False
        Compute the SHA-256 of each input, which reads it once more, for ``figures.logits`` and
        ``figures.targets``.
    resume : bool, default True
        Take the parts that an earlier run left in ``out`` as done, if it scored the same files with
        the same options, backend and versions of fastce, NumPy and Python.
    shard : (int, int), optional
        (i, n): score the i-th of n shares of the parts, counted from 1, and leave the rest; needs
        ``out``. `merge` makes the figures of all. The figures returned are those of the share.
    executor : concurrent.futures.Executor, optional
        Scores the parts on its workers, which must see the files by the same paths. Default: here.
    block_mib : int, default 64
        MiB of logits in memory at a time; bounds the memory used and changes no figure.
    num_threads, backend
        As in `cross_entropy`; with an executor, whose slots are the parallelism, 1 thread by default.
    progress : callable, optional
        Called with a `Progress` after each block; with an executor, after each part.

    Returns
    -------
    Figures
        Counts, sums, mean with standard error, perplexity, accuracies, calibration; and how they were
        computed.

    Raises
    ------
    InputError
        If a file is missing, malformed or of the wrong shape, or holds a target outside
        [0, n_classes); names the file. A subclass of ValueError.
    ValueError
        If an option is wrong.
    BackendUnavailable
        If the backend asked for cannot run here.
    OSError
        If ``out`` cannot be written. What was done before is kept.

    Notes
    -----
    A file is scored in parts of fixed size; each leaves its losses and a record in ``out`` before it
    counts. A run that is killed at any moment is continued by the same call. Half logits are widened
    to float32 in registers, which is exact. Sums are exact, so neither blocks, parts, threads, workers
    nor their order change a bit of the result.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, fastce
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dump = pathlib.Path(folder)
    ...     np.save(dump / "logits.npy", np.array([[2.0, 1.0, 0.1], [0.5, 2.5, 0.3]]))
    ...     np.save(dump / "targets.npy", np.array([0, 2]))
    ...     figures = fastce.score_files(dump / "logits.npy", dump / "targets.npy")
    >>> round(figures.mean_nll, 6), figures.top_k_accuracy
    (1.41854, {1: 0.5, 5: 1.0})
    """
    for name, value in (("n_bytes", n_bytes), ("n_words", n_words)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if loss_format not in ("npy", "parquet"):
        raise ValueError(f"loss_format: expected npy or parquet, got {loss_format!r}")
    if shard is not None and not (out is not None and 1 <= shard[0] <= shard[1]):
        raise ValueError(f"shard: expected (i, n) with 1 <= i <= n, and out; got {shard}, {out}")
    if executor is not None and num_threads is None:
        num_threads = 1  # an executor's slots are the parallelism
    inputs = check_inputs(
        logits,
        targets,
        mask=mask,
        ignore_index=ignore_index,
        kind=kind,
        vocab=vocab,
        temperature=temperature,
        dtype=dtype,
        seq_len=seq_len,
        lengths=lengths,
        shift=shift,
        top_k=top_k,
        n_bins=n_bins,
        block_mib=block_mib,
        num_threads=num_threads,
        backend=backend,
    )
    parts, options, settings = inputs.parts, inputs.options, inputs.settings
    about = {
        "options": options.as_json() | {"shift": shift},
        "n_bytes": n_bytes,
        "n_words": n_words,
        "by": {"backend": settings.backend, "isa": settings.isa, "versions": versions()},
        "warnings": inputs.warnings(),
        "loss_format": loss_format,
        "hash_inputs": hash_inputs,
    }
    started = time.perf_counter()
    folder = None if out is None else Folder(Path(out))
    job = _Job(inputs.shards, parts, options, settings, about, folder)
    job.begin(resume=resume, share=shard)
    job.run(executor, progress)
    seconds = time.perf_counter() - started
    found = [job.found[i] for i in sorted(job.found)]
    figures = records.figures_of(job.plan, found)
    if folder is not None and len(found) == len(parts):
        records.finish(folder, job.plan, found, figures)
    n_new = sum(parts[i].n_rows for i in job.found if i not in job.before)
    return replace(
        figures,
        run=Run(
            backend=settings.backend,
            isa=settings.isa,
            seconds=seconds,
            rows_per_second=n_new / seconds,
            bytes_per_second=n_new * inputs.shards[0].row_bytes / seconds,
            versions=job.plan["by"]["versions"],
        ),
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be scored and how: files checked by their headers, options by themselves."""

    shards: list[Shard]
    parts: list[Part]
    options: Options
    settings: Settings

    def warnings(self) -> list[str]:
        """Return what the formats note, and what looks wrong in the first rows."""
        notes = [f"{s.logits.path}: {s.logits.note}" for s in self.shards if s.logits.note]
        return [*notes, *_look(self.parts, self.options)]


def check_inputs(
    logits: Paths,
    targets: Paths | None,
    *,
    mask: Paths | None,
    ignore_index: int | None,
    kind: Kind | None,
    vocab: int | None,
    temperature: float,
    dtype: str | None,
    seq_len: int | None,
    lengths: Paths | None,
    shift: bool,
    top_k: Sequence[int],
    n_bins: int,
    block_mib: int,
    num_threads: int | None,
    backend: str | None,
) -> Inputs:
    """Check what `score_files` was given, before any row is read."""
    for name, value in (("block_mib", block_mib), ("num_threads", num_threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    shards = find_shards(logits, targets, mask, bfloat16=asks_for_bfloat16(dtype))
    options = Options(
        ignore_index,
        kind or shards[0].logits.kind or "logits",
        vocab,
        float(temperature),
        tuple(top_k),
        n_bins,
    )
    if vocab is not None and vocab > shards[0].n_classes:
        raise ValueError(f"vocab: expected at most {shards[0].n_classes} classes, got {vocab}")
    if options.kind == "probs" and shards[0].logits.bfloat16:
        raise InputError(
            f"{shards[0].logits.label}: expected probabilities of float16, float32 or float64, "
            "got bfloat16; convert them"
        )
    chosen = registry.choose(backend, shards[0].logits.dtype_name)
    kernels = registry.load(chosen)  # now, so that importing it does not count as scoring
    n_threads = threads.count(num_threads, kernels.max_threads)
    settings = Settings(chosen.name, chosen.isa, n_threads, block_mib * _MIB)
    starts = find_sequences(shards, seq_len=seq_len, lengths=lengths, shift=shift)
    return Inputs(shards, cut(shards, starts, shift=shift), options, settings)


class _Job:
    """The parts of a run, those that are done, and the loop over the rest."""

    def __init__(
        self,
        shards: list[Shard],
        parts: list[Part],
        options: Options,
        settings: Settings,
        about: dict[str, Any],
        folder: Folder | None,
    ) -> None:
        self.parts = parts
        self.options = options
        self.settings = settings
        self.folder = folder
        self.keys = [part.key(options, about["by"]) for part in parts]
        self.plan = records.make_plan(shards, parts, self.keys, **about)
        self.found: dict[int, dict[str, Any]] = {}  # records, by the number of the part
        self.before: set[int] = set()
        self.todo = list(range(len(parts)))

    def begin(self, *, resume: bool, share: tuple[int, int] | None) -> None:
        """Find what earlier runs have done."""
        if share is not None:
            self.todo = self.todo[share[0] - 1 :: share[1]]
        if self.folder is None:
            return
        self.folder.make()
        self.folder.remove_abandoned()
        self.folder.write_plan(self.plan)
        if resume:
            for i in self.todo:
                record = self.folder.read_record(self._name(i), self.keys[i])
                if record is not None:
                    self.found[i] = record
            self.before = set(self.found)
            self.todo = [i for i in self.todo if i not in self.found]

    def run(self, executor: Executor | None, progress: Callable[[Progress], None] | None) -> None:
        """Score the parts that are left."""
        done = Tally(self.options.top_k, self.options.n_bins)
        for record in self.found.values():
            done.merge(Tally.from_json(record["tally"]))
        before = done.rows
        total = before + sum(self.parts[i].n_rows for i in self.todo)

        def show(part: Tally) -> None:
            if progress is not None:
                rows, row_bytes = done.rows + part.rows, self.parts[0].shard.row_bytes
                progress(Progress(rows, before, total, row_bytes, *done.mean_with(part)))

        nothing = Tally(self.options.top_k, self.options.n_bins)
        if executor is None:
            blocks = Blocks(self.settings, [self.parts[i] for i in self.todo])
            for i in self.todo:
                self.found[i] = score_part(*self._arguments(i), blocks=blocks, on_block=show)
                done.merge(Tally.from_json(self.found[i]["tally"]))
            return
        futures = {executor.submit(score_part, *self._arguments(i)): i for i in self.todo}
        try:
            for future in as_completed(futures):
                record = self.found[futures[future]] = future.result()
                done.merge(Tally.from_json(record["tally"]))
                show(nothing)
        finally:
            for future in futures:
                future.cancel()

    def _name(self, i: int) -> str:
        name: str = self.plan["parts"][i]["name"]
        return name

    def _arguments(self, i: int) -> tuple[Part, Options, Settings, str, str, str | None]:
        folder = None if self.folder is None else str(self.folder.path.absolute())
        return self.parts[i], self.options, self.settings, self._name(i), self.keys[i], folder


def score_part(
    part: Part,
    options: Options,
    settings: Settings,
    name: str,
    key: str,
    folder: str | None,
    *,
    blocks: Blocks | None = None,
    on_block: Callable[[Tally], None] | None = None,
) -> dict[str, Any]:
    """Score a part and return its record, once that is on disk if there is a folder.

    This is what workers run. Doing it twice, at once or after another, changes nothing.
    """
    target = None if folder is None else Folder(Path(folder))
    record = {"name": name, "key": key, "rows": part.n_rows}
    with ExitStack() as stack:
        write = None
        if target is not None:
            target.make()
            file = stack.enter_context(target.losses(name))
            write = NpyWriter(file, (part.n_rows,), part.shard.loss_dtype).write
        tally = tally_part(part, options, settings, blocks=blocks, write=write, on_block=on_block)
    if target is not None:
        record["sha256"] = file.hexdigest()
    record["tally"] = tally.as_json()
    if target is not None:
        target.write_record(name, record)
    return record


def tally_part(
    part: Part,
    options: Options,
    settings: Settings,
    *,
    blocks: Blocks | None = None,
    write: Callable[[NDArray[Any]], None] | None = None,
    on_block: Callable[[Tally], None] | None = None,
) -> Tally:
    """Score the rows of a part, a block at a time; ``write`` gets the losses of each."""
    tally = Tally(options.top_k, options.n_bins)
    sequences = None if part.starts is None else Sequences(part.starts)
    for row, loss, kept, scored in (blocks or Blocks(settings, [part])).scored(part, options):
        tally.merge(scored)
        if sequences is not None:
            sequences.add(row, loss, kept)
        if write is not None:
            write(loss)
        if on_block is not None:
            on_block(tally)
    if sequences is not None:
        tally.add_sequences(sequences.means())
    return tally


_Scored = tuple[int, NDArray[Any], NDArray[np.bool_], Tally]


class Blocks:
    """Blocks of rows, each read and scored by one thread from end to end, in memory used again.

    There is one thread more than cores to compute on: one reads, in order, while the others compute.
    Threads that share a block instead wait for the next one in a loop, at the reader's expense: two
    cores then score 2.0 GB/s of a file in the page cache, and not 3.5.
    """

    def __init__(self, settings: Settings, parts: Sequence[Part]) -> None:
        self._settings = settings
        self._n_threads = settings.num_threads + 1
        if not parts:
            return
        shard = parts[0].shard
        n_rows = max(part.n_rows for part in parts)
        n_bytes = settings.block_bytes // self._n_threads
        n_rows = min(n_bytes // shard.row_bytes, n_rows)
        self._buffers = [
            np.empty((max(1, n_rows), shard.n_classes), shard.logits.dtype)
            for _ in range(self._n_threads)
        ]

    def scored(self, part: Part, options: Options) -> Iterator[_Scored]:
        """Yield for each block, in order, its first row, its losses, which rows are kept, its tally."""
        step = len(self._buffers[0])
        firsts = range(0, part.n_rows, step)
        buffers, waiting = list(self._buffers), iter(firsts)
        reading = Lock()
        with ExitStack() as stack:
            open_rows = stack.enter_context(_Rows(part, options))

            def score() -> _Scored:
                with reading:
                    row, buffer = next(waiting), buffers.pop()
                    x = buffer[: part.n_rows - row]
                    y = open_rows.read(row, x)
                scored = _score(part, row, x, y, options, self._settings)
                buffers.append(buffer)
                return scored

            pool = ThreadPoolExecutor(self._n_threads)
            stack.callback(pool.shutdown, cancel_futures=True)
            futures = deque(pool.submit(score) for _ in firsts[: self._n_threads])
            n_left = len(firsts) - len(futures)
            done: dict[int, _Scored] = {}
            for row in firsts:
                while row not in done:  # which of the threads came to read it is a matter of chance
                    found = futures.popleft().result()
                    done[found[0]] = found
                    if n_left:
                        futures.append(pool.submit(score))
                        n_left -= 1
                yield done.pop(row)


class _Rows(ExitStack):
    """Reads the logits of a part's rows and their targets."""

    def __init__(self, part: Part, options: Options) -> None:
        super().__init__()
        self._part = part
        self._options = options
        self._logits = self.enter_context(open_source(part.shard.logits))
        self._targets = self.enter_context(open_source(part.shard.targets))
        mask = part.shard.mask
        self._mask = None if mask is None else self.enter_context(open_source(mask))

    def read(self, row: int, x: NDArray[Any]) -> NDArray[Any]:
        """Fill an array with rows of the part from one on; return their targets."""
        part, options = self._part, self._options
        self._logits.read_into(part.first_row + row, x)
        return _read_targets(part, options, self._targets, self._mask, row, len(x))


def _read_targets(
    part: Part, options: Options, targets: Reader, mask: Reader | None, row: int, n: int
) -> NDArray[Any]:
    """Return the targets of n rows of a part from one on; those not scored have the ignored id."""
    shard = part.shard
    first_in_shard = part.first_row + row + part.shift
    n_there = min(n, shard.n_rows - first_in_shard)
    y = np.zeros(n, shard.targets.dtype)
    targets.read_into(shard.first_target + first_in_shard, y[:n_there])
    kept = np.ones(n, bool)
    if mask is not None and shard.mask is not None:
        m = np.zeros(n, shard.mask.dtype)
        mask.read_into(shard.first_mask + first_in_shard, m[:n_there])
        kept &= m != 0
    if part.shift and part.starts is not None:
        lasts = np.asarray(part.starts[1:]) - 1 - row
        kept[lasts[(lasts >= 0) & (lasts < n)]] = False
    return y if kept.all() else masked(y, kept, options)


def _score(
    part: Part,
    row: int,
    x: NDArray[Any],
    y: NDArray[Any],
    options: Options,
    settings: Settings,
) -> _Scored:
    """Score a block that starts at a row of the part."""
    shard = part.shard
    options = scored_options(options, masks=shard.mask is not None or part.shift)
    dtype = "bfloat16" if shard.logits.bfloat16 else None
    try:
        stats = score_rows(x, y, options, dtype, 1, settings.backend)
    except IndexError as error:
        n_classes = options.vocab or shard.n_classes
        kept = kept_rows(y, options.ignore_index)
        i = int((((y < 0) | (y >= n_classes)) & kept).argmax())
        at = shard.first_target + part.first_row + row + i + part.shift
        raise InputError(
            f"{shard.targets.label}: row {at} = {int(y[i])} is outside [0, {n_classes}) "
            f"(row {part.first_row + row + i} of {shard.logits.label}); "
            f"if it is padding, set the ignore index to {int(y[i])}"
        ) from error
    except ValueError as error:  # numbers that are no probabilities
        at = part.first_row + row
        raise InputError(f"{shard.logits.label}: rows from {at} on: {error}") from error
    kept = kept_rows(y, options.ignore_index)
    tally = Tally(options.top_k, options.n_bins)
    positions = None if part.starts is None else positions_of(part.starts, row, len(y))
    tally.add(stats, kept, positions)
    return row, stats["loss"], kept, tally


def _look(parts: Sequence[Part], options: Options) -> list[str]:
    """Return what looks wrong in the first rows."""
    if not parts:
        return []
    part = parts[0]
    n_rows = min(part.n_rows, SAMPLE_ROWS)
    first = replace(part, n_rows=n_rows, starts=part.starts and (0, n_rows))
    x = np.empty((n_rows, part.shard.n_classes), part.shard.logits.dtype)
    with _Rows(first, options) as rows:
        y = rows.read(0, x)
    y = np.where(kept_rows(y, options.ignore_index), y.astype(np.int64), -1)
    return looks_wrong(part.shard.logits.numbers(x), y, options)


def versions() -> dict[str, str]:
    """Return the versions that figures may depend on."""
    return {
        "fastce": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
