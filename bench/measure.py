"""Time one contender on one workload, in this process; prints JSON. `report` runs it for each pair."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import accuracy
import contenders
import numpy as np
from numpy.typing import NDArray
from workloads import TASKS, WORKLOADS, Workload

# Calls are repeated until both are reached, but no longer than the last.
_MIN_CALLS = 5
_MIN_SECONDS = 0.3
_MAX_SECONDS = 5.0


class Inputs(NamedTuple):
    """A workload's data, a gradient buffer whose pages exist, and the true values."""

    logits: NDArray[Any]
    targets: NDArray[np.int64]
    grad_buffer: NDArray[Any]
    truth: accuracy.Reference | None


def prepare(workload: Workload) -> Inputs:
    """Make what every contender gets."""
    logits, targets = workload.data()
    # np.zeros would leave the first touch of each page to the first contender.
    grad_buffer = np.full_like(logits, np.nan)
    return Inputs(logits, targets, grad_buffer, accuracy.reference(logits, targets))


def bind(
    contender: contenders.Contender, inputs: Inputs, task: str, n_threads: int
) -> Callable[[], Any]:
    """Return the call to time; conversions to the library's own arrays are made here."""
    logits, targets = contender.inputs(inputs.logits, inputs.targets)
    if task == "loss":
        return lambda: contender.loss(logits, targets, n_threads)
    return lambda: contender.loss_grad(logits, targets, inputs.grad_buffer, n_threads)


def errors(result: Any, task: str, inputs: Inputs) -> dict[str, float]:
    """Judge what a bound call returned."""
    losses, grad = (result, None) if task == "loss" else result
    return accuracy.errors(np.asarray(losses), None if grad is None else np.asarray(grad), inputs.truth)


def _measure(call: Callable[[], Any], task: str, inputs: Inputs) -> dict[str, Any]:
    start = time.perf_counter()
    result = call()
    first = time.perf_counter() - start  # with compilation, where there is any
    found = errors(result, task, inputs)
    del result  # else a contender with fresh arrays would hold two
    call()
    samples: list[float] = []
    while (len(samples) < _MIN_CALLS or sum(samples) < _MIN_SECONDS) and sum(samples) < _MAX_SECONDS:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return {"first_call_s": first, "samples_s": samples, "errors": found}


def main() -> None:
    """Measure all tasks; a contender that cannot run gives its reason instead."""
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
    try:
        contender = contenders.load(args.contender)
    except contenders.AbsentError as absent:
        print(json.dumps({"absent": str(absent)}))
        return
    inputs = prepare(WORKLOADS[args.workload].scaled(args.rows_scale))
    try:
        found = {
            task: _measure(bind(contender, inputs, task, args.threads), task, inputs) for task in TASKS
        }
    except Exception as error:  # whatever it is, the others' results must not be lost for it
        traceback.print_exc()
        message = str(error).partition("\n")[0]
        print(json.dumps({"failed": f"{type(error).__name__}: {message}"}))
        return
    print(json.dumps({"tasks": found}))


if __name__ == "__main__":
    main()
