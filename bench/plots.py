"""From a results file to pictures: throughput, scaling, error against speed, and memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from table import limits
from workloads import TASKS, Workload

matplotlib.use("svg")
# Text stays text and identifiers the same from run to run: small files, and no change without a cause.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastce", "font.size": 9})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

_SHOWN = ("torch", "torch-compile", "jax", "sklearn", "numpy")  # beside fastce's
_COLORS = {
    "fastce-numba": "tab:orange",
    "torch": "tab:red",
    "torch-compile": "tab:purple",
    "jax": "tab:green",
    "sklearn": "tab:brown",
    "numpy": "tab:gray",
}
_MEMORY_OF = "2048x32000-float32"

Report = dict[str, Any]


def draw(report: Report, stem: Path) -> list[Path]:
    """Write each picture that the report has figures for to ``<stem>-<name>.svg``; return the files."""
    files = []
    for name, picture in (
        ("throughput", _throughput),
        ("scaling", _scaling),
        ("error", _error),
        ("memory", _memory),
    ):
        figure = picture(report)
        if figure is not None:
            files.append(stem.with_name(f"{stem.name}-{name}.svg"))
            figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
    return files


def _names(report: Report) -> list[str]:
    return [report["best"], "fastce-numba", *_SHOWN]


def _color(name: str) -> str:
    return _COLORS.get(name, "tab:blue")


def _task(
    report: Report, workload: str, name: str, task: str, threads: int = 0
) -> dict[str, Any] | None:
    cell = (
        report["results"].get(workload, {}).get(name, {}).get(str(threads or report["n_threads"]), {})
    )
    found: dict[str, Any] | None = cell.get("tasks", {}).get(task)
    return found


def _grouped(report: Report, group: str) -> list[Workload]:
    every = (Workload(**fields) for fields in report["workloads"].values())
    return sorted((w for w in every if w.group == group), key=lambda w: w.n_classes)


def _throughput(report: Report) -> Figure | None:
    """GB/s against the number of classes, with what memory can do."""
    dtypes = [d for d in ("float32", "bfloat16") if len(_grouped(report, d)) > 1]
    if not dtypes:
        return None
    tasks = ("loss", "loss+grad")
    size = (9, 3.2 * len(dtypes))
    figure, axes = plt.subplots(len(dtypes), 2, figsize=size, sharex=True, squeeze=False)
    for dtype, row in zip(dtypes, axes, strict=True):
        for task, ax in zip(tasks, row, strict=True):
            for name in _names(report):
                points = [
                    (w.n_classes, w.model_bytes(task) / found["median_s"] / 1e9)
                    for w in _grouped(report, dtype)
                    if (found := _task(report, w.name, name, task))
                ]
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", ms=3, label=name, color=_color(name))
            ax.axhline(limits(report)[task], color="black", ls="--", lw=1, label="memory")
            ax.set(xscale="log", ylim=(0, None), title=f"{task}, {dtype}", ylabel="GB/s")
            ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("classes")
    _legend(figure, axes.flat)
    return figure


def _scaling(report: Report) -> Figure | None:
    """Speed-up against threads; one panel for each shape."""
    shapes = [Workload(**fields) for fields in report["workloads"].values() if fields["scaling"]]
    counts = sorted({int(n) for w in shapes for c in report["results"][w.name].values() for n in c})
    if len(counts) < 2:
        return None
    figure, axes = plt.subplots(1, len(shapes), figsize=(2.6 * len(shapes), 2.8), squeeze=False)
    for workload, ax in zip(shapes, axes[0], strict=True):
        for name in (report["best"], "fastce-numba", "torch"):
            for task, style in (("loss", "o-"), ("loss+grad", "s--")):
                points = [
                    (n, found["median_s"])
                    for n in counts
                    if (found := _task(report, workload.name, name, task, n))
                ]
                if points and points[0][0] == counts[0]:
                    n, seconds = zip(*points, strict=True)
                    speedup = [counts[0] * seconds[0] / s for s in seconds]
                    ax.plot(n, speedup, style, ms=3, label=f"{name}, {task}", color=_color(name))
        ax.plot(counts, counts, color="black", lw=0.5, label="ideal")
        title = " x ".join(str(n) for n in workload.shape)
        ax.set(xlabel="threads", xticks=counts, ylim=(0, None), title=title)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up")
    _legend(figure, axes.flat)
    return figure


def _error(report: Report) -> Figure | None:
    """Largest error against nanoseconds per logit, over the float32 shapes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for ax, task, what in zip(axes, ("loss", "loss+grad"), ("loss", "grad"), strict=True):
        for name in _names(report):
            cells = [
                (found["median_s"] * 1e9 / w.n_elements, found["errors"][f"{what}_max_ulp"])
                for w in _grouped(report, "float32")
                if (found := _task(report, w.name, name, task)) and found["errors"]
            ]
            if cells:
                speed = math.exp(sum(math.log(ns) for ns, _ in cells) / len(cells))
                worst = max(max(ulp for _, ulp in cells), 0.1)
                ax.plot(speed, worst, "o", color=_color(name), label=name)
        ax.set(xscale="log", yscale="log", title=f"{'loss' if what == 'loss' else 'gradient'}, float32")
        ax.set_xlabel(f"ns per logit of {task}, geometric mean of the shapes")
        ax.margins(x=0.15, y=0.15)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("largest error, ULP")
    if not axes[0].lines:
        plt.close(figure)
        return None
    _legend(figure, axes)
    return figure


def _memory(report: Report) -> Figure | None:
    """Memory a call adds at its peak, in sizes of the logits."""
    if _MEMORY_OF not in report["workloads"]:
        return None
    workload = Workload(**report["workloads"][_MEMORY_OF])
    names = [n for n in (*_names(report), "scipy") if _task(report, workload.name, n, "loss")]
    figure, ax = plt.subplots(figsize=(9, 2.8))
    for i, task in enumerate(TASKS):
        peaks = [(_task(report, workload.name, name, task) or {}).get("peak_bytes") for name in names]
        places = [n + 0.27 * (i - 1) for n in range(len(names))]
        ax.bar(places, [(p or 0) / workload.n_bytes for p in peaks], 0.25, label=task)
    ax.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names])
    ax.set(ylabel="sizes of the logits", title=f"memory added at the peak, {workload.name}")
    ax.grid(alpha=0.3, axis="y")
    ax.legend()
    return figure


def _legend(figure: Figure, axes: Any) -> None:
    """Put one legend below, of everything that any panel shows."""
    shown = {
        label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout()
    figure.legend(
        shown.values(),
        shown.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=4,
        frameon=False,
    )
