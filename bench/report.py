"""Run the whole grid, keep every sample in ``results/``, and write the table into the README.

Each contender runs in fresh processes, since OpenMP runtimes in one process disturb each other. The
rounds go through all contenders of a workload before the next one, and through all workloads before
the next round, so that a slow minute of the machine falls on everyone and the ratios stay fair.
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
from pathlib import Path
from typing import Any

import table
from contenders import CONTENDERS
from workloads import WORKLOADS

import fastce
from fastce import cpu

_HERE = Path(__file__).parent
_PACKAGES = ("numpy", "numba", "scipy", "scikit-learn", "torch", "jax")


def _run(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder in a fresh process and return what it prints."""
    done = subprocess.run(
        [sys.executable, _HERE / script, *arguments], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _empty_report(args: argparse.Namespace) -> dict[str, Any]:
    names = _chosen(args.only, CONTENDERS)
    workloads = [WORKLOADS[name].scaled(args.rows_scale) for name in _chosen(args.workloads, WORKLOADS)]
    return {
        "machine": fastce.show_config("dict")["processor"]
        | {"system": f"{platform.system()} {platform.machine()}"},
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "n_threads": args.threads,
        "rounds": 0,
        "rows_scale": args.rows_scale,
        "contenders": names,
        "workloads": [dataclasses.asdict(workload) for workload in workloads],
        "bandwidth": {"read": [], "read_write": []},  # GB/s
        "absent": {},
        "failed": {},
        # workload -> contender -> task -> first_call_s (one a round), samples_s, summary, errors
        "results": {workload.name: {} for workload in workloads},
    }


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "fastce": fastce.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # the contender is listed as absent, with the reason
    return found


def _round(report: dict[str, Any]) -> None:
    """Measure every contender once more on every workload."""
    threads = ("--threads", str(report["n_threads"]))
    for sweep, rates in _run("bandwidth.py", *threads).items():
        report["bandwidth"][sweep] += rates
    # Rotated, so that nobody always follows the same neighbour.
    turn = report["rounds"] % len(report["contenders"])
    order = report["contenders"][turn:] + report["contenders"][:turn]
    for name in report["results"]:
        for contender in order:
            if contender in report["absent"]:
                continue
            print(f"round {report['rounds'] + 1}: {name} {contender}", file=sys.stderr)
            scale = ("--rows-scale", str(report["rows_scale"]))
            try:
                found = _run("measure.py", contender, name, *threads, *scale)
            except subprocess.CalledProcessError as crash:
                found = {"failed": f"exit status {crash.returncode}"}
            _add(report, name, contender, found)
    report["rounds"] += 1


def _add(report: dict[str, Any], workload: str, contender: str, found: dict[str, Any]) -> None:
    if "absent" in found:
        report["absent"][contender] = found["absent"]
    elif "failed" in found:
        report["failed"][f"{contender} on {workload}"] = found["failed"]
    else:
        kept = report["results"][workload].setdefault(contender, {})
        for task, new in found["tasks"].items():
            old = kept.setdefault(task, {"first_call_s": [], "samples_s": []})
            old["first_call_s"].append(new["first_call_s"])
            old["samples_s"] += new["samples_s"]
            old["median_s"] = statistics.median(old["samples_s"])
            old["min_s"] = min(old["samples_s"])
            old["errors"] = new["errors"]  # the same in each round: same data, same code


def _chosen(patterns: str, names: dict[str, Any]) -> list[str]:
    asked = patterns.split(",")
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in asked)]
    if not found:
        raise SystemExit(f"{patterns!r} matches none of: {', '.join(names)}")
    return found


def _path(report: dict[str, Any]) -> Path:
    model = re.sub(r"\(\w+\)", "", report["machine"]["model"])
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model} {report['n_threads']} threads".lower()).strip("-")
    return _HERE / "results" / f"{slug}.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", default="*", help="contenders, such as 'fastce-*,torch' (default: all)")
    add("--workloads", default="*", help="workloads, such as '*-float32' (default: all)")
    add("--threads", type=int, default=cpu.usable_cores(), help="for all (default: %(default)s)")
    add("--rounds", type=int, default=3, help="fresh processes per pair (default: %(default)s)")
    add("--rows-scale", type=float, default=1.0, help="fraction of the rows, for a trial")
    add("--output", type=Path, help="default: results/<machine>.json; of a partial run, partial.json")
    add("--readme", type=Path, help="where the table goes (default: ours; a partial run prints it)")
    add("--render", type=Path, metavar="RESULTS", help="measure nothing, use these results")
    return parser.parse_args()


def _measure(args: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    report = _empty_report(args)
    output = output or _path(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        _round(report)
        # After each round: a long run that is stopped keeps what it has.
        output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"samples: {output}", file=sys.stderr)
    return report


def main() -> None:
    """Measure, or read what was measured; then write the table."""
    args = _arguments()
    whole = (args.only, args.workloads, args.rows_scale) == ("*", "*", 1.0)
    readme = args.readme or (_HERE.parent / "README.md" if whole or args.render else None)
    if readme:
        table.around(readme)  # complain of missing markers now, not in half an hour
    if args.render:
        report = json.loads(args.render.read_text(encoding="utf-8"))
    else:
        report = _measure(args, args.output or (None if whole else _HERE / "results/partial.json"))
    text = table.render(report)
    if readme:
        table.write(readme, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
