"""From a results file to Markdown: short tables for the README, all of it for ``results/``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workloads import FRESH, TASKS, WORKLOADS, Workload

_SMALL = "small calls"
_MEMORY_OF = "2048x32000-float32"  # the workload whose peak memory is shown
_TITLES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}

#: What the README shows unfolded; the rest is one click away.
_OPEN = ("float32", "bfloat16")

Report = dict[str, Any]


def short(report: Report, pictures: list[Path], results: Path, home: Path) -> str:
    """Return the README's part: fastce's automatic choice, its Numba backend, and the peers."""
    names = [
        name
        for name in _measured(report)
        if not name.startswith("fastce-") or name in (report["best"], "fastce-numba")
    ]
    full_table = os.path.relpath(results.with_suffix(".md"), home)
    parts = [_about(report), _summary(report, names)]
    for group in _groups(report):
        text = f"**{group}**\n\n{_speed(report, group, names)}"
        folded = group not in (*_OPEN, _SMALL)
        parts.append(f"<details><summary>{group}</summary>\n\n{text}\n\n</details>" if folded else text)
    parts += [
        _error(report, names),
        _memory(report, names),
        _first_calls(report, names),
        f"All variants, and what could not be measured and why: [{full_table}]({full_table}).",
        *(f"![{picture.stem}]({os.path.relpath(picture, home)})" for picture in pictures),
    ]
    return "\n\n".join(part for part in parts if part)


def full(report: Report, pictures: list[Path]) -> str:
    """Return everything that was measured."""
    names = _measured(report)
    parts = ["# What fastce and its peers cost", _about(report), _summary(report, names)]
    parts += [f"## {group}\n\n{_speed(report, group, names)}" for group in _groups(report)]
    parts += [
        f"## Error\n\n{_error(report, names)}",
        f"## Memory\n\n{_memory(report, names)}",
        f"## Compilation\n\n{_first_calls(report, names)}",
        f"## Fewer threads\n\n{_scaling(report)}",
        _missing(report),
        "## Why these shapes\n\n" + "\n".join(f"- {w.name}: {w.why}." for w in _workloads(report)),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def around(readme: Path, name: str = "bench") -> tuple[str, str]:
    """Return what stands before and after a table, the markers included."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = readme.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{readme}: expected one line {begin} and, below it, one line {end}")
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


def write(readme: Path, table: str, name: str = "bench") -> None:
    """Put a table between the README's markers."""
    before, after = around(readme, name)
    readme.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")


def _about(report: Report) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    rate, one = limits(report), limits(report, suffix="_one_stream")
    lines = [
        f"Nanoseconds per logit with {report['n_threads']} threads, medians, warm; **bold**: the "
        "fastest. In the last columns: the fastest fastce in GB/s, its share of what memory does, and "
        "how many times as fast as the fastest peer it is; in bold where it is slower.",
        f"{machine['model']} ({', '.join(machine['instruction_sets'])}; {caches}), "
        f"{report['date'][:10]}. {versions}.",
        f"Memory in the same run: read {rate['loss']:.1f} GB/s, read and write "
        f"{rate['loss+grad']:.1f} GB/s (one stream a thread: {one['loss']:.1f} and "
        f"{one['loss+grad']:.1f}).",
    ]
    if any(not cell.get("fills", True) for *_, cell in _cells(report)):
        lines.append("†: cannot fill an existing array; its gradient is a fresh one in every row.")
    if report["rows_scale"] != 1:
        lines.append(f"**Rows scaled by {report['rows_scale']:g}: a trial, not a result.**")
    return "\n".join(lines)


def _summary(report: Report, names: list[str]) -> str:
    """Say how often fastce is the fastest, and where it is not."""
    n_rows, lost = 0, []
    for workload, task in _rows(report):
        ours, theirs = _fastest(report, workload, task, names)
        if ours and theirs:
            n_rows += 1
            if ours[0] >= theirs[0]:
                lost.append(f"{_shape(workload)} {workload.dtype} {task} ({theirs[1]})")
    where = f"; not in: {', '.join(lost)}" if lost else ""
    return f"fastce is the fastest in {n_rows - len(lost)} of {n_rows} rows{where}."


