"""A run killed at any moment, and at each step of its writing, is continued to the same bytes."""

import os
import random
import signal
import time

import pytest
from runs import N_PARTS, PART_BYTES, contents, fork, score, wait, write_dump

from fastce.scoring.records import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

N_KILLS = 200


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", PART_BYTES)


@pytest.fixture
def dump(tmp_path):
    return write_dump(tmp_path / "dump")


def assert_nothing_torn(out, undisturbed):
    """Each file that has its final name is the whole of it."""
    found = contents(out) if out.exists() else {}
    assert {name: data for name, data in found.items() if undisturbed.get(name) != data} == {}


def test_kills_at_random_moments(dump, tmp_path):
    score(dump, tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    assert len([name for name in undisturbed if name.startswith("parts/")]) == 2 * N_PARTS
    started = time.perf_counter()
    assert wait(fork(lambda: score(dump, tmp_path / "timed"))) == 0
    seconds = time.perf_counter() - started
    rng = random.Random(7)
    kills = chains = within_a_part = 0
    while kills < N_KILLS:
        chains += 1
        out = tmp_path / f"{chains}"
        while True:
            pid = fork(lambda out=out: score(dump, out))
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            status = wait(pid)
            assert_nothing_torn(out, undisturbed)
            if not os.WIFSIGNALED(status):
                assert status == 0
                break
            kills += 1
            within_a_part += bool(list(out.glob("parts/*.part")))
        assert contents(out) == undisturbed
        assert verify(out) == []
    assert chains > 1
    assert within_a_part > N_KILLS // 20  # the kills are no use if they miss the writing


def kill_at(step):
    """Have this process killed at the n-th of its writes, fsyncs and renames; writes get half way."""
    left = [step]
    write = os.write

    def wrapped(name, call):
        def stepped(*arguments):
            left[0] -= 1
            if left[0] == 0:
                if name == "write":
                    write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return stepped

    for name in ("write", "fsync", "replace"):
        setattr(os, name, wrapped(name, getattr(os, name)))


def test_a_kill_at_each_write_fsync_and_rename(dump, tmp_path):
    score(dump, tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    step = 0
    while True:
        step += 1
        out = tmp_path / f"{step}"

        def work(out=out, step=step):
            kill_at(step)
            score(dump, out)

        status = wait(fork(work))
        if not os.WIFSIGNALED(status):
            assert status == 0
            assert contents(out) == undisturbed
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert_nothing_torn(out, undisturbed)
        score(dump, out)
        assert contents(out) == undisturbed
    # Each file takes a write, an fsync, a rename, and an fsync of its folder.
    assert step > 4 * len(undisturbed)


def test_a_worker_that_stopped_and_goes_on_later(dump, tmp_path):
    score(dump, tmp_path / "undisturbed")
    out = tmp_path / "out"

    def stop(progress):
        if progress.rows_done == 67:  # within the second file
            os.kill(os.getpid(), signal.SIGSTOP)

    pid = fork(lambda: score(dump, out, progress=stop))
    assert os.WIFSTOPPED(wait(pid, os.WUNTRACED))
    assert len(list(out.glob("parts/*.part"))) == 1
    score(dump, out)
    finished = contents(out)
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    assert contents(out) == finished == contents(tmp_path / "undisturbed")


def test_processes_on_one_folder_at_once(dump, tmp_path):
    score(dump, tmp_path / "undisturbed")
    for attempt in range(5):
        out = tmp_path / f"{attempt}"
        children = [fork(lambda out=out: score(dump, out)) for _ in range(3)]
        assert [wait(pid) for pid in children] == [0, 0, 0]
        assert contents(out) == contents(tmp_path / "undisturbed")
