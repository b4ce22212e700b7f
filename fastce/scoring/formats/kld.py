"""llama.cpp's files of log-probabilities, which ``llama-perplexity --kl-divergence-base`` writes.

The layout, little-endian: ``_logits_``; int32 n_ctx, n_vocab, n_chunk; int32 tokens[n_chunk * n_ctx];
then for each chunk ``n_ctx - 1 - n_ctx // 2`` rows: float32 scale, float32 min_log_prob, uint16
q[n_vocab], and one uint16 more if n_vocab is odd. Log-probabilities are ``scale * q + min_log_prob``.
Row r of chunk c has the label ``tokens[c * n_ctx + n_ctx // 2 + r + 1]``.

The writer of a file puts n_chunk first, so one that was killed leaves a file shorter than it says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import widened
from fastce.scoring.formats.base import FileReader, InputError, Kind, Reader, Source, read_head
from fastce.stats import row_stats

MAGIC = b"_logits_"
_HEAD_BYTES = 20
_INT32_MAX = 2**31 - 1

# Rows are decoded so many bytes at a time, so that what is decoded is still in L2 for the next step.
_SCRATCH_BYTES = 2**18

# llama.cpp's: smaller log-probabilities than the largest one of the row minus this become it.
_FLOOR = 16.0
_STEPS = 65_535


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in a file, by its three numbers."""

    n_ctx: int
    n_vocab: int
    n_chunk: int

    @property
    def rows_per_chunk(self) -> int:
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def row_words(self) -> int:
        """The uint16 of a row, its scale and minimum among them."""
        return 4 + self.n_vocab + self.n_vocab % 2

    @property
    def rows_at(self) -> int:
        return _HEAD_BYTES + 4 * self.n_chunk * self.n_ctx

    @property
    def chunk_bytes(self) -> int:
        return self.rows_per_chunk * self.row_words * 2

    def token_at(self, row: int) -> int:
        """Which of the tokens is a row's label."""
        chunk, row = divmod(row, self.rows_per_chunk)
        return chunk * self.n_ctx + self.n_ctx // 2 + row + 1


def sources(path: Path, status: os.stat_result) -> list[Source]:
    """Read a file's header and check it against the file's size."""
    layout = _layout(path)
    n_bytes = status.st_size
    whole = layout.rows_at + layout.n_chunk * layout.chunk_bytes
    n_chunks = (n_bytes - layout.rows_at) // layout.chunk_bytes
    if n_bytes > whole or n_chunks < 1:
        wrong = "trailing bytes" if n_bytes > whole else "truncated, no chunk is whole"
        raise InputError(
            f"{path}: expected {whole} bytes for {layout.n_chunk} chunks of {layout.rows_per_chunk} "
            f"rows of {layout.n_vocab} classes, got {n_bytes} ({wrong}); write the file again"
        )
    note = None
    if n_chunks < layout.n_chunk:
        are = "is" if n_chunks == 1 else "are"
        note = f"truncated: {n_chunks} of {layout.n_chunk} chunks {are} whole"
    n_rows = n_chunks * layout.rows_per_chunk

    def source(
        name: str, shape: tuple[int, ...], dtype: np.dtype[Any], kind: Kind | None = None
    ) -> Source:
        mtime = status.st_mtime_ns
        return Source(path, name, "kld", shape, dtype, n_bytes, mtime, kind=kind, note=note)

    return [
        source("logprobs", (n_rows, layout.n_vocab), np.dtype(np.float32), "logprobs"),
        source("targets", (n_rows,), np.dtype(np.int32)),
    ]


def open_reader(source: Source) -> Reader:
    """Return a reader of the log-probabilities or of the targets."""
    return _TargetsReader(source) if source.name == "targets" else _LogProbsReader(source)


def _layout(path: Path) -> _Layout:
    head = read_head(path, _HEAD_BYTES)
    if len(head) < _HEAD_BYTES or not head.startswith(MAGIC):
        raise InputError(
            f"{path}: expected a file of llama-perplexity --kl-divergence-base, "
            f"got one that starts with {head!r}"
        )
    n_ctx, n_vocab, n_chunk = np.frombuffer(head, "<i4", offset=len(MAGIC)).tolist()
    if n_ctx < 3 or n_vocab < 1 or n_chunk < 1:
        raise InputError(
            f"{path}: expected n_ctx of at least 3, n_vocab and n_chunk of at least 1, "
            f"got {n_ctx}, {n_vocab} and {n_chunk}"
        )
    return _Layout(n_ctx, n_vocab, n_chunk)


