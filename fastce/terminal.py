"""What the command line shows: tables on stdout, progress and messages on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastce.scoring import (
        CalibrateProgress,
        Calibration,
        CompareProgress,
        Comparison,
        Figures,
        Inspection,
        Progress,
    )
    from fastce.scoring.comparison import Estimate
    from fastce.scoring.inspect import Floats, Integers

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
        speed = _speed_so_far(started, n_new, at.row_bytes)
        text = f"{speed}, mean NLL {at.mean_nll:.4f} ± {at.standard_error:.4f}"
        show(n_new, at.rows_total - at.rows_before, text)

    return on_block


def compare_progress(show: Show) -> Callable[[CompareProgress], None]:
    """Turn `compare_files`' progress into something to show."""
    started = time.monotonic()

    def on_block(at: CompareProgress) -> None:
        speed = _speed_so_far(started, at.rows_done, at.row_bytes)
        show(at.rows_done, at.rows_total, f"{speed}, mean KLD {at.mean_kl:.6f}")

    return on_block


# So many passes a calibration takes, mostly.
_PASSES = 8


def calibrate_progress(show: Show) -> Callable[[CalibrateProgress], None]:
    """Turn `calibrate_files`' progress into something to show."""
    started = time.monotonic()

    def on_block(at: CalibrateProgress) -> None:
        rows = (at.passes - 1) * at.rows_total + at.rows_done
        speed = _speed_so_far(started, rows, at.row_bytes)
        text = f"pass {at.passes} at temperature {at.temperature:.6g}, {speed}"
        show(rows, max(_PASSES, at.passes) * at.rows_total, text)

    return on_block


def _speed_so_far(started: float, rows: int, row_bytes: int) -> str:
    rows_per_second = rows / max(time.monotonic() - started, 1e-9)
    return _speed(rows_per_second, rows_per_second * row_bytes)


def print_figures(figures: Figures, format_: str = "table") -> None:
    """Print the figures as a table for people, in Markdown, or as CSV with every digit."""
    if format_ == "csv":
        values = _flat(figures.as_dict()["figures"])
        print(
            ",".join(values), ",".join("" if v is None else str(v) for v in values.values()), sep="\n"
        )
        return
    rows = list(_figure_rows(figures))
    if format_ == "md":
        print("| figure | value |", "| --- | ---: |", sep="\n")
        print(*(f"| {name} | {value} |" for name, value in rows), sep="\n")
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in rows:
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that are one number, and those by name of what they are given for."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif not isinstance(value, list):
            flat[name] = value
    return flat


def print_definitions(definitions: dict[str, str], *, to_stderr: bool) -> None:
    """Print how figures are defined."""
    console = Console(stderr=to_stderr, highlight=False)
    for names, definition in definitions.items():
        console.print(names, style="bold", markup=False)
        console.print(Padding(Text(definition.replace("``", "")), (0, 0, 0, 4)))


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


def print_comparison(comparison: Comparison, *, markdown: bool = False) -> None:
    """Print the tables of a comparison, for people or in Markdown."""
    console = Console(highlight=False)
    for head, rows in _comparison_tables(comparison):
        if markdown:
            rule = ["---", *["---:"] * (len(head) - 1)]
            print(*(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), "", sep="\n")
            continue
        table = Table(box=SIMPLE_HEAD)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _comparison_tables(c: Comparison) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield the head and the rows of each table, with llama.cpp's names."""
    yield ["figure", "value"], [list(row) for row in _comparison_rows(c)]
    yield _quantile_table(c)
    if c.buckets:
        yield (
            ["largest probability in base", "rows", "mean KLD"],
            [
                [f"{b.low:.0%} to {b.high:.0%}", f"{b.rows:,}", _number(b.mean_kl) if b.rows else ""]
                for b in c.buckets
            ],
        )
    if c.worst:
        yield (
            ["largest KLD in file", "row", "target", "KLD", "loss base", "loss Q"],
            [
                [w.path, str(w.row), "" if w.target is None else str(w.target)]
                + ["" if v is None else _number(v) for v in (w.kl, w.loss_base, w.loss_other)]
                for w in c.worst
            ],
        )