def _speed(report: Report, group: str, names: list[str]) -> str:
    small = group == _SMALL
    rows = [(w, task) for w, task in _rows(report) if w.group == group]
    columns = [name for name in names if any(_seconds(report, w, t, name) for w, t in rows)]
    head = ["microseconds" if small else "logits", "task", *(_title(report, name) for name in columns)]
    head += ["vs peers"] if small else ["GB/s", "vs peers"]
    lines = []
    for workload, task in rows:
        seconds = {name: _seconds(report, workload, task, name) for name in columns}
        least = min((s for s in seconds.values() if s), default=None)
        per = 1e-6 if small else 1e-9 * workload.n_elements
        line = [_shape(workload), task.replace("+", " + ")]
        line += [_bold(_number(s, per), s == least) for s in seconds.values()]
        ours, theirs = _fastest(report, workload, task, columns)
        if not small:
            line.append(_rate(report, workload, task, ours[0]) if ours else "-")
        line.append(_ratio(ours, theirs))
        lines.append(line)
    return _markdown(head, lines, 2)


def _rate(report: Report, workload: Workload, task: str, seconds: float) -> str:
    rate = workload.model_bytes(task) / seconds / 1e9
    return f"{rate:.1f} ({rate / limits(report)[task]:.0%})"


def _ratio(ours: tuple[float, str] | None, theirs: tuple[float, str] | None) -> str:
    if ours is None or theirs is None:
        return "-"
    times = theirs[0] / ours[0]
    return f"{times:.2g} x {theirs[1]}" if times > 1 else f"**{times:.2f} x {theirs[1]}**"


def _error(report: Report, names: list[str]) -> str:
    rows = []
    for dtype in dict.fromkeys(w.dtype for w in _workloads(report)):
        for what, task in (("loss", "loss"), ("grad", "loss+grad")):
            rows.append([dtype, "loss" if what == "loss" else "gradient"])
            for name in names:
                found = [
                    cell["tasks"][task]["errors"]
                    for w, n, cell in _cells(report)
                    if n == name
                    and w.dtype == dtype
                    and cell.get("tasks", {}).get(task, {}).get("errors")
                ]
                rows[-1].append(_largest(found, what, dtype))
    head = ["logits", "of", *(_title(report, name) for name in names)]
    title = (
        "Largest error seen, in ULP of the dtype returned, which is named for losses in half precision:"
    )
    return f"{title}\n\n{_markdown(head, rows, 2)}"


def _largest(found: list[dict[str, Any]], what: str, logits_dtype: str) -> str:
    if not found:
        return "-"
    worst = max(found, key=lambda errors: errors[f"{what}_max_ulp"])
    ulp, dtype = worst[f"{what}_max_ulp"], worst[f"{what}_dtype"]
    text = f"{ulp:.1f}" if ulp < 1000 else f"{ulp:.0e}".replace("e+0", "e")
    half_loss = what == "loss" and dtype == logits_dtype and dtype.endswith("16")
    return f"{text} {_TITLES[dtype]}" if half_loss else text


def _memory(report: Report, names: list[str]) -> str:
    if _MEMORY_OF not in report["workloads"]:
        return ""
    workload = Workload(**report["workloads"][_MEMORY_OF])
    rows = []
    for task in workload.tasks:
        peaks = [(_task(report, workload, task, name) or {}).get("peak_bytes") for name in names]
        rows.append([task] + ["-" if p is None else f"{p / workload.n_bytes:.2f}" for p in peaks])
    title = (
        f"Memory that a call adds at its peak, in sizes of the logits ({_shape(workload)}, "
        f"{workload.n_bytes / 1e6:.0f} MB):"
    )
    head = ["task", *(_title(report, name) for name in names)]
    return f"{title}\n\n{_markdown(head, rows, 1)}"


def _first_calls(report: Report, names: list[str]) -> str:
    texts = []
    for name in names:
        calls = [
            seconds
            for _, n, cell in _cells(report)
            if n == name
            for task in cell.get("tasks", {}).values()
            for seconds in task["first_call_s"]
        ]
        if calls:
            texts.append(f"{name} {max(calls):.2g} ({statistics.median(calls):.2g})")
    return f"Longest first call, any compilation included, in seconds (median): {', '.join(texts)}."