class _LogProbsReader(FileReader):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._layout = _layout(source.path)
        words = self._layout.row_words
        self._scratch = np.empty((max(1, _SCRATCH_BYTES // (2 * words)), words), "<u2")

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with log-probabilities from ``first_row`` on."""
        for i in range(0, len(rows), len(self._scratch)):
            out = rows[i : i + len(self._scratch)]
            coded = self._scratch[: len(out)]
            self.read_at(self._layout.rows_at + (first_row + i) * self._layout.row_words * 2, coded)
            scales = coded[:, :4].view("<f4")
            out[...] = coded[:, 4 : 4 + self._layout.n_vocab]
            with np.errstate(all="ignore"):  # what the file says is not finite stays so
                out *= scales[:, :1]
                out += scales[:, 1:]


class _TargetsReader(FileReader):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._layout = _layout(source.path)

    def read_into(self, first_row: int, rows: NDArray[Any]) -> None:
        """Fill an array with labels from ``first_row`` on."""
        if not len(rows):
            return
        # Some half of the tokens are labels, in runs: all between the first and the last are read.
        layout, last_row = self._layout, first_row + len(rows) - 1
        first = layout.token_at(first_row)
        tokens = np.empty(layout.token_at(last_row) + 1 - first, "<i4")
        self.read_at(_HEAD_BYTES + 4 * first, tokens)
        chunks, within = np.divmod(np.arange(first_row, last_row + 1), layout.rows_per_chunk)
        rows[...] = tokens[chunks * layout.n_ctx + layout.n_ctx // 2 + within + 1 - first]


class KldWriter:
    """Writes rows of known shape and their labels, block by block, in one chunk.

    Other tokens than the labels are 0. Log-probabilities are stored as llama.cpp does: in 65535 steps
    between the row's largest and its smallest, or the largest minus 16 where the smallest is less.

    Parameters
    ----------
    file : binary file
        Empty, and open for writing at any place.
    shape : (int, int)
        Rows and classes.
    kind : {"logits", "logprobs", "probs"}
        What is written. Logits become log-probabilities; the others are taken as given, whatever the
        sum of a row.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, int], kind: Kind = "logits") -> None:
        n_rows, n_vocab = shape
        n_ctx = 2 * n_rows + 2
        if not (n_rows >= 1 and n_ctx <= _INT32_MAX and 1 <= n_vocab <= _INT32_MAX):
            raise ValueError(
                f"shape: expected 1 to {(_INT32_MAX - 2) // 2} rows and 1 to {_INT32_MAX} classes, "
                f"got {shape}"
            )
        self._file, self._kind = file, kind
        self._layout = _Layout(n_ctx, n_vocab, 1)
        self._row = 0
        file.write(MAGIC + np.array([n_ctx, n_vocab, 1], "<i4").tobytes())
        file.truncate(self._layout.rows_at + self._layout.chunk_bytes)

    def write(self, block: NDArray[Any], targets: NDArray[Any]) -> None:
        """Append the next rows and their labels.

        Parameters
        ----------
        block : ndarray of float16, float32, float64 or uint16, (n, n_classes)
            uint16 holds the bits of bfloat16. A row that is no distribution, because it has NaN or
            +inf or nothing but -inf, is NaN when read again.
        targets : ndarray of integers, (n,)
            Must fit int32.
        """
        labels = targets.astype("<i4")
        if (labels != targets).any():
            i = int((labels != targets).argmax())
            raise ValueError(f"targets: expected int32, got {targets[i]} in row {self._row + i}")
        self._file.seek(_HEAD_BYTES + 4 * self._layout.token_at(self._row))
        self._file.write(labels.tobytes())
        self._file.seek(self._layout.rows_at + self._row * self._layout.row_words * 2)
        step = max(1, _SCRATCH_BYTES // (2 * self._layout.row_words))
        for i in range(0, len(block), step):
            self._file.write(_encode(block[i : i + step], self._kind, self._layout.row_words).data)
        self._row += len(block)


def _encode(block: NDArray[Any], kind: Kind, row_words: int) -> NDArray[np.uint16]:
    """Return rows as they are stored."""
    x = widened(block)
    x = x.astype(np.float64 if x.itemsize == 8 else np.float32)
    coded = np.zeros((len(x), row_words), "<u2")
    scales = coded[:, :4].view("<f4")
    with np.errstate(all="ignore"):  # rows that are not finite become NaN
        if kind == "probs":
            np.log(x, out=x)
        top = x.max(axis=1, keepdims=True)
        low = np.maximum(x.min(axis=1, keepdims=True), top - _FLOOR)
        scale = ((top - low) / _STEPS).astype(np.float32)
        scales[:, :1] = scale
        scales[:, 1:] = low - _lse(x) if kind == "logits" else low
        x -= low
        x *= np.where(scale == 0, 0, 1 / scale)
        np.rint(x, out=x)
        np.clip(x, 0, _STEPS, out=x)
        coded[:, 4 : 4 + x.shape[1]] = np.nan_to_num(x, copy=False, nan=0.0)
    return coded


def _lse(x: NDArray[Any]) -> NDArray[Any]:
    lse = row_stats(x, outputs=["lse"]).lse
    assert lse is not None
    return lse[:, None]