def _comparison_rows(c: Comparison) -> Iterator[tuple[str, str]]:
    yield "rows", f"{c.rows:,}"
    yield "ignored", f"{c.ignored:,}"
    yield "non-finite rows", f"{c.nonfinite:,}"
    if c.perplexity is not None:
        yield "Mean PPL(Q)", _estimate(c.perplexity.other)
        yield "Mean PPL(base)", _estimate(c.perplexity.base)
        yield "Cor(ln(PPL(Q)), ln(PPL(base)))", f"{c.perplexity.correlation:.2%}"
        yield "Mean ln(PPL(Q)/PPL(base))", _estimate(c.perplexity.log_ratio)
        yield "Mean PPL(Q)/PPL(base)", _estimate(c.perplexity.ratio)
        yield "Mean PPL(Q)-PPL(base)", _estimate(c.perplexity.difference)
    yield "Mean KLD(base, Q)", f"{_estimate(c.kl.mean)} nats"
    if c.kl_reverse is not None:
        yield "Mean KLD(Q, base)", f"{_estimate(c.kl_reverse)} nats"
    if c.delta_p is not None and c.delta_p_rms is not None:
        yield "Mean Δp", _percent_estimate(c.delta_p.mean)
        yield "RMS Δp", _percent_estimate(c.delta_p_rms)
    yield "Same top p", _percent_estimate(c.same_top)
    yield "speed", _speed(c.run.rows_per_second, c.run.bytes_per_second)
    yield "backend", c.run.backend


def _quantile_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    head, rows = ["", "KLD"], [["Maximum", _number(c.kl.maximum)]]
    percents = (c.delta_p or c.kl).percentiles
    rows += [[_percentile_name(p), _number(c.kl.percentiles.get(p))] for p in percents]
    rows.append(["Minimum", _number(c.kl.minimum)])
    if c.delta_p is not None:
        head.append("Δp")
        d = c.delta_p
        values = [d.maximum, *d.percentiles.values(), d.minimum]
        rows = [[*row, f"{value:.3%}"] for row, value in zip(rows, values, strict=True)]
    return head, rows


def _percentile_name(percent: float) -> str:
    return "Median" if percent == 50 else f"{percent:.1f}%"


