"""The temperature that fits a dump best: a root found by passes over the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastce.scoring.figures import SCHEMA_VERSION, Figures, Tally, finite_or_none
from fastce.scoring.formats import Kind, Paths
from fastce.scoring.records import input_of
from fastce.scoring.runner import Blocks, Inputs, check_inputs, tally_part

Status = Literal["converged", "separable", "uninformative", "undefined"]

#: The relative error of the temperature at which the search ends.
TOLERANCE = 1e-6

# Losses and entropies that differ by less, in nats, are taken as the same.
_FLAT = 1e-6

# The search for a bracket ends at this distance in log T.
_FARTHEST = 64 * math.log(2)

# Points nearer than this, in log T, would give slopes of rounding errors.
_NEAR = 1e-4


@dataclass(frozen=True, slots=True)
class CalibrateProgress:
    """How far a calibration is."""

    passes: int  #: begun
    rows_done: int  #: of this pass
    rows_total: int  #: of a pass
    row_bytes: int  #: of logits
    temperature: float  #: of this pass


@dataclass(frozen=True, slots=True)
class Calibration:
    """The temperature T that minimises the mean NLL of ``softmax(logits / T)``.

    Attributes
    ----------
    status : str
        ``"converged"``; ``"separable"`` if no class is ever above the target, so that the NLL falls
        for ever as T falls to 0; ``"uninformative"`` if it falls for ever as T grows, so that the
        uniform distribution is the best one; ``"undefined"`` if no row is scored, or the NLL is NaN or
        infinite.
    temperature : float or None
        T; None unless converged.
    standard_error : float or None
        Of T: ``T / sqrt(n * c)`` with n kept rows and c the derivative of mean NLL - mean entropy by
        log(1 / T) at T, which is the mean variance of a row's logits / T under its own distribution.
        This is the asymptotic error of maximum likelihood, and takes rows as independent.
    passes : int
        Passes over the files.
    before : Figures
        At temperature 1: NLL, ECE, MCE, Brier score, accuracies, reliability and the rest.
    after : Figures or None
        The same at T. Its mean NLL is never above the one before.
    """

    status: Status
    temperature: float | None
    standard_error: float | None
    passes: int
    before: Figures
    after: Figures | None

    def as_dict(self) -> dict[str, Any]:
        """Return values for JSON, with a schema version; numbers that are not finite become None."""
        values: dict[str, Any] = finite_or_none(
            {
                "status": self.status,
                "temperature": self.temperature,
                "standard_error": self.standard_error,
                "passes": self.passes,
            }
        )
        before = self.before.as_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "calibration": values,
            "before": before["figures"],
            "after": None if self.after is None else self.after.as_dict()["figures"],
            **{name: before[name] for name in ("inputs", "options", "warnings")},
        }


def calibrate_files(
    logits: Paths,
    targets: Paths | None = None,
    *,
    mask: Paths | None = None,
    ignore_index: int | None = -100,
    kind: Kind | None = None,
    vocab: int | None = None,
    dtype: str | None = None,
    seq_len: int | None = None,
    lengths: Paths | None = None,
    shift: bool = False,
    n_bins: int = 15,
    block_mib: int = 64,
    num_threads: int | None = None,
    backend: str | None = None,
    progress: Callable[[CalibrateProgress], None] | None = None,
) -> Calibration:
    """Find the temperature that minimises the mean NLL of files of logits.

    Parameters
    ----------
    logits, targets, mask, ignore_index, kind, vocab, dtype, seq_len, lengths, shift, n_bins
        As in `score_files`. Use rows that nothing else will be measured on.
    block_mib, num_threads, backend
        As in `score_files`.
    progress : callable, optional
        Called with a `CalibrateProgress` after each block.

    Returns
    -------
    Calibration
        The temperature and its standard error, the figures before and after, or why there is none.

    Raises
    ------
    InputError, ValueError, BackendUnavailable
        As `score_files`.

    Notes
    -----
    The mean NLL is convex in 1 / T. Its slope there is (mean NLL - mean entropy) * T, so one pass gives
    value and slope, and the best temperature is where NLL and entropy are equal. It is bracketed, then
    found by Newton's method with the derivative of the parabola through three points; a bisection
    takes over where that is slow. The search ends at a relative error of T of 1e-6, or of 1e-6 of its
    standard error where that is larger; mostly after 6 to 10 passes. Sums are exact, so neither blocks
    nor threads change a bit.

    Rows of log-probabilities or probabilities are taken as given before, and as logits after, as with
    the temperature of `score_files`.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, fastce
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.standard_normal((20_000, 10))
    >>> targets = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from the softmax
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dump = pathlib.Path(folder)
    ...     np.save(dump / "logits.npy", 3 * logits)
    ...     np.save(dump / "targets.npy", targets)
    ...     found = fastce.calibrate_files(dump / "logits.npy", dump / "targets.npy")
    >>> found.status, abs(found.temperature - 3) < 3 * found.standard_error
    ('converged', True)
    """
    inputs = check_inputs(
        logits,
        targets,
        mask=mask,
        ignore_index=ignore_index,
        kind=kind,
        vocab=vocab,
        temperature=1.0,
        dtype=dtype,
        seq_len=seq_len,
        lengths=lengths,
        shift=shift,
        top_k=(1, 5),
        n_bins=n_bins,
        block_mib=block_mib,
        num_threads=num_threads,
        backend=backend,
    )
    passes = _Passes(inputs, shift, progress)
    before = passes.score(1.0)
    status, best = _search(passes, before)
    if best is None:
        return Calibration(status, None, None, passes.n, before, None)
    temperature, error = best.temperature, passes.standard_error(best)
    after = best.figures
    if not after.mean_nll < before.mean_nll:  # the best one is 1 but for rounding
        temperature, after = 1.0, before
    return Calibration(status, temperature, temperature * error, passes.n, before, after)


@dataclass(frozen=True, slots=True)
class _Point:
    """What a pass found. Its place is u = log(1 / T)."""

    u: float
    figures: Figures

    @property
    def temperature(self) -> float:
        return math.exp(-self.u)

    @property
    def gap(self) -> float:
        """Mean NLL - mean entropy, of the sign of the slope of the NLL by u: 0 at the best one."""
        return self.figures.mean_nll - self.figures.mean_entropy

    def is_flat(self, other: _Point) -> bool:
        """Return whether neither loss nor entropy differ."""
        a, b = self.figures, other.figures
        return abs(a.mean_nll - b.mean_nll) + abs(a.mean_entropy - b.mean_entropy) < _FLAT


class _Passes:
    """Passes over the files at chosen temperatures, and what they found."""

    def __init__(
        self, inputs: Inputs, shift: bool, progress: Callable[[CalibrateProgress], None] | None
    ) -> None:
        self.n = 0
        self.points: list[_Point] = []
        self._inputs = inputs
        self._progress = progress
        self._blocks = Blocks(inputs.settings, inputs.parts)
        self._rows = sum(part.n_rows for part in inputs.parts)
        shards = inputs.shards
        self._about: dict[str, Any] = {
            "logits": tuple(input_of(shard.logits) for shard in shards),
            "targets": tuple(map(input_of, dict.fromkeys(shard.targets for shard in shards))),
            "warnings": tuple(inputs.warnings()),
        }
        self._shift = shift
        # The entropy of rows that are uniform but for what rounding hides.
        self.uniform = math.log(inputs.options.vocab or shards[0].n_classes) - _FLAT

    def score(self, temperature: float) -> Figures:
        """Return the figures at a temperature."""
        self.n += 1
        options = replace(self._inputs.options, temperature=temperature)
        done = Tally(options.top_k, options.n_bins)

        def show(part: Tally) -> None:
            if self._progress is not None:
                rows, row_bytes = done.rows + part.rows, self._inputs.shards[0].row_bytes
                self._progress(CalibrateProgress(self.n, rows, self._rows, row_bytes, temperature))

        for part in self._inputs.parts:
            settings = self._inputs.settings
            done.merge(tally_part(part, options, settings, blocks=self._blocks, on_block=show))
        about = {**self._about, "options": options.as_json() | {"shift": self._shift}}
        return replace(done.figures(), **about)

    def at(self, u: float) -> _Point:
        """Return what a pass finds at log(1 / T)."""
        return self.keep(u, self.score(math.exp(-u)))

    def keep(self, u: float, figures: Figures) -> _Point:
        """Keep a pass as a point of the search."""
        self.points.append(_Point(u, figures))
        return self.points[-1]

    def standard_error(self, at: _Point) -> float:
        """Return the standard error of u, which is that of T relative to T."""
        n = at.figures.rows - at.figures.ignored
        slope = self.slope(at)
        return 1 / math.sqrt(n * slope) if slope > 0 else math.inf

    def slope(self, at: _Point) -> float:
        """Return the derivative of the gap by u at a point: of the parabola through it and two near."""
        near: list[_Point] = []
        for point in sorted(self.points, key=lambda p: abs(p.u - at.u)):
            if all(abs(point.u - other.u) >= _NEAR for other in [at, *near]):
                near.append(point)
        if len(near) < 2:
            return _secant(at, near[0])
        return _secant(at, near[0]) + _secant(at, near[1]) - _secant(near[0], near[1])


def _secant(a: _Point, b: _Point) -> float:
    return (a.gap - b.gap) / (a.u - b.u)


def _search(passes: _Passes, before: Figures) -> tuple[Status, _Point | None]:
    """Return the point of the best temperature, or why there is none."""
    if not math.isfinite(before.mean_nll):
        return "undefined", None
    # At 1 exactly probabilities are scored as given; beside it, as logits, as everywhere else.
    given = before.options["kind"] != "logits"
    point = passes.at(math.ulp(1.0)) if given else passes.keep(0.0, before)
    while point.figures.mean_entropy > passes.uniform:  # no direction can be seen in such small logits
        if point.u >= _FARTHEST:
            return "uninformative", None
        point = passes.at(point.u + 10 * math.log(2))
    if before.top_k_accuracy[1] == 1:
        return "separable", None
    bracket = _heat(passes, point) if point.gap > 0 else _cool(passes, point)
    if bracket is None:
        return "uninformative" if point.gap > 0 else "separable", None
    best = _solve(passes, *bracket)
    if passes.slope(best) < _FLAT * best.figures.mean_entropy:  # rows are uniform there
        return "uninformative", None
    return "converged", best


def _heat(passes: _Passes, start: _Point) -> tuple[_Point, _Point] | None:
    """Raise the temperature until the entropy is above the NLL; None if they stop changing first."""
    last, step = start, math.log(2)
    while step <= _FARTHEST:
        point = passes.at(start.u - step)
        if point.is_flat(last) and point.figures.mean_entropy > _FLAT:
            return None
        if point.gap <= 0:
            return point, last
        last, step = point, 2 * step
    return None


def _cool(passes: _Passes, start: _Point) -> tuple[_Point, _Point] | None:
    """Lower the temperature until the NLL is above the entropy; None if both come to 0 first."""
    last, step = start, math.log(2)
    while step <= _FARTHEST:
        point = passes.at(start.u + step)
        if point.gap > 0:
            return last, point
        if not (math.isfinite(point.gap) and point.figures.mean_entropy > _FLAT):
            return None
        last, step = point, 2 * step
    return None


def _solve(passes: _Passes, low: _Point, high: _Point) -> _Point:
    """Return the point between two where the gap is 0."""
    best = min(low, high, key=lambda point: abs(point.gap))
    bisect = False
    while True:
        slope = passes.slope(best)
        step = -best.gap / slope if slope > 0 else math.inf
        tolerance = TOLERANCE * (max(1.0, passes.standard_error(best)) if slope > 0 else 1.0)
        if min(abs(step), high.u - low.u) <= tolerance:
            return best
        u = best.u + step
        bisect = bisect or not low.u < u < high.u
        point = passes.at((low.u + high.u) / 2 if bisect else u)
        low, high = (low, point) if point.gap > 0 else (point, high)
        bisect = not bisect and abs(point.gap) > abs(best.gap) / 2
        best = min(best, point, key=lambda point: abs(point.gap))
