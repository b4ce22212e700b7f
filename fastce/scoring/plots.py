"""Pictures of figures: reliability, losses, and losses by position, through matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastce.scoring.atomic import atomic_file
from fastce.scoring.figures import HISTOGRAM_BINS, HISTOGRAM_WIDTH, Figures
from fastce.scoring.formats import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What a picture's file name may end in.
SUFFIXES = (".png", ".svg", ".pdf")

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#8a8f98"
_PANEL_INCHES = (3.6, 3.7)


def plot_figures(
    figures: Figures, path: str | os.PathLike[str], *, after: Figures | None = None
) -> None:
    """Draw figures: reliability, the histogram of losses, and the mean loss by position if known.

    Parameters
    ----------
    figures : Figures
        What to draw.
    path : path
        The picture, which its name makes PNG, SVG or PDF. It appears complete or not at all.
    after : Figures, optional
        The same rows at another temperature, drawn beside the others.

    Raises
    ------
    InputError
        If the name ends otherwise, or matplotlib is not installed.
    """
    check_picture(path)
    target = Path(path)
    with atomic_file(target) as file:
        draw_figures(figures, after=after).savefig(file, format=target.suffix[1:].lower(), dpi=150)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Check that a picture of this name can be drawn, before there is one."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a picture's name that ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{path}: pictures need matplotlib: python -m pip install 'fastce[plot]'"
        ) from error


def draw_figures(figures: Figures, *, after: Figures | None = None) -> Figure:
    """Return the picture, drawn without pyplot: nothing global is touched."""
    from matplotlib.figure import Figure

    each = [figures] if after is None else [figures, after]
    names = [""] if after is None else [_at(figures), _at(after)]
    n_panels = len(each) + 1 + bool(figures.positions)
    n_columns = 2 if n_panels == 4 else n_panels
    n_lines = n_panels // n_columns
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * n_columns, height * n_lines))
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
    panels: list[Axes] = list(figure.subplots(n_lines, n_columns, squeeze=False).flat)
    for axes, one, name, colour in zip(panels, each, names, (_BLUE, _ORANGE), strict=False):
        _draw_reliability(axes, one, name, colour)
    _draw_losses(panels[len(each)], each, names)
    if figures.positions:
        _draw_positions(panels[-1], each, names)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def _at(figures: Figures) -> str:
    return f"T = {figures.options.get('temperature', 1):.4g}"


def _title(axes: Axes, text: str, name: str = "") -> None:
    axes.set_title(f"{text}, {name}" if name else text, fontsize=10, loc="left")


def _draw_reliability(axes: Axes, figures: Figures, name: str, colour: str) -> None:
    """Draw accuracy over confidence, and behind it how many rows a bin has."""
    bins = figures.reliability
    tallest = max((b.rows for b in bins), default=0)
    axes.bar(
        [b.lower for b in bins],
        [0.25 * b.rows / max(tallest, 1) for b in bins],
        width=[b.upper - b.lower for b in bins],
        align="edge",
        color="#d9dce1",
        edgecolor="white",
        linewidth=0.5,
        label=f"rows of the bin (tallest: {tallest:,})",
    )
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle="--")
    some = [b for b in bins if b.rows]
    axes.plot(
        [b.confidence for b in some],
        [b.accuracy for b in some],
        marker="o",
        markersize=3.5,
        clip_on=False,
        linewidth=1.2,
        color=colour,
        label=f"accuracy (ECE {figures.ece:.2%})",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xlabel("confidence (largest probability)", fontsize=9)
    axes.set_ylabel("accuracy", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _title(axes, "Reliability", name)


def _draw_losses(axes: Axes, each: list[Figures], names: list[str]) -> None:
    edges = [HISTOGRAM_WIDTH * i for i in range(HISTOGRAM_BINS + 1)]
    used = 1 + max(
        (i for figures in each for i, n in enumerate(figures.loss_histogram) if n), default=0
    )
    for figures, name, colour in zip(each, names, (_BLUE, _ORANGE), strict=False):
        rows = figures.loss_histogram[:used]
        text = f"mean {figures.mean_nll:.4g} nats"
        style: dict[str, Any] = {"color": colour, "label": f"{name}: {text}" if name else text}
        axes.stairs(rows, edges[: used + 1], fill=len(each) == 1, linewidth=1.2, **style)
        axes.axvline(figures.mean_nll, color=colour if len(each) > 1 else _GREY, linewidth=0.8)
    axes.set_xlim(0, edges[used])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    last = ", 20 and more in the last" if used == HISTOGRAM_BINS else ""
    axes.set_xlabel(f"loss (nats){last}", fontsize=9)
    axes.set_ylabel(f"rows per {HISTOGRAM_WIDTH} nats", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    _title(axes, "Losses")


def _draw_positions(axes: Axes, each: list[Figures], names: list[str]) -> None:
    for figures, name, colour in zip(each, names, (_BLUE, _ORANGE), strict=False):
        middles = [(b.first + b.last) / 2 + 1 for b in figures.positions]
        losses = [b.mean_nll for b in figures.positions]
        axes.plot(middles, losses, marker="o", markersize=3, linewidth=1.2, color=colour, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("position in the sequence, from 1", fontsize=9)
    axes.set_ylabel("mean loss (nats)", fontsize=9)
    if len(each) > 1:
        axes.legend(fontsize=8, frameon=False)
    _title(axes, "Loss by position")
