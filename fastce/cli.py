"""The command line: arguments and exit codes. Data go to stdout, everything else to stderr.

Libraries are imported inside the commands, so that help and completion load neither NumPy nor Numba.

Exit codes: 0 done, 1 failure, 2 usage, 3 bad input, 4 a --fail-if gate failed, 5 incomplete but
resumable, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, Token

from fastce import __version__

if TYPE_CHECKING:
    from fastce.scoring import Figures

_FAILURE, _USAGE, _BAD_INPUT, _GATE, _INCOMPLETE, _INTERRUPTED = 1, 2, 3, 4, 5, 130

# What a write fails with where there is nothing wrong but the room: no space, quota, file size, device.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

_EPILOGUE = """Examples:

    fastce demo
    fastce score logits.npy --targets targets.npy
    fastce score 'logits-*.npy' --targets targets.npy --out scores
    fastce score logits.npy --targets targets.npy -o json > figures.json
    fastce score base.kld --fail-if 'ppl>12'
    fastce score 'logits-*.npy' --targets targets.npy --out scores --dask local:4
    fastce compare base.npy quantised.npy --targets targets.npy
    fastce convert base.kld base.safetensors
    fastce calibrate logits.npy --targets targets.npy --plot calibration.png
    fastce inspect logits.npy targets.npy
    fastce doctor
    fastce bench --dtypes float32,float64 -o json > bench.json
    fastce bench --compare bench.json
