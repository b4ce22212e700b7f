"""What this machine offers: instruction sets, caches, and the cores this process may use."""

from __future__ import annotations

import functools
import math
import os
import platform
from pathlib import Path

# What each variant of the Cython kernels is compiled for (the target pragmas in _native/rows_*.c), in
# NumPy's names for the features.
_NEEDS = {
    "baseline": (),
    "avx2": ("AVX2", "FMA3", "F16C"),
    "avx512": ("AVX2", "FMA3", "F16C", "AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"),
}


@functools.cache
def _features() -> dict[str, bool]:
    # NumPy has asked the processor and the operating system already, on every platform; there is
    # no public name for the answer before NumPy 2.5, so its absence must not break anything.
    try:
        from numpy._core._multiarray_umath import __cpu_features__
    except ImportError:  # pragma: no cover
        return {}
    return dict(__cpu_features__)


def missing_features(isa: str) -> tuple[str, ...]:
    """Return the features an instruction set needs and this machine lacks."""
    return tuple(name for name in _NEEDS[isa] if not _features().get(name, False))


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets this machine runs, of those fastce has kernels for."""
    return tuple(isa for isa in _NEEDS if not missing_features(isa))


def model() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Return the first core's data caches, such as ``{"L1": "48K", "L2": "2048K"}``."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def usable_cores() -> int:
    """Return how many cores this process may use: CPU affinity and the cgroup's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        cores = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


@functools.cache
def _cgroup_quota() -> float | None:
    """Return the CPU quota in cores, or None without one. Read once: containers fix it."""
    root = Path("/sys/fs/cgroup")
    try:
        text = (root / "cpu.max").read_text(encoding="ascii")  # version 2: "quota period"
    except OSError:
        try:
            text = " ".join(
                (root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return None
    quota, _, period = text.strip().partition(" ")
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
