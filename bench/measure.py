"""Time one contender on one workload, in this process; prints JSON. `report` runs it for each pair."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accuracy
import contenders
import numpy as np
from numpy.typing import NDArray
from workloads import FRESH, WORKLOADS, Workload

from fastce.bench import timed

_SECONDS = 0.3  # for each task, once warm; of a slow contender up to 1.2, see `timed`
_KEPT = 15  # samples at the most, evenly picked: the results are kept in the repository


class Inputs(NamedTuple):
    """A workload's data, a gradient buffer whose pages exist, and the true values."""

    batch: contenders.Batch
    grad_buffer: NDArray[Any]
    truth: accuracy.Reference | None


def prepare(workload: Workload) -> Inputs:
    """Make what every contender gets."""
    logits, targets = workload.data()
    # np.zeros would leave the first touch of each page to the first contender.
    grad_buffer = np.full(logits.shape, 1, logits.dtype)
    truth = accuracy.reference(logits, targets, workload.axis)
    return Inputs(contenders.Batch(logits, targets, workload.axis), grad_buffer, truth)


def bind(contender: contenders.Contender, inputs: Inputs, task: str) -> Callable[[], Any]:
    """Return the call to time; conversions to the library's own arrays are made here."""
    if task == "loss":
        return contender.loss(inputs.batch)
    return contender.loss_grad(inputs.batch, None if task == FRESH else inputs.grad_buffer)


def errors(contender: contenders.Contender, result: Any, task: str, inputs: Inputs) -> dict[str, Any]:
    """Judge what a bound call returned."""
    losses, grad = (result, None) if task == "loss" else result
    return accuracy.errors(
        contender.to_numpy(losses), None if grad is None else contender.to_numpy(grad), inputs.truth
    )


def _peak_memory(call: Callable[[], Any]) -> tuple[int | None, Any]:
    """Return the bytes a call adds to what the process holds, at the worst moment; and its result.

    Linux alone can forget an earlier peak; elsewhere there is no figure.
    """
    try:
        _return_freed_memory()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        result = call()
        return max(0, _status("VmHWM") - before), result
    except OSError:
        return None, call()


def _return_freed_memory() -> None:
    """Give back what the allocator keeps of freed memory, so that using it again shows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])


def _measure(contender: contenders.Contender, inputs: Inputs, task: str) -> dict[str, Any]:
    call = bind(contender, inputs, task)
    found: dict[str, Any] = {}

    def judged() -> None:
        found["peak_bytes"], result = _peak_memory(call)
        found["errors"] = errors(contender, result, task, inputs)

    timing = timed(call, _SECONDS, judged)
    return found | {
        "first_call_s": _digits(timing.first),
        "samples_s": [
            _digits(sample) for sample in timing.samples[:: len(timing.samples) // _KEPT + 1]
        ],
    }


def _digits(seconds: float) -> float:
    return float(f"{seconds:.4g}")  # the clock knows no more


def _all_tasks(name: str, workload: Workload, num_threads: int) -> dict[str, Any]:
    """Return the measurements of each task, or why there are none."""
    if contenders.too_slow(name, workload.dtype, workload.n_elements):
        return {"absent": "not run: too slow"}
    try:
        contender = contenders.load(name, num_threads)
        inputs = prepare(workload)
        found = {}
        for task in workload.tasks:
            if task == FRESH and not contender.fills:
                found[task] = found["loss+grad"]  # it was fresh already
            else:
                found[task] = _measure(contender, inputs, task)
    except contenders.AbsentError as absent:
        return {"absent": str(absent)}
    except Exception as error:  # whatever it is, the others' results must not be lost for it
        traceback.print_exc()
        message = str(error).partition("\n")[0]
        return {"failed": f"{type(error).__name__}: {message}"}
    return {"fills": contender.fills, "tasks": found}


def main() -> None:
    """Measure all tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=contenders.CONTENDERS)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rows-scale", type=float, default=1.0)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        # Before the libraries start their threads: the only limit that all of them, XLA too, obey.
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        os.sched_setaffinity(0, cores)
    workload = WORKLOADS[args.workload].scaled(args.rows_scale)
    print(json.dumps(_all_tasks(args.contender, workload, args.threads)))


if __name__ == "__main__":
    main()