"""

app = App(
    name="fastce",
    help="Score logits by their softmax cross-entropy: fast and accurate, on CPUs.",
    help_format="markdown",
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


_INPUT = Group("What the files hold", sort_key=1)
_FIGURES = Group("Figures", sort_key=2)
_RUN = Group("How it runs", sort_key=3)

Format = Annotated[Literal["table", "json"], Parameter(name=["--format", "-o"])]
_NUMBERS = Parameter(converter=_whole_numbers, n_tokens=1)
_NAMES = Parameter(converter=_names, n_tokens=1)
_COMMAS = Parameter(show_default=_commas)
Numbers = Annotated[tuple[int, ...], _NUMBERS, _COMMAS]
FigureFormat = Annotated[
    Literal["table", "md", "csv", "json", "jsonl"], Parameter(name=["--format", "-o"])
]
Targets = Annotated[list[str] | None, Parameter(consume_multiple=True)]
Kind = Annotated[Literal["logits", "logprobs", "probs"] | None, Parameter(group=_INPUT)]
Bits = Annotated[Literal["bf16"] | None, Parameter(group=_INPUT)]
Ignored = Annotated[int | None, Parameter(group=_INPUT)]
Files = Annotated[list[str] | None, Parameter(group=_INPUT, consume_multiple=True)]
Whole = Annotated[int | None, Parameter(group=_INPUT)]
Flag = Annotated[bool, Parameter(group=_INPUT)]
Picture = Annotated[Path | None, Parameter(group=_FIGURES)]
FailIf = Annotated[list[str] | None, Parameter(group=_FIGURES)]
BlockMib = Annotated[int, Parameter(group=_RUN)]
Threads = Annotated[int | None, Parameter(group=_RUN)]
BackendName = Annotated[str | None, Parameter(group=_RUN)]
Quiet = Annotated[bool, Parameter(group=_RUN)]
Names = Annotated[tuple[str, ...], _NAMES, _COMMAS]


@app.command
def score(
    logits: list[str],
    /,
    *,
    targets: Targets = None,
    out: Path | None = None,
    format_: FigureFormat = "table",
    kind: Kind = None,
    dtype: Bits = None,
    ignore_index: Ignored = -100,
    mask: Files = None,
    vocab: Whole = None,
    shift: Flag = False,
    seq_len: Whole = None,
    lengths: Files = None,
    temperature: Annotated[float, Parameter(group=_INPUT)] = 1.0,
    n_bytes: Annotated[int | None, Parameter(name="--bytes", group=_FIGURES)] = None,
    n_words: Annotated[int | None, Parameter(name="--words", group=_FIGURES)] = None,
    top_k: Annotated[tuple[int, ...], _NUMBERS, _COMMAS, Parameter(group=_FIGURES)] = (1, 5),
    bins: Annotated[int, Parameter(group=_FIGURES)] = 15,
    losses: Annotated[Literal["npy", "parquet"], Parameter(group=_FIGURES)] = "npy",
    hash_inputs: Annotated[bool, Parameter(name="--hash", group=_FIGURES)] = False,
    fail_if: FailIf = None,
    explain: Annotated[bool, Parameter(group=_FIGURES)] = False,
    shard: Annotated[str | None, Parameter(group=_RUN)] = None,
    dask: Annotated[str | None, Parameter(group=_RUN)] = None,
    resume: Annotated[bool, Parameter(group=_RUN, negative="--no-resume")] = True,
    block_mib: BlockMib = 64,
    num_threads: Threads = None,
    backend: BackendName = None,
    plot: Picture = None,
    quiet: Quiet = False,
) -> int:
    """Score files of logits against files of targets.

    Reads .npy, .npz, .safetensors, llama.cpp's .kld, Arrow, Parquet, HDF5, Zarr and PyTorch files;
    FILE::NAME is one array of a file that has several. A run with --out that is interrupted goes on
    where it was when it is started again.

    Parameters
    ----------
    logits
        Files of float16, bfloat16, float32 or float64, rows by classes, or quoted patterns of them
        (whose files are taken in natural order). Give them before the options.
    targets
        Files of integer class ids: one for all the rows in order, or one for each logits file. Default:
        those in the same file, as a .kld file has them.
    out
        Folder for the losses of each row (NAME.loss.npy), figures.json, and what resuming needs.
    format_
        How the figures are printed.
    kind
        What the numbers are. Default: what the format says, else logits.
    dtype
        16-bit integers are the bits of bfloat16.
    ignore_index
        Rows with this target are not scored.
    mask
        Files like targets: rows where they hold 0 are not scored.
    vocab
        Use the first so many classes alone: a padded vocabulary.
    shift
        The target of a row is the next row's, within its sequence: logits beside their own tokens.
    seq_len
        Rows of a sequence. Default: the middle one of three axes, if there are three.
    lengths
        Files with the rows of each sequence, in order, where these differ.
    temperature
        Divide the logits by it.
    n_bytes
        Bytes of text that the scored rows stand for; adds bits per byte.
    n_words
        Words of it; adds perplexity per word.
    top_k
        The k of the top-k accuracies, with commas.
    bins
        Bins of the calibration errors.
    losses
        How the losses of each row are written to --out.
    hash_inputs
        Tell the SHA-256 of each input in JSON; reads them once more.
    fail_if
        A condition such as 'ppl>12' or 'ece>=0.05' that ends in exit code 4; may be repeated.
    explain
        Say how each figure is defined.
    shard
        I/N: score the I-th of N shares of the rows into --out; `fastce merge` puts them together.
    dask
        Score on a Dask cluster, tcp://HOST:PORT, or on N processes here, local:N.
    resume
        Keep what an earlier run with the same --out has done, or do everything again.
    block_mib
        MiB of logits in memory at a time; changes no figure.
    num_threads
        Default: the cores this process may use; on Dask 1.
    backend
        A name that `fastce doctor` lists. Default: the fastest one here.
    plot
        A picture of the figures, .png, .svg or .pdf: reliability, losses, and losses by position
        where rows are sequences. Needs matplotlib.
    quiet
        Show no progress.
    """
    from fastce import score_files, terminal
    from fastce.scoring import Figures
    from fastce.scoring.gates import failed, parse_gates

    gates = parse_gates(fail_if or [], [field.name for field in fields(Figures)])
    _check_picture(plot)
    with ExitStack() as stack:
        executor = None
        if dask is not None:
            from fastce.interop.dask import cluster_executor

            executor = stack.enter_context(cluster_executor(dask))
        show = stack.enter_context(terminal.progress("scoring", quiet=quiet))
        figures = score_files(
            logits,
            targets,
            mask=mask,
            ignore_index=ignore_index,
            kind=kind,
            vocab=vocab,
            temperature=temperature,
            dtype=dtype,
            seq_len=seq_len,
            lengths=lengths,
            shift=shift,
            top_k=top_k,
            n_bins=bins,
            n_bytes=n_bytes,
            n_words=n_words,
            out=out,
            loss_format=losses,
            hash_inputs=hash_inputs,
            resume=resume,
            shard=None if shard is None else _share(shard),
            executor=executor,
            block_mib=block_mib,
            num_threads=num_threads,
            backend=backend,
            progress=terminal.score_progress(show),
        )
    _plot(plot, figures)
    _print_figures(figures, format_, explain=explain)
    if shard is not None:
        terminal.say(f"fastce: share {shard} is done; when all are: fastce merge {out}")
    if figures.ignored == figures.rows:
        return _fail(f"no row was scored: all {figures.rows} rows are ignored", _BAD_INPUT)
    return _say_gates(failed(gates, figures.as_dict()["figures"]))


def _say_gates(messages: Sequence[str]) -> int:
    from fastce import terminal

    for message in messages:
        terminal.say(f"fastce: gate failed: {message}")
    return _GATE if messages else 0


def _share(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise ValueError(f"shard: expected I/N such as 2/8, got {text!r}")
    return int(i), int(n)


def _print_figures(figures: Figures, format_: str, *, explain: bool = False) -> None:
    from fastce import terminal
    from fastce.scoring.figures import definitions

    if format_ in ("json", "jsonl"):
        _print_json(figures.as_dict(), lines=format_ == "jsonl")
    else:
        terminal.print_figures(figures, format_)
    if explain:
        terminal.print_definitions(definitions(), to_stderr=format_ != "table")
    for warning in figures.warnings:
        terminal.say(f"fastce: warning: {warning}")
    _say_nonfinite(figures.nonfinite, "loss")


def _say_nonfinite(n_rows: int, what: str) -> None:
    from fastce import terminal

    if n_rows:
        rows = "1 row has" if n_rows == 1 else f"{n_rows} rows have"
        terminal.say(f"fastce: warning: {rows} a {what} that is NaN or infinite")


@app.command
def merge(
    folders: list[Path],
    /,
    *,
    out: Path | None = None,
    format_: FigureFormat = "table",
) -> int:
    """Put the shares of a run (fastce score --shard I/N) together.

    Parameters
    ----------
    folders
        Folders given to --out, one for all shares or one for each.
    out
        Where to write losses and figures. Default: the first folder.
    format_
        How the figures are printed.
    """
    from fastce.scoring import merge_folders

    _print_figures(merge_folders(folders, out or folders[0]), format_)
    return 0


@app.command
def verify(folder: Path, /) -> int:
    """Check every record of a run against the files: nothing lost, doubled or changed.

    Parameters
    ----------
    folder
        A folder given to --out.
    """
    from fastce.scoring import verify_folder

    wrong = verify_folder(folder)
    for message in wrong:
        print(message)
    if wrong:
        return _fail(f"{folder}: {len(wrong)} things wrong", _FAILURE)
    print(f"{folder}: complete, and as recorded")
    return 0


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print a script that completes fastce's commands and options in a shell.

    Parameters
    ----------
    shell
        For example: fastce completion bash > ~/.local/share/bash-completion/completions/fastce
    """
    print(app.generate_completion(prog_name="fastce", shell=shell))
    return 0


