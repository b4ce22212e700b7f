"""The figures: what each one means and how it is summed, in this one place."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastce.scoring.exact import ExactSums

SCHEMA_VERSION = 2

#: What a tally asks of `row_stats`.
OUTPUTS = ("loss", "rank", "entropy", "max_prob", "brier")

#: The loss histogram: bins of this width in nats, the last one open.
HISTOGRAM_WIDTH = 0.25
HISTOGRAM_BINS = 81


@dataclass(frozen=True, slots=True)
class Input:
    """One array that was read."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int  #: of the file
    sha256: str | None = None  #: of the file, if it was asked for


@dataclass(frozen=True, slots=True)
class Run:
    """How the figures were computed; none of it changes them beyond the last bits of a loss."""

    backend: str
    isa: str | None
    seconds: float
    rows_per_second: float
    bytes_per_second: float  #: of logits read
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Rows whose confidence, the largest probability, is in (lower, upper]."""

    lower: float
    upper: float
    rows: int
    confidence: float  #: mean of them
    accuracy: float  #: share of them whose target has the largest logit


@dataclass(frozen=True, slots=True)
class PositionBin:
    """Rows at positions first to last of their sequences, counted from 0."""

    first: int
    last: int
    rows: int
    mean_nll: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of scored rows. Losses are in nats; logarithms are natural.

    With n the number of kept rows (``rows - ignored``) and l_i their losses:

    Attributes
    ----------
    rows, ignored : int
        Rows read, and those of them that are not scored: by their target, the mask, or the shift.
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
        ``exp(mean_nll)``: of the corpus, each token weighing the same.
    bits_per_token : float
        ``mean_nll / ln 2``.
    sequences : int or None
        Sequences with a kept row; None if the rows are not known to be sequences.
    mean_sequence_perplexity : float or None
        The mean over sequences of ``exp`` of the sequence's own mean loss: each sequence weighs the
        same. Not the perplexity of the corpus.
    bits_per_byte : float or None
        ``nll_sum / (n_bytes * ln 2)``; None if ``n_bytes`` was not given.
    byte_perplexity : float or None
        ``exp(nll_sum / n_bytes)``, as lm-evaluation-harness has it.
    word_perplexity : float or None
        ``exp(nll_sum / n_words)``; None if ``n_words`` was not given.
    top_k_accuracy : dict of int to float
        For each k the share of kept rows whose target is among the k largest logits, equal logits
        by class id.
    top_k_standard_error : dict of int to float
        Of these shares a: ``sqrt(a * (1 - a) / (n - 1))``.
    mean_rank : float
        How many classes come before the target, on average: 0 if it is always the first.
    mean_entropy : float
        Of the rows' distributions, in nats. Equal to ``mean_nll`` where temperature is best.
    mean_confidence : float
        The mean of the largest probability of each row.
    brier : float
        The mean of ``sum_j (p_j - [j is the target])**2``, in [0, 2].
    ece : float
        Expected calibration error: the mean over rows of ``|accuracy - confidence|`` of the row's bin,
        in bins of equal width, ``(lower, upper]``, of the largest probability (Guo et al. 2017).
    mce : float
        The largest ``|accuracy - confidence|`` of a bin that has rows.
    reliability : tuple of ReliabilityBin
        These bins. Rows that hold NaN are in none.
    loss_histogram : tuple of int
        Kept rows with a loss in [0, 0.25) nats, [0.25, 0.5), and so on; the last bin is [20, inf] and
        has those that are NaN. Numbers that are no log-probabilities may give negative losses; the
        first bin has these.
    positions : tuple of PositionBin
        Mean loss by position in the sequence, in bins of position alone up to 7 and of a quarter of
        an octave above; empty if the rows are not known to be sequences.
    logits, targets : tuple of Input
        The arrays read.
    options : dict
        What was scored and how: the options that change figures.
    warnings : tuple of str
        What looks wrong with the inputs; not part of equality.
    run : Run or None
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
    sequences: int | None
    mean_sequence_perplexity: float | None
    bits_per_byte: float | None
    byte_perplexity: float | None
    word_perplexity: float | None
    top_k_accuracy: dict[int, float]
    top_k_standard_error: dict[int, float]
    mean_rank: float
    mean_entropy: float
    mean_confidence: float
    brier: float
    ece: float
    mce: float
    reliability: tuple[ReliabilityBin, ...]
    loss_histogram: tuple[int, ...]
    positions: tuple[PositionBin, ...]
    logits: tuple[Input, ...] = ()
    targets: tuple[Input, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = field(default=(), compare=False)
    run: Run | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON, with a schema version; numbers that are not finite become None."""
        values: dict[str, Any] = finite_or_none(asdict(self))
        inputs = {"logits": values.pop("logits"), "targets": values.pop("targets")}
        about = {name: values.pop(name) for name in ("options", "warnings", "run")}
        return {"schema_version": SCHEMA_VERSION, "figures": values, "inputs": inputs, **about}


