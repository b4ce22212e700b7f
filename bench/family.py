"""Time the rest of the family: options, soft targets, statistics, binary losses, divergences.

Each contender runs in a process of its own, all its work in turns, so that a slow minute of the machine
falls on every row alike. Writes ``results/family-<machine>.json`` and the README's second table.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import table
from numpy.typing import NDArray

from fastce import cpu, registry
from fastce.bench import numpy_dtype, sample_logits

_HERE = Path(__file__).parent
_ROWS, _CLASSES, _ROUNDS = 2048, 32_000, 7
_MARKER = "family"

Call = Callable[[], Any]
Array = Any


class Work(NamedTuple):
    """One thing to compute, as fastce and as PyTorch are asked for it."""

    name: str
    arrays: int  # of the logits' size that must be read or written
    fastce: Callable[[Any, Data, dict[str, Any]], Call]
    torch: Callable[[Any, Data, Array], Array] | None = None  # of the logits, or what takes their place
    dtypes: tuple[str, ...] = ("float32",)
    of: str = "x"
    with_grad: bool = False


class Data:
    """Arrays of one dtype, NumPy's or PyTorch's, made when first asked for."""

    def __init__(self, dtype: str, scale: float, convert: Callable[[NDArray[Any]], Array]) -> None:
        self.dtype, self.rows, self._convert = dtype, max(8, int(_ROWS * scale)), convert
        self._rng, self._made = np.random.default_rng(1), dict[str, Array]()

    def __getattr__(self, name: str) -> Array:
        if name not in self._made:
            self._made[name] = self._convert(self._make(name))
        return self._made[name]

    def _make(self, name: str) -> NDArray[Any]:
        shape, rng = (self.rows, _CLASSES), self._rng
        if name in ("x", "x2"):
            logits = sample_logits(shape, self.dtype)
            return logits if name == "x" else np.ascontiguousarray(logits[::-1])
        if name == "p":  # probabilities, whatever their sum
            return rng.random(shape, np.float32).astype(numpy_dtype(self.dtype))
        if name == "bits":
            return (rng.random(shape, np.float32) < 0.5).astype(numpy_dtype(self.dtype))
        if name == "grad":
            return np.ones(shape, numpy_dtype(self.dtype))
        if name == "y":
            return rng.integers(0, _CLASSES, self.rows)
        if name == "some_ignored":
            return np.where(rng.random(self.rows) < 0.1, -100, self.y)
        if name == "weight":
            return rng.random(_CLASSES, np.float32) + np.float32(0.5)
        return rng.random(self.rows, np.float32) + np.float32(0.5)  # sample_weight


def _loss(**options: str | float) -> Callable[[Any, Data, dict[str, Any]], Call]:
    def make(fastce: Any, d: Data, how: dict[str, Any]) -> Call:
        y, given = _options(d, options)
        return lambda: fastce.cross_entropy(d.x, y, **given, **how)

    return make


def _grad(**options: str | float) -> Callable[[Any, Data, dict[str, Any]], Call]:
    def make(fastce: Any, d: Data, how: dict[str, Any]) -> Call:
        y, given = _options(d, options)
        return lambda: fastce.cross_entropy_with_grad(d.x, y, out=d.grad, **given, **how)

    return make


def _options(d: Data, options: dict[str, str | float]) -> tuple[Array, dict[str, Any]]:
    """Return targets and options; a string names an array of the data."""
    given = {k: getattr(d, v) if isinstance(v, str) else v for k, v in options.items()}
    return given.pop("targets", d.y), given


def _torch_loss(**options: str | float) -> Callable[[Any, Data, Array], Array]:
    def loss(torch: Any, d: Data, x: Array) -> Array:
        y, given = _options(d, options)
        return torch.nn.functional.cross_entropy(x, y, **given)

    return loss


def _torch_binary(torch: Any, d: Data, x: Array) -> Array:
    return torch.nn.functional.binary_cross_entropy_with_logits(x, d.bits)


def _torch_kl(torch: Any, d: Data, x: Array) -> Array:
    log_softmax = functools.partial(torch.nn.functional.log_softmax, dim=1)
    kl = torch.nn.functional.kl_div(
        log_softmax(d.x2), log_softmax(x), log_target=True, reduction="none"
    )
    return kl.sum(1)


def _fastce_binary(fastce: Any, d: Data, how: dict[str, Any]) -> Call:
    return lambda: fastce.binary_cross_entropy_with_logits(d.x, d.bits, **how)


def _fastce_binary_grad(fastce: Any, d: Data, how: dict[str, Any]) -> Call:
    return lambda: fastce.binary_cross_entropy_with_logits_with_grad(d.x, d.bits, out=d.grad, **how)


_BOTH = ("float32", "bfloat16")
_LOSS = "loss"  # what options are compared with
WORK = (
    Work(_LOSS, 1, _loss(), _torch_loss()),
    Work("loss, weight", 1, _loss(weight="weight"), _torch_loss(weight="weight")),
    Work("loss, sample_weight", 1, _loss(sample_weight="sample_weight")),
    Work(
        "loss, a tenth ignored", 1, _loss(targets="some_ignored"), _torch_loss(targets="some_ignored")
    ),
    Work("loss, label_smoothing", 1, _loss(label_smoothing=0.1), _torch_loss(label_smoothing=0.1)),
    Work("row_stats, all", 1, lambda f, d, how: lambda: f.row_stats(d.x, d.y, **how)),
    Work(
        "logsumexp",
        1,
        lambda f, d, how: lambda: f.logsumexp(d.x, **how),
        lambda torch, d, x: torch.logsumexp(x, 1),
    ),
    Work(
        "softmax",
        2,
        lambda f, d, how: lambda: f.softmax(d.x, out=d.grad, **how),
        lambda torch, d, x: torch.softmax(x, 1),
    ),
    Work(
        "log_softmax",
        2,
        lambda f, d, how: lambda: f.log_softmax(d.x, out=d.grad, **how),
        lambda torch, d, x: torch.log_softmax(x, 1),
    ),
    Work("soft targets, loss", 2, _loss(targets="p"), _torch_loss(targets="p"), _BOTH),
    Work(
        "soft targets, loss + grad",
        3,
        _grad(targets="p"),
        _torch_loss(targets="p"),
        _BOTH,
        with_grad=True,
    ),
    Work("binary with logits, loss", 2, _fastce_binary, _torch_binary, _BOTH),
    Work(
        "binary with logits, loss + grad", 3, _fastce_binary_grad, _torch_binary, _BOTH, with_grad=True
    ),
    Work(
        "KL of two logits",
        2,
        lambda f, d, how: lambda: f.info.kl_divergence_from_logits(d.x, d.x2, **how),
        _torch_kl,
        _BOTH,
    ),
    Work("entropy of logits", 1, lambda f, d, how: lambda: f.info.entropy_from_logits(d.x, **how)),
    Work(
        "entropy of probabilities",
        1,
        lambda f, d, how: lambda: f.info.entropy(d.p, **how),
        lambda torch, d, x: torch.special.entr(x).sum(1),
        of="p",
    ),
)

CONTENDERS = (*(f"fastce-{b.name}" for b in registry.BACKENDS[:-1]), "torch", "torch-compile")


def _calls(contender: str, n_threads: int, scale: float) -> dict[tuple[str, str], Call]:
    """Return what one contender can compute, by name and dtype."""
    if contender.startswith("fastce-"):
        import fastce

        how = {"backend": contender.removeprefix("fastce-"), "num_threads": n_threads}
        data = {dtype: Data(dtype, scale, lambda array: array) for dtype in _BOTH}
        return {(w.name, t): w.fastce(fastce, data[t], how) for w in WORK for t in w.dtypes}
    import torch

    torch.set_num_threads(n_threads)

    def tensor(array: NDArray[Any]) -> Array:
        if array.dtype.name == "bfloat16":  # which from_numpy does not know
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    data = {dtype: Data(dtype, scale, tensor) for dtype in _BOTH}
    calls = {}
    for work in WORK:
        for dtype in work.dtypes if work.torch else ():
            of = getattr(data[dtype], work.of)
            function = functools.partial(work.torch, torch, data[dtype])
            function(of)  # makes the data before it is traced
            if contender == "torch-compile":
                function = torch.compile(function, dynamic=False)
            calls[work.name, dtype] = (
                _with_grad(torch, function, of) if work.with_grad else functools.partial(function, of)
            )
    return calls


def _with_grad(torch: Any, loss: Callable[[Array], Array], x: Array) -> Call:
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(leaf), leaf)


def _measure(contender: str, n_threads: int, scale: float) -> list[dict[str, Any]]:
    """Time all of a contender's calls in turns, after one that is not counted."""
    calls = _calls(contender, n_threads, scale)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for number in range(_ROUNDS + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                samples[key].append(time.perf_counter() - start)
    return [
        {"work": name, "dtype": dtype, "samples_s": [float(f"{s:.4g}") for s in times]}
        for (name, dtype), times in samples.items()
    ]


def _table(report: dict[str, Any]) -> str:
    """Return the README's table."""
    rows, n_elements = report["results"], report["n_elements"]
    names = [name for name in CONTENDERS if name in rows]
    ours = [name for name in names if name.startswith("fastce-")]
    shown = [name for name in names if name in (report["best"], "fastce-numba") or name not in ours]
    seconds = {
        (name, cell["work"], cell["dtype"]): statistics.median(cell["samples_s"])
        for name in names
        for cell in rows[name]
    }
    read = statistics.median(report["bandwidth"]["read"])
    lines = [
        f"{report['machine']}, {report['n_threads']} threads, {report['date'][:10]}; "
        f"{n_elements // _CLASSES} x {_CLASSES} logits; nanoseconds per logit, medians. "
        f"Read bandwidth in the same run: {read:.1f} GB/s.",
        "",
        f"| work | dtype | {' | '.join(shown)} | of the plain loss | GB/s | vs torch |",
        f"| --- | --- |{' ---: |' * (len(shown) + 3)}",
    ]
    for work in WORK:
        for dtype in work.dtypes:
            found = [seconds.get((name, work.name, dtype)) for name in shown]
            best, name = min((seconds[n, work.name, dtype], n) for n in ours)
            size = numpy_dtype(dtype).itemsize
            rate = work.arrays * n_elements * size / best / 1e9
            eager = seconds.get(("torch", work.name, dtype))
            plain = seconds.get((name, _LOSS, dtype)) if work.arrays == 1 else None
            cells = [f"{s / n_elements * 1e9:.2f}" if s else "-" for s in found]
            cells.append(f"{best / plain:.2f} x" if plain else "")
            cells.append(f"{rate:.1f} ({100 * rate / read:.0f}%)")
            cells.append(f"{eager / best:.1f} x" if eager else "")
            lines.append(f"| {work.name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _run(*command: str) -> Any:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Run every contender in a process of its own."""
    names = args.only.split(",") if args.only else CONTENDERS
    results = {}
    for name in names:
        print(name, file=sys.stderr)
        how = ("--threads", str(args.threads), "--rows-scale", str(args.rows_scale))
        results[name] = _run(__file__, "--one", name, *how)
    return {
        "machine": cpu.model(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "n_threads": args.threads,
        "n_elements": max(8, int(_ROWS * args.rows_scale)) * _CLASSES,
        "best": f"fastce-{registry.choose('auto', 'float32').name}",
        "bandwidth": _run(str(_HERE / "bandwidth.py"), "--threads", str(args.threads)),
        "results": results,
    }


def main() -> None:
    """Measure, and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=cpu.usable_cores(), help="default: %(default)s")
    parser.add_argument(
        "--rows-scale", type=float, default=1.0, help="fraction of the rows, for a trial"
    )
    parser.add_argument("--only", help="contenders, such as fastce-numba,torch (default: all)")
    parser.add_argument(
        "--merge", action="store_true", help="keep what the results have of other contenders"
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: the table of the results"
    )
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args.one, args.threads, args.rows_scale)))
        return
    model = re.sub(r"\(\w+\)", "", cpu.model())
    slug = re.sub(r"[^a-z0-9]+", "-", f"family {model} {args.threads} threads".lower()).strip("-")
    path = _HERE / "results" / f"{slug}.json"
    whole = args.rows_scale == 1
    if args.render:
        report = json.loads(path.read_text("utf-8"))
    else:
        report = _report(args)
        if args.merge:
            earlier = json.loads(path.read_text("utf-8"))["results"]
            report["results"] = earlier | report["results"]
        if whole:
            text = json.dumps(report, indent=1)
            path.write_text(
                re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n", "utf-8"
            )
    found = _table(report)
    print(found)
    if whole or args.render:
        table.write(_HERE.parent / "README.md", found, _MARKER)


if __name__ == "__main__":
    main()
