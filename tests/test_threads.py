"""How many threads a call uses; and forks, thread pools and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl

import fastce
from fastce import cpu, threads

BIG = 10**9


@pytest.fixture(autouse=True)
def _reset():
    yield
    fastce.set_num_threads(None)


def python(code, **environment):
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_argument_beats_setting_beats_environment(monkeypatch):
    assert threads.resolve(None, BIG, lambda: 64) == cpu.usable_cores()
    monkeypatch.setattr(threads, "_environment", "3")
    assert threads.resolve(None, BIG, lambda: 1) == 3
    fastce.set_num_threads(5)
    assert threads.resolve(None, BIG, lambda: 1) == 5
    assert threads.resolve(7, BIG, lambda: 1) == 7


def test_small_work_is_serial():
    assert threads.resolve(8, 1000, lambda: 8) == 1
    assert threads.resolve(8, 50_000, lambda: 8) == 3
    assert threads.resolve(8, BIG, lambda: 8) == 8


@pytest.mark.parametrize("bad", ["0", "-1", "many"])
def test_bad_environment_is_named(monkeypatch, bad):
    monkeypatch.setattr(threads, "_environment", bad)
    with pytest.raises(ValueError, match=f"FASTCE_NUM_THREADS: .* got '{bad}'"):
        fastce.cross_entropy(np.zeros((2, 2)), [0, 1])


def test_affinity_limits_the_automatic_number():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpu.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("text", "quota"), [("150000 100000", 1.5), ("max 100000", None)])
def test_cgroup_quota_is_read(monkeypatch, tmp_path, text, quota):
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path)
    assert cpu._cgroup_quota.__wrapped__() == quota


def test_threadpoolctl_limits_the_automatic_number():
    from fastce import registry

    kernels = registry.load(registry.choose("cython", "float32"))
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert kernels.max_threads() == 1


@pytest.mark.parametrize("name", ["cython", "numba", "numpy"])
def test_many_threads_at_once(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((700, 100)).astype(np.float32)
    y = rng.integers(0, 100, 700)
    expected = fastce.cross_entropy(x, y, backend=name)
    with ThreadPoolExecutor(8) as pool:
        got = list(
            pool.map(lambda _: fastce.cross_entropy(x, y, backend=name, num_threads=2), range(64))
        )
    assert set(got) == {expected}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", ["cython", "numba", "numpy"])
def test_the_child_of_a_fork_is_serial_and_says_so_once(name):
    done = python(
        f"""
        import os, sys, warnings, numpy as np, fastce
        x, y = np.ones((4000, 100), np.float32), np.zeros(4000, int)
        expected = fastce.cross_entropy(x, y, backend={name!r}, num_threads=2)
        pid = os.fork()
        if pid == 0:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                same = all(
                    fastce.cross_entropy(x, y, backend={name!r}, num_threads=2) == expected
                    for _ in range(3)
                )
            said = [w for w in seen if "forked" in str(w.message)]
            os._exit(0 if same and len(said) == 1 and said[0].filename == "<string>" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert fastce.cross_entropy(x, y, backend={name!r}, num_threads=2) == expected
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_before_any_parallel_call_is_not_limited():
    done = python(
        """
        import os, numpy as np, fastce
        pid = os.fork()
        fastce.cross_entropy(np.ones((4000, 100)), np.zeros(4000, int), num_threads=2)
        if pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        """
    )
    assert done.returncode == 0, done.stderr


def test_numba_runs_on_the_workqueue_layer_from_many_threads():
    """Two callers at once abort the process there, so they take turns."""
    done = python(
        """
        from concurrent.futures import ThreadPoolExecutor
        import numba, numpy as np, fastce
        x, y = np.ones((4000, 100), np.float32), np.zeros(4000, int)
        def call(_):
            return fastce.cross_entropy(x, y, backend="numba", num_threads=2)
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(call, range(200)))) == 1
        assert numba.threading_layer() == "workqueue"
        """,
        NUMBA_THREADING_LAYER="workqueue",
        NUMBA_NUM_THREADS="2",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["cython", "numba", "numpy"])
def test_control_c_is_heard_within_half_a_second(name):
    """In a call that would take many seconds: 2^34 elements over a broadcast row."""
    code = textwrap.dedent(
        f"""
        import sys, time, numpy as np, fastce
        row = np.zeros(1024, np.float32)
        x, y = np.broadcast_to(row, (2**24, 1024)), np.zeros(2**24, np.int64)
        fastce.cross_entropy(x[:999], y[:999], backend={name!r})
        print("ready", flush=True)
        try:
            fastce.cross_entropy(x, y, backend={name!r})
        except KeyboardInterrupt:
            print(time.time(), flush=True)
            assert fastce.cross_entropy(x[:9], y[:9], backend={name!r}) > 0
        """
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        import time

        time.sleep(1.0)
        sent = time.time()
        child.send_signal(signal.SIGINT)
        heard = float(child.communicate(timeout=30)[0])
    finally:
        child.kill()
    assert heard - sent < 0.5
    assert child.returncode == 0