def _scaling(report: Report) -> str:
    rows = []
    for workload in _workloads(report):
        for name, by_threads in report["results"][workload.name].items():
            for task in TASKS:
                seconds = {
                    int(count): cell["tasks"][task]["median_s"]
                    for count, cell in by_threads.items()
                    if task in cell.get("tasks", {})
                }
                if len(seconds) > 1:
                    counts = sorted(seconds)
                    base = seconds[counts[0]] * counts[0]
                    times = ", ".join(
                        f"{n}: {_number(seconds[n], 1e-9 * workload.n_elements)} "
                        f"({base / seconds[n]:.2f} x)"
                        for n in counts
                    )
                    rows.append([_shape(workload), task, name, times])
    head = ["logits", "task", "", "threads: ns per logit (speed-up)"]
    return _markdown(head, rows, 4) if rows else "Not measured."


def _missing(report: Report) -> str:
    """List what has no figures, by contender and reason."""
    found: dict[str, list[str]] = {}
    for workload, name, cell in _cells(report):
        for kind in ("absent", "failed"):
            if kind in cell:
                found.setdefault(f"{name}: {kind}: {cell[kind]}", []).append(workload.name)
    lines = []
    for reason, where in found.items():
        everywhere = len(where) == len(report["workloads"])
        lines.append(f"- {reason} ({'everywhere' if everywhere else ', '.join(where)})")
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def limits(report: Report, n_threads: int | None = None, suffix: str = "") -> dict[str, float]:
    """Return the rate each task is held against, in GB/s."""
    rates = report["bandwidth"].get(str(n_threads or report["n_threads"]), {})
    sweeps = {"loss": "read", "loss+grad": "read_write", FRESH: "read_write"}
    return {
        task: statistics.median(rates.get(sweep + suffix) or [float("nan")])
        for task, sweep in sweeps.items()
    }


def _workloads(report: Report) -> list[Workload]:
    return [Workload(**report["workloads"][name]) for name in WORKLOADS if name in report["workloads"]]


def _groups(report: Report) -> list[str]:
    return list(dict.fromkeys(workload.group for workload in _workloads(report)))


def _rows(report: Report) -> Iterator[tuple[Workload, str]]:
    for workload in _workloads(report):
        for task in workload.tasks:
            yield workload, task


def _cells(report: Report) -> Iterator[tuple[Workload, str, dict[str, Any]]]:
    """Yield workload, contender and measurements with the number of threads of the grid."""
    for workload in _workloads(report):
        for name, by_threads in report["results"][workload.name].items():
            yield workload, name, by_threads.get(str(report["n_threads"]), {})


def _measured(report: Report) -> list[str]:
    """Return the contenders with a figure anywhere, in the order of their dict."""
    found = {name for _, name, cell in _cells(report) if "tasks" in cell}
    order = [name for by_name in report["results"].values() for name in by_name]
    return [name for name in dict.fromkeys(order) if name in found]


def _task(report: Report, workload: Workload, task: str, name: str) -> dict[str, Any] | None:
    by_threads = report["results"][workload.name].get(name, {})
    found: dict[str, Any] | None = (
        by_threads.get(str(report["n_threads"]), {}).get("tasks", {}).get(task)
    )
    return found


def _seconds(report: Report, workload: Workload, task: str, name: str) -> float | None:
    found = _task(report, workload, task, name)
    return found["median_s"] if found else None


def _fastest(
    report: Report, workload: Workload, task: str, names: list[str]
) -> tuple[tuple[float, str] | None, tuple[float, str] | None]:
    """Return seconds and name of the fastest fastce and of the fastest peer."""
    seconds = [(s, name) for name in names if (s := _seconds(report, workload, task, name))]
    ours = [pair for pair in seconds if pair[1].startswith("fastce-")]
    theirs = [pair for pair in seconds if pair not in ours]
    return min(ours, default=None), min(theirs, default=None)


def _shape(workload: Workload) -> str:
    sizes = [f"{n:,}".replace(",", " ") for n in workload.shape]
    layout = "" if workload.axis == -1 else f", axis {workload.axis}"
    step = f", step {workload.step}" if workload.step > 1 else ""
    return (
        " x ".join(sizes) + layout + step + (f", times {workload.scale}" if workload.scale > 1 else "")
    )


def _title(report: Report, name: str) -> str:
    fills = [cell["fills"] for _, n, cell in _cells(report) if n == name and "fills" in cell]
    return name if all(fills) else f"{name} †"


def _number(seconds: float | None, unit: float) -> str:
    return "-" if seconds is None else f"{seconds / unit:#.3g}".removesuffix(".")


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _markdown(head: list[str], rows: list[list[str]], n_names: int) -> str:
    rule = ["---"] * n_names + ["---:"] * (len(head) - n_names)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])
