"""What memory can do here: a read-only sweep, and a sweep that reads one array and writes another.

Run by `report` in the same rounds as the contenders, because on a shared machine bandwidth changes by
the minute. NumPy does both sweeps at the speed of memory, without the interpreter lock and without
compiling anything: ``max`` reads with vectors, ``copyto`` is the C library's ``memmove``, which uses
streaming stores for blocks of this size, as the gradient does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 2**29  # far beyond any L3, as are the largest workloads
_SWEEPS = 5


def probe(n_threads: int) -> dict[str, list[float]]:
    """Return GB/s of each sweep, read and write counted, once the pages are in place."""
    source = np.array_split(np.ones(_BYTES // 4, np.float32), n_threads)
    target = np.array_split(np.ones(_BYTES // 4, np.float32), n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        return {
            "read": _sweep(lambda: list(pool.map(np.max, source)), _BYTES),
            "read_write": _sweep(lambda: list(pool.map(np.copyto, target, source)), 2 * _BYTES),
        }


def _sweep(work: Callable[[], object], n_bytes: int) -> list[float]:
    work()
    rates = []
    for _ in range(_SWEEPS):
        start = time.perf_counter()
        work()
        rates.append(n_bytes / (time.perf_counter() - start) / 1e9)
    return rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure memory bandwidth; prints JSON.")
    parser.add_argument("--threads", type=int, required=True)
    print(json.dumps(probe(parser.parse_args().threads)))
