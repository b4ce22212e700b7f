"""Run the grid, keep the samples in ``results/``, and write tables, plots and the README's part.

Each contender runs in fresh processes, since OpenMP runtimes in one process disturb each other. A round
goes through all contenders of a workload before the next one, and through all workloads before the
next round, so that a slow minute of the machine falls on everyone and the ratios stay fair.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import table
from contenders import CONTENDERS
from workloads import WORKLOADS

import fastce
from fastce import cpu, registry

_HERE = Path(__file__).parent
_PACKAGES = ("numpy", "numba", "scipy", "scikit-learn", "torch", "jax", "ml_dtypes")

# Those that are nowhere near the fastest are measured in one round, and the variants of the Cython
# backend that are not chosen here: two thirds of the time of a run.
_ONCE = ("fastce-numpy", "numpy", "scipy", "sklearn")
_BANDWIDTH_SECONDS = 90.0  # between two probes


class Pair(NamedTuple):
    """What one process measures."""

    n_threads: int
    workload: str
    contender: str


def _best() -> str:
    """Return the contender that is fastce's automatic choice here."""
    return f"fastce-{registry.choose('auto', 'float32').name}"


def _pairs(args: argparse.Namespace) -> list[Pair]:
    """Return what is asked for: the grid, and some of it with fewer threads."""
    names = _chosen(args.only, CONTENDERS)
    workloads = _chosen(args.workloads, WORKLOADS)
    counts = [2**i for i in range(args.threads.bit_length()) if 2**i < args.threads]
    scaling = [
        Pair(count, workload, name)
        for workload in workloads
        if WORKLOADS[workload].scaling
        for count in (*counts, args.threads)
        for name in (_best(), "fastce-numba", "torch")
        if name in names
    ]
    grid = [Pair(args.threads, workload, name) for workload in workloads for name in names]
    return scaling if args.scaling else list(dict.fromkeys(grid + scaling))


def _empty(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": fastce.show_config("dict")["processor"]
        | {"system": f"{platform.system()} {platform.machine()}"},
        "versions": _versions(),
        "n_threads": args.threads,
        "rows_scale": args.rows_scale,
        "best": _best(),
        "date": "",
        "workloads": {},  # name -> its fields
        "bandwidth": {},  # threads -> sweep -> GB/s
        # workload -> contender -> threads -> rounds, and absent or failed: the reason, or fills and
        # tasks -> first_call_s (one a round), samples_s, median_s, min_s, peak_bytes, errors
        "results": {},
    }


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "fastce": fastce.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the contender is listed as absent, with the reason
    return found


