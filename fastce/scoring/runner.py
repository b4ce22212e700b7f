"""The loop over blocks: read, score, add up, write."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce import __version__, registry
from fastce.scoring.atomic import atomic_file
from fastce.scoring.figures import Figures, Input, Run, Tally
from fastce.scoring.formats import InputError, Paths, Source, open_source
from fastce.scoring.formats.npy import NpyWriter
from fastce.scoring.shards import Shard, find_shards
from fastce.stats import row_stats

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    rows_done: int
    rows_total: int
    row_bytes: int  #: of logits
    mean_nll: float  #: of the rows so far; NaN before the first kept one


@dataclass(frozen=True, slots=True)
class _Options:
    ignore_index: int | None
    num_threads: int | None
    backend: str


def score_files(
    logits: Paths,
    targets: Paths,
    *,
    ignore_index: int | None = -100,
    top_k: Sequence[int] = (1, 5),
    n_bytes: int | None = None,
    out: str | os.PathLike[str] | None = None,
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
        shape (n_rows, n_classes) or with two leading axes, whose rows are then taken in order. The
        files a pattern matches are taken in natural order: logits-2 before logits-10. Files are
        `.npy`, `.npz`, `.safetensors`, llama.cpp's `.kld`, Arrow, Parquet, HDF5, Zarr or torch's;
        ``FILE::NAME`` is one array of a file.
    targets : path, pattern, or sequence of them
        Files of integer class ids: one for all the logits files' rows in order, or one for each
        logits file; flat, or of the logits' leading axes.
    ignore_index : int or None, default -100
        Rows with this target are not scored.
    top_k : sequence of int, default (1, 5)
        The k of the top-k accuracies.
    n_bytes : int, optional
        Bytes of text the kept rows stand for, for ``bits_per_byte``.
    out : path, optional
        Folder for ``<stem>.loss.npy``, the rows' losses, for each logits file, and ``figures.json``;
        made if it is missing. A file appears there complete or not at all.
    block_mib : int, default 64
        Size of the block read at a time, in MiB; it bounds the memory used and changes no figure.
    num_threads, backend
        As in `cross_entropy`.
    progress : callable, optional
        Called with a `Progress` after each block.

    Returns
    -------
    Figures
        Counts, sums, mean with standard error, perplexity, accuracies; and how they were computed.

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
        If ``out`` cannot be written.

    Notes
    -----
    float16 logits are widened to float32 in registers, which is exact. Sums are correctly rounded
    over fixed chunks of rows, so neither the block size nor the number of threads changes a bit of the
    result.

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
    _check_options(top_k, n_bytes, block_mib)
    shards = find_shards(logits, targets)
    folder = None if out is None else _output_folder(Path(out), shards)
    chosen = registry.choose(backend, shards[0].logits.dtype_name)
    options = _Options(ignore_index, num_threads, chosen.name)
    registry.load(chosen)  # now, so that importing it does not count as scoring
    tally = Tally(top_k)
    started = time.perf_counter()
    _score_shards(shards, tally, options, block_mib * _MIB, folder, progress)
    seconds = time.perf_counter() - started
    n_read = sum(shard.logits.n_bytes for shard in shards)
    run = Run(
        backend=chosen.name,
        isa=chosen.isa,
        seconds=seconds,
        rows_per_second=tally.rows / seconds,
        bytes_per_second=n_read / seconds,
        versions=_versions(),
    )
    figures = tally.figures(
        n_bytes=n_bytes,
        logits=tuple(_input(shard.logits) for shard in shards),
        targets=tuple(_input(npy) for npy in dict.fromkeys(shard.targets for shard in shards)),
        run=run,
    )
    if folder is not None:
        with atomic_file(folder / "figures.json") as file:
            file.write(json.dumps(figures.as_dict(), indent=2, allow_nan=False).encode() + b"\n")
    return figures


def _check_options(top_k: Sequence[int], n_bytes: int | None, block_mib: int) -> None:
    if any(k < 1 for k in top_k):
        raise ValueError(f"top_k: expected whole numbers of at least 1, got {list(top_k)}")
    for name, value in (("n_bytes", n_bytes), ("block_mib", block_mib)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _output_folder(folder: Path, shards: list[Shard]) -> Path:
    seen: dict[str, Path] = {}
    for path in (shard.logits.path for shard in shards):
        if path.stem in seen:
            raise ValueError(
                f"out: expected logits files of different names, got {seen[path.stem]} and {path}; "
                "score them into different folders"
            )
        seen[path.stem] = path
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _score_shards(
    shards: list[Shard],
    tally: Tally,
    options: _Options,
    block_bytes: int,
    folder: Path | None,
    progress: Callable[[Progress], None] | None,
) -> None:
    blocks = _Blocks(block_bytes, shards)
    rows_total = sum(shard.n_rows for shard in shards)
    row_bytes = shards[0].n_classes * shards[0].logits.dtype.itemsize
    for shard in shards:
        with _loss_writer(folder, shard) as writer:
            for row, x, y in blocks.of(shard):
                loss, rank = _score(shard, row, x, y, options)
                tally.add(loss, rank, _kept(y, options.ignore_index))
                if writer is not None:
                    writer.write(loss)
                if progress is not None:
                    progress(Progress(tally.rows, rows_total, row_bytes, tally.running_mean))
        tally.end_file()


class _Blocks:
    """The blocks of rows of shards, one after another in the same memory."""

    def __init__(self, block_bytes: int, shards: list[Shard]) -> None:
        n_classes, dtype = shards[0].n_classes, shards[0].logits.dtype
        n_rows = min(block_bytes // (n_classes * dtype.itemsize), max(s.n_rows for s in shards))
        self._x = np.empty((max(1, n_rows), n_classes), dtype)

    def of(self, shard: Shard) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        """Yield the first row of each block, its logits and its targets."""
        y = np.empty(len(self._x), shard.targets.dtype)
        with (
            open_source(shard.logits) as logits,
            open_source(shard.targets) as targets,
        ):
            for row in range(0, shard.n_rows, len(y)):
                n = min(len(y), shard.n_rows - row)
                logits.read_into(row, self._x[:n])
                targets.read_into(shard.first_target + row, y[:n])
                yield row, self._x[:n], y[:n]


def _score(
    shard: Shard, row: int, x: NDArray[Any], y: NDArray[Any], options: _Options
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    try:
        stats = row_stats(
            x,
            y,
            ignore_index=options.ignore_index,
            dtype="bfloat16" if shard.logits.bfloat16 else None,
            num_threads=options.num_threads,
            backend=options.backend,
        )
    except IndexError as error:
        outside = (y < 0) | (y >= shard.n_classes)
        i = int((outside & _kept(y, options.ignore_index)).argmax())
        raise InputError(
            f"{shard.targets.path}: row {shard.first_target + row + i} = {int(y[i])} is outside "
            f"[0, {shard.n_classes}) (row {row + i} of {shard.logits.path}); "
            f"if it is padding, set the ignore index to {int(y[i])}"
        ) from error
    assert stats.loss is not None
    assert stats.rank is not None
    return stats.loss, stats.rank


def _kept(y: NDArray[Any], ignore_index: int | None) -> NDArray[np.bool_]:
    return np.ones(len(y), bool) if ignore_index is None else y != ignore_index


@contextmanager
def _loss_writer(folder: Path | None, shard: Shard) -> Iterator[NpyWriter | None]:
    if folder is None:
        yield None
        return
    with atomic_file(folder / f"{shard.logits.path.stem}.loss.npy") as file:
        yield NpyWriter(file, shard.logits.shape[:-1], shard.loss_dtype)


def _input(npy: Source) -> Input:
    return Input(str(npy.path), npy.shape, npy.dtype_name, npy.n_bytes)


def _versions() -> dict[str, str]:
    return {
        "fastce": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
