"""From a results file to Markdown, and into the README between its markers."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from workloads import TASKS, Workload

_BEGIN, _END = "<!-- bench:begin -->", "<!-- bench:end -->"


def render(report: dict[str, Any]) -> str:
    """Return the tables of speed and error, with what was measured and what was not."""
    names = [name for name in report["contenders"] if name not in report["absent"]]
    parts = [_about(report), _speed(report, names), _error(report, names), _first_calls(report, names)]
    return "\n\n".join([*parts, *_missing(report)])


def around(readme: Path) -> tuple[str, str]:
    """Return what stands before and after the table, the markers included."""
    text = readme.read_text(encoding="utf-8")
    if text.count(_BEGIN) != 1 or text.count(_END) != 1 or text.index(_BEGIN) > text.index(_END):
        raise SystemExit(f"{readme}: expected one line {_BEGIN} and, below it, one line {_END}")
    return text[: text.index(_BEGIN) + len(_BEGIN)], text[text.index(_END) :]


def write(readme: Path, table: str) -> None:
    """Put the table between the README's markers."""
    before, after = around(readme)
    readme.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")


def _about(report: dict[str, Any]) -> str:
    machine, rates = report["machine"], _bandwidth(report)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    scale = report["rows_scale"]
    lines = [
        f"Nanoseconds per logit, median of the calls in {report['rounds']} round(s), "
        f"{report['n_threads']} threads; bold: the fastest.",
        f"{machine['model']} ({', '.join(machine['instruction_sets'])}; {caches}), "
        f"{report['date'][:10]}.",
        f"Memory in the same run: read {rates['loss']:.1f} GB/s, "
        f"read and write {rates['loss+grad']:.1f} GB/s.",
        f"{versions}.",
    ]
    if scale != 1:
        lines.append(f"**Rows scaled by {scale:g}: a trial, not a result.**")
    return "\n".join(lines)


def _speed(report: dict[str, Any], names: list[str]) -> str:
    rates = _bandwidth(report)
    head = ["logits", "task", *names, "best fastce, GB/s"]
    rows = []
    for entry in report["workloads"]:
        workload = Workload(**entry)
        for task in TASKS:
            seconds = {
                name: cell["median_s"]
                for name in names
                for cell in [_cell(report, workload, task, name)]
                if cell
            }
            best = min(seconds.values(), default=None)
            shape = f"{workload.n_rows:,} x {workload.n_classes:,} {workload.dtype}".replace(",", " ")
            cells = [_nanoseconds(seconds.get(name), best, workload) for name in names]
            ours = [value for name, value in seconds.items() if name.startswith("fastce-")]
            rate = workload.model_bytes(task) / min(ours) / 1e9 if ours else None
            share = "-" if rate is None else f"{rate:.1f} ({rate / rates[task]:.0%})"
            rows.append([shape, task.replace("+", " + "), *cells, share])
    return _markdown(head, rows)


def _error(report: dict[str, Any], names: list[str]) -> str:
    rows = []
    for dtype in dict.fromkeys(entry["dtype"] for entry in report["workloads"]):
        for what, task in (("loss", "loss"), ("grad", "loss+grad")):
            cells = []
            for name in names:
                found = [
                    cell["errors"][f"{what}_max_ulp"]
                    for entry in report["workloads"]
                    if entry["dtype"] == dtype
                    for cell in [_cell(report, Workload(**entry), task, name)]
                    if cell and cell["errors"]
                ]
                cells.append(_ulp(max(found)) if found else "-")
            rows.append([dtype, "loss" if what == "loss" else "gradient", *cells])
    return "Largest error seen, in ULP of the true value:\n\n" + _markdown(
        ["logits", "of", *names], rows
    )


def _first_calls(report: dict[str, Any], names: list[str]) -> str:
    longest = []
    for name in names:
        cells = [cell for found in report["results"].values() for cell in found.get(name, {}).values()]
        if cells:
            seconds = max(max(cell["first_call_s"]) for cell in cells)
            longest.append(f"{name} {seconds:.2g}")
    return f"Longest first call, any compilation included, in seconds: {', '.join(longest)}."


def _missing(report: dict[str, Any]) -> list[str]:
    lines = [f"- {name}: absent ({reason})" for name, reason in report["absent"].items()]
    lines += [f"- {where}: failed ({reason})" for where, reason in report["failed"].items()]
    return ["Not measured:\n\n" + "\n".join(lines)] if lines else []


def _cell(report: dict[str, Any], workload: Workload, task: str, name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report["results"][workload.name].get(name, {}).get(task)
    return found


def _bandwidth(report: dict[str, Any]) -> dict[str, float]:
    """Return the rate each task is held against, in GB/s."""
    return {
        task: statistics.median(report["bandwidth"][sweep])
        for task, sweep in zip(TASKS, ("read", "read_write"), strict=True)
    }


def _nanoseconds(seconds: float | None, best: float | None, workload: Workload) -> str:
    if seconds is None:
        return "-"
    text = f"{seconds * 1e9 / workload.n_elements:#.3g}".removesuffix(".")
    return f"**{text}**" if seconds == best else text


def _ulp(error: float) -> str:
    return f"{error:.1f}" if error < 1000 else f"{error:.0e}".replace("e+0", "e")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])