def definitions() -> dict[str, str]:
    """Return the definition of each figure, by its names, from the documentation of `Figures`."""
    text = inspect.cleandoc(Figures.__doc__ or "").partition("Attributes\n----------\n")[2]
    found = re.findall(r"^(\S[^:]*?) : .*\n((?:    .*\n?)+)", text, re.MULTILINE)
    return {names: " ".join(definition.split()) for names, definition in found}


def finite_or_none(value: Any) -> Any:
    """Return a value with None for each float in it that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tally:
    """Counts and exact sums over rows: the same in every bit however rows are cut, and mergeable."""

    def __init__(self, top_k: Sequence[int], n_bins: int) -> None:
        self.rows = self.kept = self.nonfinite = self.rank_sum = 0
        self._hits = dict.fromkeys(top_k, 0)
        self._sums = {name: ExactSums() for name in ("loss", "squares", "entropy", "max_prob", "brier")}
        self._bin_rows = np.zeros(n_bins, np.int64)
        self._bin_hits = np.zeros(n_bins, np.int64)
        self._bin_confidence = ExactSums(n_bins)
        self._histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        self._n_sequences: int | None = None
        self._sequence_perplexity = ExactSums()
        self._position_rows = np.zeros(0, np.int64)  # until positions are known
        self._position_loss = ExactSums(0)

    def mean_with(self, other: Self) -> tuple[float, float]:
        """Return the mean loss of the rows of both, and its standard error."""
        n = self.kept + other.kept
        loss, squares = ExactSums(), ExactSums()
        for tally in (self, other):
            loss.merge(tally._sums["loss"])
            squares.merge(tally._sums["squares"])
        return loss.over(n), math.sqrt(loss.variance_of_mean(squares, n))

    def add(
        self,
        stats: Mapping[str, NDArray[Any]],
        kept: NDArray[np.bool_],
        positions: NDArray[np.int64] | None = None,
    ) -> None:
        """Add rows, given the `OUTPUTS` of `row_stats` and which of the rows are scored."""
        self.rows += len(kept)
        if not kept.all():
            stats = {name: array[kept] for name, array in stats.items()}
            positions = None if positions is None else positions[kept]
        loss, rank = stats["loss"], stats["rank"]
        self.kept += len(loss)
        self.nonfinite += int(np.count_nonzero(~np.isfinite(loss)))
        self.rank_sum += int(rank[rank > 0].sum())
        for k in self._hits:
            self._hits[k] += int(np.count_nonzero((rank >= 0) & (rank < k)))
        for name in ("loss", "entropy", "max_prob", "brier"):
            self._sums[name].add(stats[name])
        self._sums["squares"].add_squares(loss)
        last = HISTOGRAM_WIDTH * (HISTOGRAM_BINS - 1)
        widths = np.where(np.isnan(loss), last, loss.clip(0, last)) / HISTOGRAM_WIDTH
        self._histogram += np.bincount(widths.astype(np.intp), minlength=HISTOGRAM_BINS)
        self._add_to_bins(stats["max_prob"], rank)
        if positions is not None:
            self._know_positions()
            bins = _position_bin(positions)
            self._position_rows += np.bincount(bins, minlength=_N_POSITION_BINS)
            self._position_loss.add(loss, bins)

    def _add_to_bins(self, confidence: NDArray[Any], rank: NDArray[np.int64]) -> None:
        if np.isnan(confidence).any():
            confidence, rank = confidence[~np.isnan(confidence)], rank[~np.isnan(confidence)]
        n_bins = len(self._bin_rows)
        bins = np.ceil(confidence * np.float64(n_bins)).astype(np.intp) - 1
        bins = bins.clip(0, n_bins - 1, out=bins)
        self._bin_rows += np.bincount(bins, minlength=n_bins)
        self._bin_hits += np.bincount(bins[rank == 0], minlength=n_bins)
        self._bin_confidence.add(confidence, bins)

    def _know_positions(self) -> None:
        if not len(self._position_rows):
            self._position_rows = np.zeros(_N_POSITION_BINS, np.int64)
            self._position_loss = ExactSums(_N_POSITION_BINS)

    def add_sequences(self, mean_losses: NDArray[np.float64]) -> None:
        """Add whole sequences, by the mean losses of their kept rows."""
        self._n_sequences = (self._n_sequences or 0) + len(mean_losses)
        with np.errstate(over="ignore"):
            self._sequence_perplexity.add(np.exp(mean_losses))

    def merge(self, other: Self) -> None:
        """Add the rows of another tally."""
        for name in ("rows", "kept", "nonfinite", "rank_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if len(other._position_rows):
            self._know_positions()
            self._position_rows += other._position_rows
            self._position_loss.merge(other._position_loss)
        for name in ("_bin_rows", "_bin_hits", "_histogram"):
            getattr(self, name)[:] += getattr(other, name)
        for name in ("_bin_confidence", "_sequence_perplexity"):
            getattr(self, name).merge(getattr(other, name))
        for name, sums in self._sums.items():
            sums.merge(other._sums[name])
        for k in self._hits:
            self._hits[k] += other._hits[k]
        if other._n_sequences is not None:
            self._n_sequences = (self._n_sequences or 0) + other._n_sequences

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values, exact."""
        values: dict[str, Any] = {
            "rows": self.rows,
            "kept": self.kept,
            "nonfinite": self.nonfinite,
            "rank_sum": self.rank_sum,
            "hits": {str(k): hits for k, hits in self._hits.items()},
            "sums": {name: sums.as_json()[0] for name, sums in self._sums.items()},
            "bin_rows": self._bin_rows.tolist(),
            "bin_hits": self._bin_hits.tolist(),
            "bin_confidence": self._bin_confidence.as_json(),
            "histogram": self._histogram.tolist(),
        }
        if self._n_sequences is not None:
            used = int(np.flatnonzero(self._position_rows).max(initial=-1)) + 1
            values["sequences"] = self._n_sequences
            values["sequence_perplexity"] = self._sequence_perplexity.as_json()[0]
            values["position_rows"] = self._position_rows[:used].tolist()
            values["position_loss"] = self._position_loss.as_json()[:used]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the tally that `as_json` describes."""
        tally = cls([int(k) for k in values["hits"]], len(values["bin_rows"]))
        for name in ("rows", "kept", "nonfinite", "rank_sum"):
            setattr(tally, name, int(values[name]))
        tally._hits = {int(k): int(hits) for k, hits in values["hits"].items()}
        tally._sums = {name: ExactSums.from_json([values["sums"][name]]) for name in tally._sums}
        tally._bin_rows[:] = values["bin_rows"]
        tally._bin_hits[:] = values["bin_hits"]
        tally._bin_confidence = ExactSums.from_json(values["bin_confidence"])
        tally._histogram[:] = values["histogram"]
        if "sequences" in values:
            tally._n_sequences = int(values["sequences"])
            tally._sequence_perplexity = ExactSums.from_json([values["sequence_perplexity"]])
            used = len(values["position_rows"])
            rest = ["0x0p+0"] * (_N_POSITION_BINS - used)
            tally._know_positions()
            tally._position_rows[:used] = values["position_rows"]
            tally._position_loss = ExactSums.from_json(values["position_loss"] + rest)
        return tally

    def figures(self, *, n_bytes: int | None = None, n_words: int | None = None) -> Figures:
        """Return the figures of all the rows added."""
        n = self.kept
        nll_sum = self._sums["loss"].value()
        mean = self._sums["loss"].over(n)
        accuracy = {k: hits / n if n else math.nan for k, hits in self._hits.items()}
        reliability = self._reliability()
        gaps = [abs(b.accuracy - b.confidence) for b in reliability if b.rows]
        in_bins = sum(b.rows for b in reliability)
        shares = [b.rows / in_bins for b in reliability if b.rows]
        return Figures(
            rows=self.rows,
            ignored=self.rows - n,
            nonfinite=self.nonfinite,
            nll_sum=nll_sum,
            mean_nll=mean,
            standard_error=math.sqrt(self._sums["loss"].variance_of_mean(self._sums["squares"], n)),
            perplexity=exp(mean),
            bits_per_token=mean / math.log(2),
            sequences=self._n_sequences,
            mean_sequence_perplexity=None
            if self._n_sequences is None
            else self._sequence_perplexity.over(self._n_sequences),
            bits_per_byte=None if n_bytes is None else nll_sum / (n_bytes * math.log(2)),
            byte_perplexity=None if n_bytes is None else exp(nll_sum / n_bytes),
            word_perplexity=None if n_words is None else exp(nll_sum / n_words),
            top_k_accuracy=accuracy,
            top_k_standard_error={
                k: math.sqrt(a * (1 - a) / (n - 1)) if n > 1 else math.nan for k, a in accuracy.items()
            },
            mean_rank=self.rank_sum / n if n else math.nan,
            mean_entropy=self._sums["entropy"].over(n),
            mean_confidence=self._sums["max_prob"].over(n),
            brier=self._sums["brier"].over(n),
            ece=math.fsum(map(math.prod, zip(shares, gaps, strict=True))) if gaps else math.nan,
            mce=max(gaps, default=math.nan),
            reliability=reliability,
            loss_histogram=tuple(self._histogram.tolist()),
            positions=self._positions(),
        )

    def _reliability(self) -> tuple[ReliabilityBin, ...]:
        n_bins = len(self._bin_rows)
        return tuple(
            ReliabilityBin(
                lower=i / n_bins,
                upper=(i + 1) / n_bins,
                rows=rows,
                confidence=self._bin_confidence.over(rows, i),
                accuracy=hits / rows if rows else math.nan,
            )
            for i, (rows, hits) in enumerate(
                zip(self._bin_rows.tolist(), self._bin_hits.tolist(), strict=True)
            )
        )

    def _positions(self) -> tuple[PositionBin, ...]:
        return tuple(
            PositionBin(
                _first_position(i), _first_position(i + 1) - 1, rows, self._position_loss.over(rows, i)
            )
            for i, rows in enumerate(self._position_rows.tolist())
            if rows
        )


# Positions in a sequence are binned by their three leading bits: each alone up to 7, then four bins
# to the octave. So many bins reach 2**34.
_N_POSITION_BINS = 132


def _position_bin(positions: NDArray[np.int64]) -> NDArray[np.intp]:
    shift = np.maximum(np.frexp(positions.astype(np.float64))[1] - 3, 0)
    return np.asarray(4 * shift + (positions >> shift), np.intp)


def _first_position(bin_: int) -> int:
    shift = max(bin_ // 4 - 1, 0)
    return (bin_ - 4 * shift) << shift


def exp(value: float) -> float:
    """Return e to a power; inf where that is beyond the largest float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