@app.command
def compare(
    base: str,
    other: str,
    /,
    *,
    targets: Targets = None,
    llama_compat: bool = False,
    format_: Annotated[Literal["table", "md", "json"], Parameter(name=["--format", "-o"])] = "table",
    ignore_index: Ignored = -100,
    vocab: Whole = None,
    worst: int = 10,
    fail_if: FailIf = None,
    block_mib: BlockMib = 64,
    num_threads: Threads = None,
    backend: BackendName = None,
    quiet: Quiet = False,
) -> int:
    """Compare two dumps of the same rows: perplexities, KL divergence, probabilities of the targets.

    Prints llama.cpp's table, in which Q is the other dump, and more.

    Parameters
    ----------
    base
        The reference: a file of logits as `fastce score` takes it, or a quoted pattern of files.
    other
        What is held against it; of any dtype, and cut into files in any way.
    targets
        .npy files of integer class ids: one for all the rows in order, or one for each file of base.
        Without them there is no perplexity and no Δp.
    llama_compat
        Print llama.cpp's table, in its layout and to the same digits, computed as it does.
    format_
        How the figures are printed.
    ignore_index
        Rows with this target are left out of every figure.
    vocab
        Compare the first so many classes, where a dump has more than the vocabulary.
    worst
        How many of the rows of the largest divergence to name.
    fail_if
        A condition such as 'kld>0.06' or 'same_top<0.95' that ends in exit code 4; may be repeated.
    block_mib
        MiB of logits in memory at a time; changes no figure.
    num_threads
        Default: the cores this process may use.
    backend
        A name that `fastce doctor` lists. Default: the fastest one here.
    quiet
        Show no progress.
    """
    from fastce import compare_files, terminal
    from fastce.scoring import Comparison, llama
    from fastce.scoring.gates import failed, parse_gates

    gates = parse_gates(fail_if or [], [field.name for field in fields(Comparison)])
    with terminal.progress("comparing", quiet=quiet) as show:
        comparison = compare_files(
            base,
            other,
            targets,
            ignore_index=ignore_index,
            vocab=vocab,
            worst=worst,
            llama_compat=llama_compat,
            block_mib=block_mib,
            num_threads=num_threads,
            backend=backend,
            progress=terminal.compare_progress(show),
        )
    n_kept = comparison.rows - comparison.ignored
    if format_ == "json":
        _print_json(comparison.as_dict())
    elif format_ == "md" or not llama_compat:
        terminal.print_comparison(comparison, markdown=format_ == "md")
    elif n_kept >= llama.MIN_ROWS:
        print(llama.as_text(comparison))
    _say_nonfinite(comparison.nonfinite, "loss or divergence")
    if not n_kept:
        return _fail(f"no row was compared: all {comparison.rows} rows are ignored", _BAD_INPUT)
    if llama_compat and format_ == "table" and n_kept < llama.MIN_ROWS:
        return _fail(
            f"llama.cpp's table needs {llama.MIN_ROWS} rows, got {n_kept}; "
            "leave --llama-compat out, or use -o json",
            _BAD_INPUT,
        )
    return _say_gates(failed(gates, comparison.as_dict()["figures"]))


