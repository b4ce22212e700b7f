"""The command line: arguments and exit codes. Data go to stdout, everything else to stderr.

Libraries are imported inside the commands, so that help and completion load neither NumPy nor Numba.

Exit codes: 0 done, 1 failure, 2 usage, 3 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, Token

from fastce import __version__

_FAILURE, _USAGE, _BAD_INPUT, _INTERRUPTED = 1, 2, 3, 130

_EPILOGUE = """Examples:

    fastce demo
    fastce score logits.npy --targets targets.npy
    fastce score 'logits-*.npy' --targets targets.npy --out scores
    fastce score logits.npy --targets targets.npy -o json > figures.json
    fastce convert base.kld base.safetensors
    fastce doctor
    fastce bench --dtypes float32,float64 -o json > bench.json
    fastce bench --compare bench.json
"""

app = App(
    name="fastce",
    help="Score logits by their softmax cross-entropy: fast and accurate, on CPUs.",
    help_format="plaintext",
    help_epilogue=_EPILOGUE,
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)


def _whole_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    return tuple(int(part) for token in tokens for part in token.value.split(","))


def _names(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(part for token in tokens for part in token.value.split(","))


def _commas(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


Format = Annotated[Literal["table", "json"], Parameter(name=["--format", "-o"])]
_NUMBERS = Parameter(converter=_whole_numbers, n_tokens=1)
_NAMES = Parameter(converter=_names, n_tokens=1)
_COMMAS = Parameter(show_default=_commas)
Numbers = Annotated[tuple[int, ...], _NUMBERS, _COMMAS]
Names = Annotated[tuple[str, ...], _NAMES, _COMMAS]


@app.command
def score(
    logits: list[str],
    /,
    *,
    targets: Annotated[list[str], Parameter(consume_multiple=True)],
    out: Path | None = None,
    format_: Format = "table",
    ignore_index: int | None = -100,
    n_bytes: Annotated[int | None, Parameter(name="--bytes")] = None,
    top_k: Numbers = (1, 5),
    block_mib: int = 64,
    num_threads: int | None = None,
    backend: str | None = None,
    quiet: bool = False,
) -> int:
    """Score files of logits against files of targets.

    Parameters
    ----------
    logits
        Files of float16, bfloat16, float32 or float64, rows by classes, or quoted patterns of them
        (whose files are taken in natural order): .npy, .npz, .safetensors, .kld, Arrow, Parquet, HDF5,
        Zarr, torch's. FILE::NAME is one array of a file. Give them before the options.
    targets
        Files of integer class ids: one for all the rows in order, or one for each logits file.
    out
        Folder for the losses of each row (NAME.loss.npy) and figures.json.
    format_
        How the figures are printed.
    ignore_index
        Rows with this target are not scored.
    n_bytes
        Bytes of text that the scored rows stand for; adds bits per byte.
    top_k
        The k of the top-k accuracies, with commas.
    block_mib
        MiB of logits in memory at a time; changes no figure.
    num_threads
        Default: the cores this process may use.
    backend
        A name that `fastce doctor` lists. Default: the fastest one here.
    quiet
        Show no progress.
    """
    from fastce import BackendUnavailable, score_files, terminal
    from fastce.scoring import InputError

    try:
        with terminal.progress("scoring", quiet=quiet) as show:
            figures = score_files(
                logits,
                targets,
                ignore_index=ignore_index,
                top_k=top_k,
                n_bytes=n_bytes,
                out=out,
                block_mib=block_mib,
                num_threads=num_threads,
                backend=backend,
                progress=terminal.score_progress(show),
            )
    except InputError as error:
        return _fail(str(error), _BAD_INPUT)
    except ValueError as error:
        return _fail(str(error), _USAGE)
    except BackendUnavailable as error:
        return _fail(str(error), _FAILURE)
    if format_ == "json":
        _print_json(figures.as_dict())
    else:
        terminal.print_figures(figures)
    if figures.nonfinite:
        rows = "1 row has" if figures.nonfinite == 1 else f"{figures.nonfinite} rows have"
        terminal.say(f"fastce: warning: {rows} a loss that is NaN or infinite")
    if figures.ignored == figures.rows:
        return _fail(f"no row was scored: all {figures.rows} rows are ignored", _BAD_INPUT)
    return 0


@app.command
def convert(
    source: str,
    target: Path,
    /,
    *,
    targets: str | None = None,
    dtype: str | None = None,
    block_mib: int = 64,
    quiet: bool = False,
) -> int:
    """Write logits, and their targets, to a file of another format.

    Parameters
    ----------
    source
        A file of any format that is scored; FILE::NAME is one array of a file.
    target
        A name that ends in .npy, .safetensors, .kld, .arrow or .parquet.
    targets
        A file of class ids to write with the logits. Default: those in the source, as a .kld file has
        them.
    dtype
        float16, bfloat16, float32 or float64. Default: that of the source.
    block_mib
        MiB of logits in memory at a time.
    quiet
        Show no progress.
    """
    from fastce import terminal
    from fastce.scoring import InputError
    from fastce.scoring.convert import convert as convert_file

    try:
        with terminal.progress("converting", quiet=quiet) as show:
            written = convert_file(
                source,
                target,
                targets=targets,
                dtype=dtype,
                block_mib=block_mib,
                progress=lambda done, total: show(done, total, f"{done:,} rows"),
                on_note=lambda note: terminal.say(f"fastce: warning: {note}"),
            )
    except InputError as error:
        return _fail(str(error), _BAD_INPUT)
    except ValueError as error:
        return _fail(str(error), _USAGE)
    for path in written:
        print(path)
    return 0


@app.command
def demo(folder: Path | None = None, /, *, quiet: bool = False) -> int:
    """Train a small byte-level model on text that comes with Python, and score it.

    Takes about 20 seconds and needs no network.

    Parameters
    ----------
    folder
        Where to keep the held-out logits and targets; files of an earlier demo are replaced.
        Default: a temporary folder, removed at the end.
    quiet
        Show no progress.
    """
    import tempfile

    from fastce import terminal
    from fastce.demo import run_demo

    place = nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="fastce-")
    with place as directory, terminal.progress("training", quiet=quiet) as show:
        result = run_demo(Path(directory), on_step=show)
    terminal.print_figures(result.figures)
    print(f"A unigram model of the same text needs {result.unigram_bits:.6f} bits per byte.")
    print("To score the held-out logits again:")
    if folder is None:
        print("    fastce demo DIR")
    name = folder or Path("DIR")
    logits, targets = (shlex.quote(str(name / part)) for part in ("logits-*.npy", "targets.npy"))
    print(f"    fastce score {logits} --targets {targets} --bytes {result.figures.rows}")
    return 0


@app.command
def doctor(*, format_: Format = "table") -> int:
    """Show what fastce can use here: backends, instruction sets, threads, versions.

    Parameters
    ----------
    format_
        How to print it.
    """
    from fastce import show_config, terminal

    config = show_config("dict")
    if format_ == "json":
        _print_json(config)
    else:
        terminal.print_config(config)
    return 0


@app.command
def bench(
    *,
    backends: Annotated[tuple[str, ...] | None, _NAMES] = None,
    dtypes: Names = ("float32",),
    classes: Numbers = (10, 1000, 32_000),
    threads: Annotated[tuple[int, ...] | None, _NUMBERS] = None,
    task: Names = ("loss", "loss+grad"),
    mib: float = 256,
    seconds: float = 0.3,
    format_: Annotated[
        Literal["table", "md", "csv", "json"], Parameter(name=["--format", "-o"])
    ] = "table",
    compare: Path | None = None,
    quiet: bool = False,
) -> int:
    """Time the kernels on this machine, beside what its memory can do in the same run.

    Every combination of the values given is timed. A list is written with commas.

    Parameters
    ----------
    backends
        Names that `fastce doctor` lists. Default: all available but numpy.
    dtypes
        Of float64, float32, float16, bfloat16.
    classes
        Numbers of classes.
    threads
        Numbers of threads. Default: the cores this process may use.
    task
        Of loss, loss+grad; the gradient goes into an existing array.
    mib
        Size of the logits. What fits a cache may be faster than memory.
    seconds
        Time for each combination, once warm; slow ones take up to four times as much.
    format_
        How the figures are printed.
    compare
        Results of an earlier run, made with -o json; adds old time over new time.
    quiet
        Show no progress.
    """
    from fastce import BackendUnavailable, terminal
    from fastce import bench as benchmark

    try:
        old = benchmark.read_results(compare) if compare else None
        with terminal.progress("timing", quiet=quiet) as show:
            results = benchmark.run_bench(
                backends=backends or (),
                dtypes=dtypes,
                n_classes=classes,
                num_threads=threads or (),
                tasks=task,
                mib=mib,
                seconds=seconds,
                progress=show,
            )
    except benchmark.ResultsError as error:
        return _fail(str(error), _BAD_INPUT)
    except ValueError as error:
        return _fail(str(error), _USAGE)
    except BackendUnavailable as error:
        return _fail(str(error), _FAILURE)
    notes = benchmark.compare(results, old) if old else []
    if format_ == "json":
        _print_json(results)
    elif format_ == "table":
        terminal.print_bench(benchmark.about(results), *benchmark.table(results))
    else:
        print(benchmark.as_markdown(results) if format_ == "md" else benchmark.as_csv(results))
    for note in notes:
        terminal.say(f"fastce: {note}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result = app(argv, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError:  # which has been printed
        return _USAGE
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout has enough; nothing may be flushed there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILURE
    except OSError as error:
        return _fail(str(error), _FAILURE)
    return result if isinstance(result, int) else 0  # help and version return None


def _fail(message: str, code: int) -> int:
    print(f"fastce: {message}", file=sys.stderr)
    return code


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, allow_nan=False))