def print_calibration(calibration: Calibration) -> None:
    """Print the figures before and after, and the reliability of both."""
    console = Console(highlight=False)
    before, after = calibration.before, calibration.after
    table = Table(box=SIMPLE_HEAD)
    for name in ("figure", "before", "after"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    temperature = (
        "none is best" if calibration.temperature is None else f"{calibration.temperature:.6g}"
    )
    if calibration.standard_error is not None:
        temperature += f" ± {calibration.standard_error:.2g}"
    table.add_row("temperature", "1", temperature)
    columns = [_calibration_rows(before), _calibration_rows(after) if after else {}]
    for name, value in columns[0].items():
        table.add_row(name, value, columns[1].get(name, ""))
    console.print(table)
    for name, figures in (("before", before), ("after", after)):
        if figures is not None and any(b.rows for b in figures.reliability):
            console.print(_reliability_table(figures, name))
    console.print(f"{calibration.status}; passes over the files: {calibration.passes}")


def _calibration_rows(figures: Figures) -> dict[str, str]:
    return {
        "mean NLL": f"{figures.mean_nll:.6f} ± {figures.standard_error:.6f} nats",
        "mean entropy": f"{figures.mean_entropy:.6f} nats",
        "mean confidence": f"{figures.mean_confidence:.2%}",
        "top-1 accuracy": f"{figures.top_k_accuracy[1]:.2%}",
        "ECE": f"{figures.ece:.2%}",
        "MCE": f"{figures.mce:.2%}",
        "Brier score": f"{figures.brier:.6f}",
        "rows scored": f"{figures.rows - figures.ignored:,}",
    }


_BAR = 30


def _reliability_table(figures: Figures, name: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"{name}: bin")
    for head in ("rows", "confidence", "accuracy"):
        table.add_column(head, justify="right")
    table.add_column("█ accuracy, │ confidence", no_wrap=True)
    for b in figures.reliability:
        if b.rows:
            bar = list("█" * round(b.accuracy * _BAR) + "·" * (_BAR - round(b.accuracy * _BAR)))
            bar[min(int(b.confidence * _BAR), _BAR - 1)] = "│"
            table.add_row(
                f"{b.lower:.0%} to {b.upper:.0%}",
                f"{b.rows:,}",
                f"{b.confidence:.2%}",
                f"{b.accuracy:.2%}",
                "".join(bar),
            )
    return table


def print_inspections(found: list[Inspection]) -> None:
    """Print what is in files: a table for each array."""
    console = Console(highlight=False)
    for one in found:
        console.print(f"{one.label} {one.looks_like}", markup=False, soft_wrap=True)
        table = Table(box=SIMPLE_HEAD, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in _inspection_rows(one):
            table.add_row(name, value)
        console.print(table)


def _inspection_rows(one: Inspection) -> Iterator[tuple[str, str]]:
    yield "format", f"{one.format}, {_bytes(one.file_bytes)}"
    yield "array", f"{one.dtype} {one.shape}"
    if one.kind is not None:
        yield "holds, as its format says", one.kind
    if one.note is not None:
        yield "note", one.note
    if one.floats is not None:
        yield from _floats_rows(one.floats)
    if one.integers is not None:
        yield from _integers_rows(one.integers)


def _floats_rows(floats: Floats) -> Iterator[tuple[str, str]]:
    yield "read", _share(floats.rows_read, floats.rows, "rows")
    yield "NaN, inf, -inf", f"{floats.nan:,}, {floats.posinf:,}, {floats.neginf:,}"
    if floats.minimum is not None:
        yield "finite numbers", f"{floats.minimum:.6g} to {floats.maximum:.6g}"
    if floats.unused:
        rest = floats.classes - floats.unused
        yield "never used", f"the last {floats.unused:,} columns; if padding, set vocab to {rest}"
    if floats.estimate is not None:
        seconds, memory = floats.estimate.seconds, _bytes(floats.estimate.memory_bytes)
        yield (
            "to score it, estimated",
            f"{_duration(seconds)} and {memory}, by {floats.estimate.backend}",
        )


def _integers_rows(integers: Integers) -> Iterator[tuple[str, str]]:
    from fastce.scoring.inspect import MAX_DISTINCT

    yield "read", _share(integers.size_read, integers.size, "elements")
    yield "equal to -100", f"{integers.ignored:,}"
    if integers.minimum is not None:
        yield "others", f"{integers.minimum} to {integers.maximum}"
    more = " or more" if integers.distinct == MAX_DISTINCT else ""
    yield "distinct", f"{integers.distinct:,}{more}"
    for i, text in enumerate(integers.fits):
        yield "" if i else "as targets", text


def _share(n: int, total: int, what: str) -> str:
    if n == total:
        return f"all {total:,} {what}"
    return f"a sample: {n:,} of {total:,} {what}; --full reads all"


def _bytes(n: int) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:{_style(value)}}"


def _style(value: float) -> str:
    """Six decimals, where they show three digits and are not mostly noise."""
    return ".6f" if value == 0 or 1e-4 <= abs(value) < 1e6 else ".3e"


def _estimate(estimate: Estimate) -> str:
    style = _style(estimate.value)
    return f"{estimate.value:{style}} ± {estimate.error:{style}}"


def _percent_estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3%} ± {estimate.error:.3%}"


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
