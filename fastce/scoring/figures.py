"""The figures: what each one means and how it is summed, in this one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce.kernels import exact_sum

SCHEMA_VERSION = 1

# Losses are summed in chunks of this many kept rows of one file, however the file is cut into
# blocks, so that no figure depends on the block size. A chunk leaves three numbers in memory.
_CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Input:
    """One file that was read."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """How the figures were computed; none of it changes them beyond the last bits of a loss."""

    backend: str
    isa: str | None
    seconds: float
    rows_per_second: float
    bytes_per_second: float  #: bytes of logits files
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a scored set of files. Losses are in nats.

    With n the number of kept rows (``rows - ignored``) and l_i their losses:

    Attributes
    ----------
    rows, ignored : int
        Rows in the files, and those of them whose target is ``ignore_index``.
    nonfinite : int
        Kept rows with loss NaN or infinite.
    nll_sum : float
        The sum of l_i.
    mean_nll : float
        ``nll_sum / n``; NaN if n is 0.
    standard_error : float
        Of ``mean_nll``: ``sqrt(sum((l_i - mean_nll)**2) / (n - 1) / n)``, which takes rows as
        independent; NaN if n < 2.
    perplexity : float
        ``exp(mean_nll)``.
    bits_per_token : float
        ``mean_nll / ln 2``.
    bits_per_byte : float or None
        ``nll_sum / (n_bytes * ln 2)``; None if ``n_bytes`` was not given.
    top_k_accuracy : dict of int to float
        For each k the share of kept rows whose target is among the k largest logits, equal logits
        by class id.
    logits, targets : tuple of Input
        The files read.
    run : Run
        Backend, versions and speed; not part of equality.
    """

    rows: int
    ignored: int
    nonfinite: int
    nll_sum: float
    mean_nll: float
    standard_error: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    top_k_accuracy: dict[int, float]
    logits: tuple[Input, ...]
    targets: tuple[Input, ...]
    run: Run = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON, with a schema version; numbers that are not finite become None."""
        values: dict[str, Any] = finite_or_none(asdict(self))
        inputs = {"logits": values.pop("logits"), "targets": values.pop("targets")}
        run = values.pop("run")
        return {"schema_version": SCHEMA_VERSION, "figures": values, "inputs": inputs, "run": run}


def finite_or_none(value: Any) -> Any:
    """Return a value for JSON, in which numbers that are not finite are None."""
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Chunk(NamedTuple):
    n: int
    sum: float
    squares: float  # sum of squared deviations from the chunk's own mean


class Tally:
    """Counts and sums over rows, the same in every bit however the rows of a file are cut."""

    def __init__(self, top_k: Sequence[int]) -> None:
        self.rows = 0
        self.kept = 0
        self.nonfinite = 0
        self._hits = dict.fromkeys(top_k, 0)
        self._chunks: list[_Chunk] = []
        self._pending = np.empty(_CHUNK_ROWS)
        self._n_pending = 0
        self._running_sum = 0.0

    @property
    def running_mean(self) -> float:
        """The mean loss so far, to show; not the exact one."""
        return self._running_sum / self.kept if self.kept else math.nan

    def add(self, losses: NDArray[Any], ranks: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        """Add the next rows of a file."""
        kept_losses = losses[kept]
        self.rows += len(losses)
        self.kept += len(kept_losses)
        self.nonfinite += int(np.count_nonzero(~np.isfinite(kept_losses)))
        with np.errstate(over="ignore"):
            self._running_sum += float(kept_losses.sum(dtype=np.float64))
        for k in self._hits:
            self._hits[k] += int(np.count_nonzero((ranks >= 0) & (ranks < k)))
        while len(kept_losses):
            taken = kept_losses[: _CHUNK_ROWS - self._n_pending]
            kept_losses = kept_losses[len(taken) :]
            self._pending[self._n_pending : self._n_pending + len(taken)] = taken
            self._n_pending += len(taken)
            if self._n_pending == _CHUNK_ROWS:
                self.end_file()

    def end_file(self) -> None:
        """Close the chunk that is being filled: chunks do not reach into the next file."""
        if self._n_pending:
            losses = self._pending[: self._n_pending]
            total = exact_sum(losses.tolist())
            with np.errstate(over="ignore", invalid="ignore"):  # an infinite loss has no deviation
                deviations = losses - total / len(losses)
                squares = exact_sum((deviations * deviations).tolist())
            self._chunks.append(_Chunk(len(losses), total, squares))
            self._n_pending = 0

    def figures(
        self,
        *,
        n_bytes: int | None,
        logits: tuple[Input, ...],
        targets: tuple[Input, ...],
        run: Run,
    ) -> Figures:
        """Return the figures of all the rows added."""
        n = self.kept or math.nan  # a figure of no rows is NaN
        nll_sum = exact_sum([chunk.sum for chunk in self._chunks])
        mean = nll_sum / n
        return Figures(
            rows=self.rows,
            ignored=self.rows - self.kept,
            nonfinite=self.nonfinite,
            nll_sum=nll_sum,
            mean_nll=mean,
            standard_error=self._standard_error(mean),
            perplexity=exp(mean),
            bits_per_token=mean / math.log(2),
            bits_per_byte=None if n_bytes is None else nll_sum / (n_bytes * math.log(2)),
            top_k_accuracy={k: hits / n for k, hits in self._hits.items()},
            logits=logits,
            targets=targets,
            run=run,
        )

    def _standard_error(self, mean: float) -> float:
        # Deviations from means, within chunks and then between them: a difference of two large
        # sums of squares would cancel, and can come out negative.
        if self.kept < 2:
            return math.nan
        between = ((c.n, c.sum / c.n - mean) for c in self._chunks)
        squares = exact_sum([c.squares for c in self._chunks]) + exact_sum(
            [n * d * d for n, d in between]
        )
        return math.sqrt(squares / (self.kept - 1) / self.kept)


def exp(value: float) -> float:
    """Return e to a power; inf where that is beyond the largest float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
