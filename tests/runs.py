"""Runs over a dump of many small parts: the dump, what a run leaves, and runs in forked children."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastce.scoring import score_files

N_CLASSES = 5
PART_ROWS = 20
PART_BYTES = PART_ROWS * N_CLASSES * 4
N_PARTS = 6


def write_dump(folder: Path) -> Path:
    """Write two files of logits, of three parts each, and one of targets."""
    rng = np.random.default_rng(3)
    folder.mkdir(exist_ok=True)
    targets = rng.integers(N_CLASSES, size=2 * PART_ROWS + 7 + 3 * PART_ROWS)
    targets[::9] = -100
    logits = (3 * rng.standard_normal((len(targets), N_CLASSES))).astype(np.float32)
    np.save(folder / "logits-1.npy", logits[: 2 * PART_ROWS + 7])
    np.save(folder / "logits-2.npy", logits[2 * PART_ROWS + 7 :])
    np.save(folder / "targets.npy", targets)
    return folder


def score(dump, out, **options):
    """Score a dump with the backend that is light and starts no threads."""
    options = {"backend": "numpy", "num_threads": 1, **options}
    return score_files(dump / "logits-*.npy", dump / "targets.npy", out=out, **options)


def contents(out: Path) -> dict[str, bytes]:
    """Return the bytes of every file that is under its final name."""
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".part")
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(files)}


def fork(work: Callable[[], object]) -> int:
    """Do something in a child process; return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads are not copied
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait(pid: int, options: int = 0) -> int:
    """Return the wait status of a child, which must have one within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG | options)
        if found:
            return status
        time.sleep(0.0005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("a child hangs")
