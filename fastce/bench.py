"""What the kernels cost on this machine: backends x dtypes x classes x threads, without any peer.

Behind ``fastce bench``. The folder ``bench/``, which compares fastce with other libraries, takes its
logits, its way of timing and the memory's speed from here, so that both report the same quantities.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastce
from fastce import cpu, registry

#: Bytes a task must move, in units of the logits' size. The loss reads each logit once, the gradient
#: adds a write; a second look at a row comes from cache.
TASKS = {"loss": 1, "loss+grad": 2}
DTYPES = ("float64", "float32", "float16", "bfloat16")

# Standard normal logits would give rows without a favourite class. Four times wider, as from a trained
# model, some rows are confident: there naive formulas cancel, and their errors show. Yet no exponential
# is subnormal in float32, which would slow down code that does not flush it.
_SPREAD = 4.0
# Distinct logits; drawing them all would take longer than timing them. A prime, so that no row repeats.
_POOL = 4_000_037

# One sample lasts at least this long, in as many calls as it takes: 10 000 ticks of the clock, and
# no call so short that reading the clock shows in it.
_SAMPLE_SECONDS = 1e-3
_MIN_SAMPLES = 5
_MIN_SLOW_SAMPLES = 3
_SLOW = 4  # times the seconds asked for: then the fewer samples must do

# What a cell is the figure of, and the titles of those that a table shows.
_KEY = ("backend", "dtype", "n_classes", "n_rows", "num_threads", "task")
_NAMES = {
    "backend": "backend",
    "dtype": "dtype",
    "n_classes": "classes",
    "num_threads": "threads",
    "task": "task",
}


class ResultsError(ValueError):
    """A file to compare with is not what ``fastce bench -o json`` writes; the message says why."""


class Timing(NamedTuple):
    """How long calls took, in seconds."""

    first: float  #: the first call, with any compilation
    samples: list[float]  #: later ones, warm

    @property
    def median(self) -> float:
        """The figure to quote: half of the samples were faster."""
        return statistics.median(self.samples)


def timed(call: Callable[[], Any], seconds: float, second: Callable[[], Any] | None = None) -> Timing:
    """Time a call: once cold, once more untimed, then until the samples suffice.

    Parameters
    ----------
    call : callable
        Takes nothing; what it returns is dropped.
    seconds : float
        Collect at least five samples and this much time; of a slow call at least three, and four
        times this much.
    second : callable, optional
        What to run instead of the call the second time, for whoever wants to look at the result.

    Returns
    -------
    Timing
        Samples of short calls are averages over about a millisecond.
    """
    first = _clock(call, 1)
    (second or call)()
    n_calls = 1
    samples: list[float] = []
    spent = 0.0
    while (len(samples) < _MIN_SAMPLES or spent < seconds) and (
        len(samples) < _MIN_SLOW_SAMPLES or spent < _SLOW * seconds
    ):
        took = _clock(call, n_calls)
        if took < _SAMPLE_SECONDS / 2:  # too few calls, which an interruption may have hidden so far
            n_calls = math.ceil(n_calls * _SAMPLE_SECONDS / max(took, 1e-7))
            samples, spent = [], 0.0
            continue
        samples.append(took / n_calls)
        spent += took
    return Timing(first, samples)


def _clock(call: Callable[[], Any], n_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    return time.perf_counter() - start


def sample_logits(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return logits as a trained model might give them, the same in every process.

    Parameters
    ----------
    shape : tuple of int
        Any.
    dtype : str
        One of `DTYPES`; bfloat16 needs the package ml_dtypes.

    Returns
    -------
    ndarray
        Of standard deviation 4.
    """
    # A normal deviate of float32 costs half as much; what float64 adds is noise here.
    real = np.float64 if dtype == "float64" else np.float32
    n = math.prod(shape)
    pool = np.random.default_rng(0).standard_normal(min(n, _POOL), dtype=real) * real(_SPREAD)
    logits: NDArray[Any] = np.resize(pool.astype(numpy_dtype(dtype)), n)
    return logits.reshape(shape)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of a name in `DTYPES`, or raise ValueError if it needs a package."""
    if name == "bfloat16":
        try:
            import_module("ml_dtypes")  # which makes the name known to NumPy
        except ImportError as error:
            raise ValueError("dtypes: bfloat16 needs ml_dtypes; pip install ml_dtypes") from error
    return np.dtype(name)


def _memory_speed(num_threads: int) -> dict[str, float] | None:
    """Return GB/s to hold each task against, or None without Numba, which compiles the sweeps."""
    try:
        from fastce import bandwidth
    except ImportError:
        return None
    rates = bandwidth.sweeps(num_threads)
    return {
        task: statistics.median(rates[sweep])
        for task, sweep in zip(TASKS, ("read", "read_write"), strict=True)
    }


def run_bench(
    *,
    backends: Sequence[str] = (),
    dtypes: Sequence[str] = ("float32",),
    n_classes: Sequence[int] = (10, 1000, 32_000),
    num_threads: Sequence[int] = (),
    tasks: Sequence[str] = tuple(TASKS),
    mib: float = 256,
    seconds: float = 0.3,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Time every combination of backend, dtype, classes, threads and task.

    Parameters
    ----------
    backends : sequence of str
        Names that `fastce.backends` lists, or "cython". Default: all available but the NumPy one,
        which is there to be read.
    dtypes : sequence of str, default ("float32",)
        Of `DTYPES`. A backend without kernels for one of them is left out there.
    n_classes : sequence of int, default (10, 1000, 32000)
        Each at least 1.
    num_threads : sequence of int
        Each at least 1. Default: the cores this process may use.
    tasks : sequence of str, default both
        Of `TASKS`. The gradient goes into an existing array.
    mib : float, default 256
        Size of the logits; of as many rows as fit.
    seconds : float, default 0.3
        Time for each combination, as in `timed`.
    progress : callable, optional
        Called after each combination with how many are done, of how many, and its name.

    Returns
    -------
    dict
        JSON-ready: the machine, versions, ``bandwidth`` in GB/s by threads and task, and ``cells``,
        with times in seconds unless the name says otherwise.

    Raises
    ------
    ValueError
        If an argument is outside what is listed here.
    BackendUnavailable
        If a backend asked for cannot run here.
    """
    threads = tuple(num_threads) or (cpu.usable_cores(),)
    _check_numbers("classes", n_classes, 1)
    _check_numbers("threads", threads, 1)
    _check_numbers("seconds", [seconds], 0)
    _check_numbers("mib", [mib], 0)
    _check_names("task", tasks, TASKS)
    _check_names("dtypes", dtypes, DTYPES)
    for dtype in dtypes:
        numpy_dtype(dtype)
    kinds = _kinds(backends, dtypes)
    config = fastce.show_config("dict")
    document: dict[str, Any] = {
        "machine": config["processor"],
        "versions": config["versions"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "mib": mib,
        "seconds": seconds,
        "bandwidth": {},
        "cells": [],
    }
    cells = list(product(threads, dict.fromkeys(dtype for _, dtype in kinds), n_classes))
    total = len(threads) * len(n_classes) * len(kinds) * len(tasks)
    for count, dtype, classes in cells:
        if str(count) not in document["bandwidth"]:
            document["bandwidth"][str(count)] = _memory_speed(count)
        logits, targets, grad = _inputs(classes, dtype, mib)
        for backend, task in product([b for b, d in kinds if d == dtype], tasks):
            call = _call(task, logits, targets, grad, num_threads=count, backend=backend)
            kind = dict(zip(_KEY, (backend, dtype, classes, len(logits), count, task), strict=True))
            limit = document["bandwidth"][str(count)]
            document["cells"].append(kind | _figures(timed(call, seconds), logits, task, limit))
            if progress is not None:
                progress(len(document["cells"]), total, f"{backend} {dtype} {classes} {task}")
    return document


def _kinds(backends: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of backend and dtype to time, in order, each once."""
    names: dict[str, frozenset[str]] = {}
    if backends:
        for name in backends:
            chosen = registry.choose(name, "float32")
            names[chosen.name] = chosen.dtypes
    else:
        for known in registry.BACKENDS:
            if known.name != "numpy" and registry.why_unavailable(known) is None:
                names[known.name] = known.dtypes
        if not names:
            raise ValueError(
                "backends: expected a compiled one here, found none (fastce doctor says why); "
                "pass backends=['numpy'] to time that one"
            )
    kinds = [(name, dtype) for dtype in dict.fromkeys(dtypes) for name in names if dtype in names[name]]
    if not kinds:
        raise ValueError(f"dtypes: {', '.join(names)}: no kernels for {', '.join(dtypes)}")
    return kinds


def _inputs(
    n_classes: int, dtype: str, mib: float
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[Any]]:
    n_rows = max(1, int(mib * 2**20) // (n_classes * numpy_dtype(dtype).itemsize))
    logits = sample_logits((n_rows, n_classes), dtype)
    targets = np.random.default_rng(1).integers(n_classes, size=n_rows)
    return logits, targets, np.ones_like(logits)  # np.empty has no pages yet


def _call(
    task: str, logits: NDArray[Any], targets: NDArray[np.int64], grad: NDArray[Any], **how: Any
) -> Callable[[], object]:
    if task == "loss":
        return lambda: fastce.cross_entropy(logits, targets, **how)
    return lambda: fastce.cross_entropy_with_grad(logits, targets, out=grad, **how)


def _figures(
    timing: Timing, logits: NDArray[Any], task: str, limit: dict[str, float] | None
) -> dict[str, Any]:
    rate = TASKS[task] * logits.nbytes / timing.median / 1e9
    return {
        "median_s": timing.median,
        "min_s": min(timing.samples),
        "n_samples": len(timing.samples),
        "first_call_s": timing.first,
        "ns_per_logit": timing.median * 1e9 / logits.size,
        "gb_per_s": rate,
        "share_of_bandwidth": None if limit is None else rate / limit[task],
    }


def _check_numbers(name: str, values: Sequence[float], least: int) -> None:
    for value in values:
        if not (value >= least and value > 0 and math.isfinite(value)):
            expected = f"at least {least}" if least else "a finite number above 0"
            raise ValueError(f"{name}: expected {expected}, got {value}")
    if not values:
        raise ValueError(f"{name}: expected at least one value, got none")


def _check_names(name: str, values: Sequence[str], known: Sequence[str] | dict[str, int]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: expected some of {', '.join(known)}; got {value!r}")
    if not values:
        raise ValueError(f"{name}: expected at least one value, got none")


def read_results(path: Path) -> dict[str, Any]:
    """Read what ``fastce bench -o json`` wrote.

    Raises
    ------
    ResultsError
        If the file cannot be read or is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for cell in document["cells"]:
            _ = [cell[name] for name in (*_KEY, "median_s")]
        _ = document["machine"]["model"]
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: expected what `fastce bench -o json` writes") from error
    return dict(document)


def compare(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Add to each cell of ``new`` the median in ``old`` and the ratio; return what to tell the reader.

    A ratio, ``old_over_new``, of 2 means twice as fast as before, None that ``old`` lacks the cell.
    """
    medians = {_key(cell): cell["median_s"] for cell in old["cells"]}
    for cell in new["cells"]:
        before = medians.pop(_key(cell), None)
        cell["old_median_s"] = before
        cell["old_over_new"] = None if before is None else before / cell["median_s"]
    notes = []
    here, there = new["machine"]["model"], old["machine"]["model"]
    if new["machine"] != old["machine"]:
        machines = f"{there}, now {here}" if here != there else f"{here} with other features"
        notes.append(f"the old results are from another machine ({machines}): ratios mean little")
    missing = sum(cell["old_over_new"] is None for cell in new["cells"])
    if missing:
        notes.append(f"{missing} of {len(new['cells'])} combinations are not in the old results")
    return notes


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in _KEY)


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the results' table, as text; `about` says what all rows share."""
    cells = document["cells"]
    keys = [name for name in _NAMES if not _same(cells, name)] or ["task"]
    head = [_NAMES[name] for name in keys]
    head += ["ns/logit", "GB/s", "of memory", "first call"]
    if "old_over_new" in cells[0]:
        head += ["old", "new", "old/new"]
    return head, [[*(str(cell[name]) for name in keys), *_figures_as_text(cell)] for cell in cells]


def _figures_as_text(cell: dict[str, Any]) -> Iterator[str]:
    yield f"{cell['ns_per_logit']:#.3g}".rstrip(".")
    yield f"{cell['gb_per_s']:.1f}"
    yield "-" if cell["share_of_bandwidth"] is None else f"{cell['share_of_bandwidth']:.0%}"
    yield duration(cell["first_call_s"])
    if "old_over_new" in cell:
        new = cell["old_over_new"] is None
        yield "-" if new else duration(cell["old_median_s"])
        yield duration(cell["median_s"])
        yield "-" if new else f"{cell['old_over_new']:.2f}"


def _same(cells: list[dict[str, Any]], name: str) -> bool:
    return all(cell[name] == cells[0][name] for cell in cells)


def duration(seconds: float) -> str:
    """Return seconds with three digits and a unit."""
    unit, size = next(
        ((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= size), ("us", 1e-6)
    )
    return f"{seconds / size:.3g} {unit}"


def about(document: dict[str, Any]) -> list[str]:
    """Return the lines that say where and how the figures were made."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    cells = document["cells"]
    same = [f"{title} {cells[0][name]}" for name, title in _NAMES.items() if _same(cells, name)]
    lines = [
        f"{document['machine']['model']}, {document['date'][:10]}; {versions}",
        f"Logits of {document['mib']:g} MiB; medians, warm; the gradient into an existing array.",
    ]
    for count, rates in document["bandwidth"].items():
        if rates:
            sweeps = f"read {rates['loss']:.1f} GB/s, read and write {rates['loss+grad']:.1f} GB/s"
            lines.append(f"Memory with {count} {'thread' if count == '1' else 'threads'}: {sweeps}")
    return lines + ([f"In all rows: {', '.join(same)}"] if same else [])


def as_markdown(document: dict[str, Any]) -> str:
    """Return the table in Markdown, with what it was made on."""
    head, rows = table(document)
    rule = ["---" if name in ("backend", "dtype", "task") else "---:" for name in head]
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    return "\n".join([*about(document), "", *lines])


def as_csv(document: dict[str, Any]) -> str:
    """Return one line for each cell, with every figure in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, document["cells"][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["cells"])
    return text.getvalue().removesuffix("\n")
