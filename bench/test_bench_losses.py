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
from workloads import WORKLOADS

from fastce import cpu

_load = functools.cache(contenders.load)
# One at a time: the largest takes 1 GB. The workload is the outermost parameter, so one is enough.
_prepare = functools.lru_cache(maxsize=1)(measure.prepare)

# What peers warn of is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

_SMALL = 10_000  # elements; below, many calls are averaged in each round


@pytest.mark.parametrize("name", contenders.CONTENDERS)
@pytest.mark.parametrize(
    ("workload", "task"),
    [
        pytest.param(workload, task, id=f"{workload.name}-{task}")
        for workload in WORKLOADS.values()
        for task in workload.tasks
    ],
)
def test_losses(benchmark: BenchmarkFixture, request, workload, task, name):
    if contenders.too_slow(name, workload.dtype, workload.n_elements):
        pytest.skip(f"{name}: too slow")
    n_threads = cpu.usable_cores()
    try:
        contender = _load(name, n_threads)
        inputs = _prepare(workload)
        call = measure.bind(contender, inputs, task)
    except contenders.AbsentError as absent:
        pytest.skip(f"{name}: {absent}")
    benchmark.group = f"{workload.name} {task}"
    # the warm-up: compilation is not timed
    found = measure.errors(contender, call(), task, inputs)
    n_calls = 1000 if workload.n_elements < _SMALL else 1
    benchmark.pedantic(call, rounds=5, iterations=n_calls, warmup_rounds=1)
    benchmark.extra_info.update(found, n_threads=n_threads)
    if benchmark.enabled:
        seconds = benchmark.stats.stats.median
        rate = benchmark.extra_info["gb_per_s"] = workload.model_bytes(task) / seconds / 1e9
        request.config.stash[RESULTS].append((benchmark.group, name, seconds, rate, found))