def _earlier(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Read results to add to; refuse those that cannot stand in one table with the new ones."""
    if not path.exists():
        return new
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("machine", "versions", "n_threads", "rows_scale", "best"):
        if old.get(name) != new[name]:
            raise SystemExit(
                f"{path}: {name}: expected {new[name]} to add to these results, got {old.get(name)}; "
                "measure anew, without --resume and --merge"
            )
    return old


def _measure(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Measure what is asked for, saving after each workload."""
    report = _empty(args)
    pairs = _pairs(args)
    if args.resume or args.merge:
        report = _earlier(output, report)
    if args.merge:
        for pair in pairs:
            report["results"].get(pair.workload, {}).get(pair.contender, {}).pop(str(pair.n_threads), 0)
    deadline = time.monotonic() + 60 * args.minutes
    output.parent.mkdir(parents=True, exist_ok=True)
    probed: dict[int, float] = {}
    for number, pair in _missing(report, pairs, args.rounds):
        if time.monotonic() > deadline:
            print("out of time; go on with --resume", file=sys.stderr)
            break
        if time.monotonic() - probed.get(pair.n_threads, -_BANDWIDTH_SECONDS) >= _BANDWIDTH_SECONDS:
            _probe(report, pair.n_threads)
            probed[pair.n_threads] = time.monotonic()
        print(
            f"round {number + 1}: {pair.workload} {pair.contender}, {pair.n_threads}", file=sys.stderr
        )
        _add(report, pair, _run_pair(pair, args.rows_scale))
        report["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _save(report, output)
    print(f"samples: {output}", file=sys.stderr)
    return report


def _missing(report: dict[str, Any], pairs: list[Pair], rounds: int) -> Iterator[tuple[int, Pair]]:
    """Yield the pairs that a report lacks, round by round."""
    for number in range(rounds):
        for workload in dict.fromkeys(pair.workload for pair in pairs):
            some = [pair for pair in pairs if pair.workload == workload]
            turn = number % len(some)  # so that nobody always follows the same neighbour
            for pair in some[turn:] + some[:turn]:
                wanted = 1 if _once(pair.contender) else rounds
                cell = _cell(report, pair)
                if number < wanted and cell.get("rounds", 0) <= number and "absent" not in cell:
                    yield number, pair


def _once(contender: str) -> bool:
    return contender in _ONCE or (contender.startswith("fastce-cython") and contender != _best())


def _cell(report: dict[str, Any], pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = (
        report["results"]
        .setdefault(pair.workload, {})
        .setdefault(pair.contender, {})
        .setdefault(str(pair.n_threads), {})
    )
    return found


def _probe(report: dict[str, Any], n_threads: int) -> None:
    kept = report["bandwidth"].setdefault(str(n_threads), {})
    for sweep, rates in _run("bandwidth.py", "--threads", str(n_threads)).items():
        kept.setdefault(sweep, []).extend(round(rate, 2) for rate in rates)


def _run_pair(pair: Pair, rows_scale: float) -> dict[str, Any]:
    how = ("--threads", str(pair.n_threads), "--rows-scale", str(rows_scale))
    try:
        return _run("measure.py", pair.contender, pair.workload, *how)
    except subprocess.CalledProcessError as crash:
        return {"failed": f"exit status {crash.returncode}"}


def _run(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder in a fresh process and return what it prints."""
    done = subprocess.run(
        [sys.executable, _HERE / script, *arguments], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _add(report: dict[str, Any], pair: Pair, found: dict[str, Any]) -> None:
    workload = WORKLOADS[pair.workload].scaled(report["rows_scale"])
    report["workloads"][pair.workload] = dataclasses.asdict(workload)
    kept = _cell(report, pair)
    kept.pop("failed", None)  # in an earlier round
    kept["rounds"] = kept.get("rounds", 0) + 1
    for name in ("absent", "failed", "fills"):
        if name in found:
            kept[name] = found[name]
    for task, new in found.get("tasks", {}).items():
        old = kept.setdefault("tasks", {}).setdefault(task, {"first_call_s": [], "samples_s": []})
        old["first_call_s"].append(new["first_call_s"])
        old["samples_s"] += new["samples_s"]
        old["median_s"] = statistics.median(old["samples_s"])
        old["min_s"] = min(old["samples_s"])
        old["peak_bytes"], old["errors"] = new["peak_bytes"], new["errors"]  # the same in each round


def _save(report: dict[str, Any], path: Path) -> None:
    text = json.dumps(report, indent=1)
    # What holds figures alone on one line: a smaller file, and one whose changes people can read.
    text = re.sub(r"\[[^][{}]*\]|\{[^][{}]*\}", lambda innermost: " ".join(innermost[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def _chosen(patterns: str, names: dict[str, Any]) -> list[str]:
    asked = patterns.split(",")
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in asked)]
    if not found:
        raise SystemExit(f"{patterns!r} matches none of: {', '.join(names)}")
    return found


def _path(args: argparse.Namespace) -> Path:
    """Return where results go that no option names: a part must not replace a machine's results."""
    part = args.scaling or (args.only, args.workloads) != ("*", "*")
    if args.rows_scale != 1 or (part and not (args.resume or args.merge)):
        return _HERE / "results" / "partial.json"
    model = re.sub(r"\(\w+\)", "", cpu.model())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model} {args.threads} threads".lower()).strip("-")
    return _HERE / "results" / f"{slug}.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", default="*", help="contenders, such as 'fastce-*,torch' (default: all)")
    add("--workloads", default="*", help="workloads, such as '*-float32' (default: all)")
    add("--scaling", action="store_true", help="only the part with 1, 2, 4, ... threads")
    add("--threads", type=int, default=cpu.usable_cores(), help="for all (default: %(default)s)")
    add("--rounds", type=int, default=2, help="fresh processes per pair (default: %(default)s)")
    add("--rows-scale", type=float, default=1.0, help="fraction of the rows, for a trial")
    add("--output", type=Path, help="default: results/<machine>.json; of a part, partial.json")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--resume", action="store_true", help="add to the output what it lacks")
    keep.add_argument("--merge", action="store_true", help="replace in the output what is measured now")
    add("--minutes", type=float, default=float("inf"), help="stop after this; then --resume")
    add("--render", action="store_true", help="measure nothing: tables and plots of the output")
    add("--readme", type=Path, default=_HERE.parent / "README.md", help="for the short tables")
    return parser.parse_args()


def main() -> None:
    """Measure, or read what was measured; then write tables and plots."""
    args = _arguments()
    output = args.output or _path(args)
    table.around(args.readme)  # complain of missing markers now, not in half an hour
    report = json.loads(output.read_text("utf-8")) if args.render else _measure(args, output)
    _render(report, output, args.readme)


def _render(report: dict[str, Any], output: Path, readme: Path) -> None:
    """Write the full tables and the plots beside the results; the README's part for a whole run."""
    pictures = []
    try:
        import plots
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    else:
        pictures = plots.draw(report, output.with_suffix(""))
    output.with_suffix(".md").write_text(table.full(report, pictures), encoding="utf-8")
    print(f"tables: {output.with_suffix('.md')}", file=sys.stderr)
    if report["rows_scale"] == 1 and set(report["workloads"]) == set(WORKLOADS):
        table.write(readme, table.short(report, pictures, output, readme.parent))
        print(f"README: {readme}", file=sys.stderr)
    else:
        print(f"not the whole grid: {readme} stays as it is", file=sys.stderr)


if __name__ == "__main__":
    main()
