"""What the command line shows: tables on stdout, progress and messages on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

if TYPE_CHECKING:
    from fastce.scoring import Figures, Progress

# Without a terminal, one line of progress each time this many seconds have passed.
_LINE_SECONDS = 10.0

#: Shows (done, total, text).
Show = Callable[[int, int, str], None]


def say(message: str) -> None:
    """Print a message for people, on stderr."""
    Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Show]:
    """Show progress on stderr: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if quiet:
        yield lambda done, total, text: None
    elif sys.stderr.isatty() and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Bar(*columns, TextColumn("{task.fields[text]}"), console=console, transient=True) as bar:
            task = bar.add_task(label, total=None, text="")
            started = time.monotonic()

            def show(done: int, total: int, text: str) -> None:
                eta = _eta(started, done, total)
                bar.update(task, completed=done, total=total, text=f"{text}, {eta}")

            yield show
    else:
        yield _lines(label)


def _lines(label: str) -> Show:
    started = last = time.monotonic()

    def show(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            say(f"{label}: {done / total:.0%}, {text}, {_eta(started, done, total)}")

    return show


def _eta(started: float, done: int, total: int) -> str:
    seconds = round((time.monotonic() - started) * (total - done) / done)
    return f"{seconds // 60}:{seconds % 60:02} left"


def score_progress(show: Show) -> Callable[[Progress], None]:
    """Turn `score_files`' progress into something to show."""
    started = time.monotonic()

    def on_block(at: Progress) -> None:
        n_new = at.rows_done - at.rows_before
        rows_per_second = n_new / max(time.monotonic() - started, 1e-9)
        speed = _speed(rows_per_second, rows_per_second * at.row_bytes)
        text = f"{speed}, mean NLL {at.mean_nll:.4f} ± {at.standard_error:.4f}"
        show(n_new, at.rows_total - at.rows_before, text)

    return on_block


def print_figures(figures: Figures) -> None:
    """Print the table of figures."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in _figure_rows(figures):
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _figure_rows(figures: Figures) -> Iterator[tuple[str, str]]:
    yield "rows", f"{figures.rows:,}"
    yield "ignored", f"{figures.ignored:,}"
    yield "non-finite losses", f"{figures.nonfinite:,}"
    yield "sum of NLL", f"{figures.nll_sum:.6f} nats"
    yield "mean NLL", f"{figures.mean_nll:.6f} ± {figures.standard_error:.6f} nats"
    yield "perplexity", f"{figures.perplexity:.6g}"
    if figures.sequences is not None:
        yield "sequences", f"{figures.sequences:,}"
        yield "mean perplexity of sequences", f"{figures.mean_sequence_perplexity:.6g}"
    yield "bits per token", f"{figures.bits_per_token:.6f}"
    if figures.bits_per_byte is not None:
        yield "bits per byte", f"{figures.bits_per_byte:.6f}"
        yield "byte perplexity", f"{figures.byte_perplexity:.6g}"
    if figures.word_perplexity is not None:
        yield "word perplexity", f"{figures.word_perplexity:.6g}"
    for k, accuracy in figures.top_k_accuracy.items():
        yield f"top-{k} accuracy", f"{accuracy:.2%} ± {figures.top_k_standard_error[k]:.2%}"
    yield "mean rank", f"{figures.mean_rank:.4g}"
    yield "mean entropy", f"{figures.mean_entropy:.6f} nats"
    yield "mean confidence", f"{figures.mean_confidence:.2%}"
    yield "ECE, MCE", f"{figures.ece:.2%}, {figures.mce:.2%}"
    yield "Brier score", f"{figures.brier:.6f}"
    if figures.run is not None:
        yield "speed", _speed(figures.run.rows_per_second, figures.run.bytes_per_second)
        yield "backend", figures.run.backend


def _speed(rows_per_second: float, bytes_per_second: float) -> str:
    return f"{rows_per_second:,.0f} rows/s, {bytes_per_second / 1e9:.2f} GB/s"


def print_bench(about: list[str], head: list[str], rows: list[list[str]]) -> None:
    """Print what `fastce bench` measured: where, and one row for each combination."""
    table = Table(box=SIMPLE_HEAD)
    for name in head:
        table.add_column(name, justify="left" if name in ("backend", "dtype", "task") else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe or a file has no width to fit into
        console.width = 200
    for line in about:
        console.print(line, markup=False, soft_wrap=True)
    console.print(table)


def print_config(config: dict[str, Any]) -> None:
    """Print what `fastce.show_config` returns."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "item", "value"):
        table.add_column(name, overflow="fold")
    for section, values in config.items():
        for i, (key, value) in enumerate(values.items()):
            table.add_row("" if i else section.replace("_", " "), key, _plain(value))
        table.add_section()
    Console(highlight=False).print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
