"""The scorer: rows of logits and targets in, figures out, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce import info
from fastce.kernels import widened
from fastce.scoring.figures import OUTPUTS, Figures, Tally
from fastce.scoring.formats import Kind
from fastce.stats import row_stats


@dataclass(frozen=True, slots=True)
class Options:
    """What is scored and how: everything that changes a figure. Meanings as in `Scorer`."""

    ignore_index: int | None = -100
    kind: Kind = "logits"
    vocab: int | None = None
    temperature: float = 1.0
    top_k: tuple[int, ...] = (1, 5)
    n_bins: int = 15

    def __post_init__(self) -> None:
        if self.kind not in ("logits", "logprobs", "probs"):
            raise ValueError(f"kind: expected logits, logprobs or probs, got {self.kind!r}")
        if not self.temperature > 0 or not np.isfinite(self.temperature):
            raise ValueError(f"temperature: expected a finite number above 0, got {self.temperature}")
        if any(k < 1 for k in self.top_k):
            raise ValueError(f"top_k: expected whole numbers of at least 1, got {list(self.top_k)}")
        for name, value in (("vocab", self.vocab), ("n_bins", self.n_bins)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    def as_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {**asdict(self), "top_k": list(self.top_k)}


class Scorer:
    """Figures of rows that come a batch at a time: a metric that streams and merges.

    Parameters
    ----------
    ignore_index : int or None, default -100
        Rows with this target are not scored.
    kind : {"logits", "logprobs", "probs"}, default "logits"
        What the numbers are. The loss of log-probabilities and probabilities is that of the target as
        it is given; all else is of the row's softmax, which differs by what a row's sum is off 1.
    vocab : int, optional
        Use the first so many classes alone: a padded vocabulary.
    temperature : float, default 1
        Logits are divided by it; the rows are then logits whatever they were.
    top_k : sequence of int, default (1, 5)
        The k of the top-k accuracies.
    n_bins : int, default 15
        Bins of the calibration errors.
    dtype
        ``"bfloat16"`` for its bits in uint16.
    num_threads, backend
        As in `cross_entropy`.

    Notes
    -----
    Sums are exact until a figure is asked for. So the figures are the same in every bit however rows
    are cut into batches, in any order, and however scorers are merged; and those of `score_files`.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> scorer = fastce.Scorer()
    >>> scorer.update(np.array([[2.0, 1.0, 0.1]]), [0]).round(4)
    array([0.417])
    >>> other = fastce.Scorer()
    >>> _ = other.update(np.array([[0.5, 2.5, 0.3]]), [2])
    >>> scorer.merge(other)
    >>> round(scorer.figures().mean_nll, 6), scorer.figures().top_k_accuracy
    (1.41854, {1: 0.5, 5: 1.0})
    """

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        kind: Kind = "logits",
        vocab: int | None = None,
        temperature: float = 1.0,
        top_k: Sequence[int] = (1, 5),
        n_bins: int = 15,
        dtype: DTypeLike | None = None,
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        self._options = Options(ignore_index, kind, vocab, float(temperature), tuple(top_k), n_bins)
        self._dtype = dtype
        self._num_threads = num_threads
        self._backend = backend
        self._tally = Tally(top_k, n_bins)

    def update(
        self, logits: ArrayLike, targets: ArrayLike, *, mask: ArrayLike | None = None
    ) -> NDArray[Any]:
        """Score a batch of rows.

        Parameters
        ----------
        logits : array_like, shape (..., n_classes)
            As in `cross_entropy`. With three axes or more, the last but one runs along sequences, and
            each batch holds whole ones: the figures of sequences are then there too.
        targets : array_like of integers, shape (...)
            Class ids.
        mask : array_like of bool or integers, shape (...), optional
            Rows where it is 0 are not scored.

        Returns
        -------
        ndarray of shape (...)
            The losses, in nats; 0 where a row is not scored.

        Raises
        ------
        ValueError, TypeError, IndexError
            As `cross_entropy`.
        """
        x, y = np.asarray(logits), np.asarray(targets)
        if mask is not None:
            m = np.asarray(mask)
            if m.shape != y.shape:
                raise ValueError(f"mask: expected shape {y.shape} as targets have, got {m.shape}")
            y = masked(y, m != 0, self._options)
        options = scored_options(self._options, masks=mask is not None)
        stats = score_rows(x, y, options, self._dtype, self._num_threads, self._backend)
        kept = kept_rows(y, options.ignore_index)
        flat = {name: array.reshape(-1) for name, array in stats.items()}
        positions = None
        if x.ndim > 2:
            starts = np.arange(0, y.size + 1, max(1, y.shape[-1]))
            sequences = Sequences(starts)
            sequences.add(0, flat["loss"], kept.reshape(-1))
            positions = positions_of(starts, 0, y.size)
            self._tally.add_sequences(sequences.means())
        self._tally.add(flat, kept.reshape(-1), positions)
        return stats["loss"]

    def merge(self, other: Self) -> None:
        """Add all that another scorer has seen, with the same options."""
        if other._options != self._options:
            raise ValueError(
                f"other: expected a scorer of the same options {self._options}, got {other._options}"
            )
        self._tally.merge(other._tally)

    def figures(self, *, n_bytes: int | None = None, n_words: int | None = None) -> Figures:
        """Return the figures so far.

        Parameters
        ----------
        n_bytes, n_words : int, optional
            Bytes and words of text that the kept rows stand for.

        Returns
        -------
        Figures
        """
        return self._tally.figures(n_bytes=n_bytes, n_words=n_words)


class Sequences:
    """The losses of sequences, summed row after row however they are cut into blocks."""

    def __init__(self, starts: ArrayLike) -> None:
        self._starts = np.asarray(starts, np.int64)
        self._sums = np.zeros(len(self._starts) - 1)
        self._counts = np.zeros(len(self._starts) - 1, np.int64)

    def add(self, row: int, losses: NDArray[Any], kept: NDArray[np.bool_]) -> None:
        """Add rows from one on."""
        index = _sequence_of(self._starts, row, len(losses))
        np.add.at(self._sums, index[kept], losses[kept])
        np.add.at(self._counts, index[kept], 1)

    def means(self) -> NDArray[np.float64]:
        """Return the mean loss of each sequence that has a kept row."""
        some = self._counts > 0
        return np.asarray(self._sums[some] / self._counts[some])


def _sequence_of(starts: NDArray[np.int64], row: int, n: int) -> NDArray[np.intp]:
    return np.searchsorted(starts, np.arange(row, row + n), side="right") - 1


def positions_of(starts: ArrayLike, row: int, n: int) -> NDArray[np.int64]:
    """Return the positions in their sequences of n rows from one on."""
    own = np.asarray(starts, np.int64)
    return np.asarray(np.arange(row, row + n) - own[_sequence_of(own, row, n)])


def score_rows(
    x: NDArray[Any],
    y: NDArray[Any],
    options: Options,
    dtype: DTypeLike | None,
    num_threads: int | None,
    backend: str | None,
) -> dict[str, NDArray[Any]]:
    """Return what a tally needs of rows (..., n_classes) and their targets."""
    if options.vocab is not None:
        if options.vocab > x.shape[-1]:
            raise ValueError(f"vocab: expected at most the {x.shape[-1]} classes, got {options.vocab}")
        x = x[..., : options.vocab]
    if options.kind == "probs":
        if dtype is not None:
            raise TypeError("kind: expected probabilities of float16, float32 or float64, got bfloat16")
        x = -np.asarray(info.information(x, base=np.e))
    if options.temperature != 1:
        x, dtype = _divided(x, dtype, options.temperature), None
    given = options.kind != "logits" and options.temperature == 1
    found = row_stats(
        x,
        y,
        ignore_index=options.ignore_index,
        dtype=dtype,
        outputs=(*OUTPUTS, "target_logit") if given else OUTPUTS,
        num_threads=num_threads,
        backend=backend,
    )
    stats = {name: array for name, array in found._asdict().items() if array is not None}
    if given:
        target_logit = stats.pop("target_logit")
        kept = kept_rows(y, options.ignore_index)
        # 0 - x, so that a loss of 0 be +0
        stats["loss"] = np.where(kept, 0 - target_logit, 0).astype(target_logit.dtype)
    return stats


def _divided(x: NDArray[Any], dtype: DTypeLike | None, temperature: float) -> NDArray[Any]:
    if dtype is not None:
        x = widened(x.astype(np.uint16, copy=False))
    wide = x.astype(np.promote_types(x.dtype, np.float32), copy=False)
    return np.asarray(wide / wide.dtype.type(temperature))


def scored_options(options: Options, *, masks: bool) -> Options:
    """Return the options with an id for the rows that a mask ignores, where users have none."""
    if masks and options.ignore_index is None:
        return replace(options, ignore_index=np.iinfo(np.int64).min)
    return options


def masked(y: NDArray[Any], kept: NDArray[np.bool_], options: Options) -> NDArray[np.int64]:
    """Return targets with the ignored id where rows are not kept."""
    if y.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integer class ids, got dtype {y.dtype}")
    if y.dtype == np.uint64:  # beyond int64 they are out of range; they must not come out negative
        y = np.minimum(y, np.uint64(np.iinfo(np.int64).max))
    ignored = np.int64(scored_options(options, masks=True).ignore_index or 0)
    return np.where(kept, y.astype(np.int64), ignored)


def kept_rows(y: NDArray[Any], ignore_index: int | None) -> NDArray[np.bool_]:
    """Return which rows are scored."""
    return np.ones(y.shape, bool) if ignore_index is None else np.asarray(y != ignore_index)
