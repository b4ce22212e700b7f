"""Time the losses by pytest-benchmark: ``python -m pytest bench --benchmark-only``.

For a look while working on a kernel, and to compare with a saved run. All contenders share one
process here; figures to publish come from ``report.py``, which gives each its own.
"""

from __future__ import annotations

import functools

import contenders
import measure
import pytest
from conftest import RESULTS
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import TASKS, WORKLOADS

from fastce import cpu

_load = functools.cache(contenders.load)
# One at a time: the largest takes 1 GB. The workload is the outermost parameter, so one is enough.
_prepare = functools.lru_cache(maxsize=1)(measure.prepare)


@pytest.mark.parametrize("name", contenders.CONTENDERS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_losses(benchmark: BenchmarkFixture, request, workload, task, name):
    try:
        contender = _load(name)
    except contenders.AbsentError as absent:
        pytest.skip(f"{name}: {absent}")
    inputs = _prepare(workload)
    n_threads = cpu.usable_cores()
    benchmark.group = f"{workload.name} {task}"
    call = measure.bind(contender, inputs, task, n_threads)
    found = measure.errors(call(), task, inputs)  # the warm-up: compilation is not timed
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(found, n_threads=n_threads)
    if benchmark.enabled:
        seconds = benchmark.stats.stats.median
        rate = benchmark.extra_info["gb_per_s"] = workload.model_bytes(task) / seconds / 1e9
        request.config.stash[RESULTS].append((benchmark.group, name, seconds, rate, found))