@app.command
def convert(
    source: str,
    target: Path,
    /,
    *,
    targets: str | None = None,
    dtype: str | None = None,
    block_mib: BlockMib = 64,
    quiet: Quiet = False,
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
    from fastce.scoring.convert import convert as convert_file

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
    for path in written:
        print(path)
    return 0


@app.command
def calibrate(
    logits: list[str],
    /,
    *,
    targets: Targets = None,
    mask: Files = None,
    ignore_index: Ignored = -100,
    kind: Kind = None,
    vocab: Whole = None,
    dtype: Bits = None,
    seq_len: Whole = None,
    lengths: Files = None,
    shift: Flag = False,
    bins: Annotated[int, Parameter(group=_FIGURES)] = 15,
    format_: Format = "table",
    plot: Picture = None,
    block_mib: BlockMib = 64,
    num_threads: Threads = None,
    backend: BackendName = None,
    quiet: Quiet = False,
) -> int:
    """Find the temperature that fits files of logits best: that of the least mean NLL.

    Prints figures and reliability before and after. Use rows that nothing else will be measured on.
    Reads the files about 8 times. Exit code 1 if no temperature is best: every target already has the
    largest logit, or the logits say nothing of the targets.

    Parameters
    ----------
    logits
        Files of logits, or quoted patterns of them, as `fastce score` takes them.
    targets
        Files of integer class ids: one for all the rows in order, or one for each logits file.
    mask
        Files as targets: rows where they are 0 are not scored.
    ignore_index
        Rows with this target are not scored.
    kind
        What the numbers are. Default: what the format says, else logits.
    vocab
        Use the first so many classes alone: a padded vocabulary.
    dtype
        16-bit integers are the bits of bfloat16.
    seq_len
        Rows of a sequence, for the loss by position. Default: the middle axis of three.
    lengths
        Files with the rows of each sequence, in order, where these differ.
    shift
        The target of a row is that of the next row, within its sequence.
    bins
        Bins of the calibration errors.
    format_
        How the figures are printed.
    plot
        A picture of them, .png, .svg or .pdf, before and after. Needs matplotlib.
    block_mib
        MiB of logits in memory at a time; changes no figure.
    num_threads
        Default: the cores this process may use.
    backend
        A name that `fastce doctor` lists. Default: the fastest one here.
    quiet
        Show no progress.
    """
    from fastce import calibrate_files, terminal

    _check_picture(plot)
    with terminal.progress("calibrating", quiet=quiet) as show:
        found = calibrate_files(
            logits,
            targets,
            mask=mask,
            ignore_index=ignore_index,
            kind=kind,
            vocab=vocab,
            dtype=dtype,
            seq_len=seq_len,
            lengths=lengths,
            shift=shift,
            n_bins=bins,
            block_mib=block_mib,
            num_threads=num_threads,
            backend=backend,
            progress=terminal.calibrate_progress(show),
        )
    _plot(plot, found.before, found.after)
    if format_ == "json":
        _print_json(found.as_dict())
    else:
        terminal.print_calibration(found)
        if found.temperature is not None:
            print(f"To score with it: fastce score ... --temperature {found.temperature:.7g}")
    for warning in found.before.warnings:
        terminal.say(f"fastce: warning: {warning}")
    if found.status == "undefined":
        n_kept = found.before.rows - found.before.ignored
        why = f"{found.before.nonfinite} of {n_kept} losses are NaN or infinite; mask those rows"
        return _fail(f"no temperature: {why if n_kept else 'no row is scored'}", _BAD_INPUT)
    if found.status == "separable":
        return _fail("no temperature is best: every target has the largest logit already", _FAILURE)
    if found.status == "uninformative":
        return _fail(
            "no temperature is best: the NLL falls until rows are uniform; "
            "do the targets belong to these logits?",
            _FAILURE,
        )
    return 0


@app.command
def inspect(
    files: list[str],
    /,
    *,
    full: bool = False,
    dtype: Bits = None,
    format_: Format = "table",
    num_threads: Threads = None,
    backend: BackendName = None,
) -> int:
    """Say what is in files of logits or targets, and what it looks like.

    Parameters
    ----------
    files
        Files of any format that `fastce score` reads, or quoted patterns of them. Targets beside
        logits are checked against them.
    full
        Read arrays whole. Default: those up to 64 MiB, and samples of larger ones.
    dtype
        16-bit integers are the bits of bfloat16.
    format_
        How it is printed.
    num_threads
        For the estimate. Default: the cores this process may use.
    backend
        For the estimate. Default: the fastest one here.
    """
    from fastce import inspect_files, terminal

    found = inspect_files(files, full=full, dtype=dtype, num_threads=num_threads, backend=backend)
    if format_ == "json":
        _print_json({"arrays": [one.as_dict() for one in found]})
    else:
        terminal.print_inspections(found)
    return 0


@app.command
def demo(folder: Path | None = None, /, *, quiet: Quiet = False) -> int:
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
    print("The held-out logits, once more:")
    if folder is None:
        print("    fastce demo DIR")
    name = folder or Path("DIR")
    logits, targets = (shlex.quote(str(name / part)) for part in ("logits-*.npy", "targets.npy"))
    print(f"    fastce score {logits} --targets {targets} --bytes {result.figures.rows}")
    print(f"    fastce calibrate {logits} --targets {targets}")
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
    from fastce import bench as benchmark
    from fastce import terminal

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
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        result = app(words, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError:  # which has been printed
        return _USAGE
    except KeyboardInterrupt:
        return _fail(f"interrupted{_how_to_resume(words)}", _INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout has enough; nothing may be flushed there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILURE
    except OSError as error:
        resume = _how_to_resume(words) if error.errno in _NO_ROOM else ""
        return _fail(f"{error}{resume}", _INCOMPLETE if resume else _FAILURE)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        return _fail(str(error), code)
    return result if isinstance(result, int) else 0  # help and version return None


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that users can mend; None for one that is ours."""
    from fastce import BackendUnavailable
    from fastce.bench import ResultsError
    from fastce.scoring import IncompleteError, InputError

    if isinstance(error, (InputError, ResultsError)):
        return _BAD_INPUT
    if isinstance(error, IncompleteError):
        return _INCOMPLETE
    if isinstance(error, (BackendUnavailable, ModuleNotFoundError)):
        return _FAILURE
    return _USAGE if isinstance(error, ValueError) else None


def _how_to_resume(words: Sequence[str]) -> str:
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        return ""
    return f"; what is done is kept, and this goes on from there:\n    fastce {shlex.join(words)}"


def _fail(message: str, code: int) -> int:
    print(f"fastce: {message}", file=sys.stderr)
    return code


def _check_picture(path: Path | None) -> None:
    if path is not None:
        from fastce.scoring.plots import check_picture

        check_picture(path)


def _plot(path: Path | None, figures: Figures, after: Figures | None = None) -> None:
    if path is not None:
        from fastce.scoring.plots import plot_figures

        plot_figures(figures, path, after=after)


def _print_json(values: dict[str, Any], *, lines: bool = False) -> None:
    print(json.dumps(values, indent=None if lines else 2, allow_nan=False))
