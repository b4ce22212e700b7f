"""How many threads a call uses, and the one place that guards against fork."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

from fastce import cpu

# Below the first figure, some 15 us of work, a second thread saves little more than entering a parallel
# region costs (2 us when warm, far more when cold). Above, each further thread needs the second.
SERIAL_ELEMENTS = 32_768
_ELEMENTS_PER_THREAD = 16_384

# Read once: a look-up in os.environ would take a third of the time of a small call.
_environment = os.environ.get("FASTCE_NUM_THREADS")
_chosen: int | None = None
_ran_parallel = False
_serial_child = False
_serial_child_told = False


class Request(NamedTuple):
    """A number of threads, and who asked for it."""

    number: int | None  # None: as many as the machine and the backend's runtime allow
    source: str


_AUTOMATIC = Request(None, "automatic")
_request = functools.cache(Request)  # making one took a tenth of the time of a small call


def set_num_threads(num_threads: int | None) -> None:
    """Set how many threads calls use that do not say ``num_threads=`` themselves.

    Parameters
    ----------
    num_threads : int or None
        At least 1; None returns to the automatic choice.

    Raises
    ------
    ValueError
        If ``num_threads`` is less than 1.

    See Also
    --------
    show_config : Prints the number in force, and where it comes from.
    """
    global _chosen
    _chosen = None if num_threads is None else _checked(num_threads, "num_threads")


def requested(num_threads: int | None) -> Request:
    """Resolve argument, then `set_num_threads`, then FASTCE_NUM_THREADS, then automatic."""
    if num_threads is not None:
        return _request(_checked(num_threads, "num_threads"), "num_threads=")
    if _chosen is not None:
        return _request(_chosen, "set_num_threads")
    if _environment:
        return _request(_checked(_environment, "FASTCE_NUM_THREADS"), "FASTCE_NUM_THREADS")
    return _AUTOMATIC


def automatic(runtime_max: int) -> int:
    """Return the automatic choice: the cores this process may use, at most what a runtime is set to.

    ``runtime_max`` is how OMP_NUM_THREADS and threadpoolctl limit it.
    """
    return min(cpu.usable_cores(), runtime_max)


def count(num_threads: int | None, runtime_max: Callable[[], int]) -> int:
    """Return the threads to use for work of any size that is cut for Python's own threads."""
    number = requested(num_threads).number
    return automatic(runtime_max()) if number is None else number


def resolve(num_threads: int | None, n_elements: int, runtime_max: Callable[[], int]) -> int:
    """Return the threads to use for a call over ``n_elements`` logits."""
    count = requested(num_threads).number
    if count == 1 or n_elements < SERIAL_ELEMENTS:
        return 1
    if count is None:
        count = automatic(runtime_max())
    count = min(count, max(1, n_elements // _ELEMENTS_PER_THREAD))
    return _guard_fork(count)


def _guard_fork(count: int) -> int:
    """Run serially in the child of a process that ran in parallel: its threads did not survive."""
    global _ran_parallel, _serial_child_told
    if count == 1:
        return 1
    if _serial_child:
        if not _serial_child_told:
            _serial_child_told = True
            warnings.warn(
                "this process was forked from one in which fastce had run in parallel, so fastce uses "
                "one thread here; start workers by 'spawn' or 'forkserver' to use more",
                RuntimeWarning,
                stacklevel=6,
            )
        return 1
    if not _ran_parallel:
        _ran_parallel = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_mark_serial_child)
    return count


def _mark_serial_child() -> None:
    global _serial_child
    _serial_child = True


def _checked(value: int | str, name: str) -> int:
    try:
        count = int(value)
    except ValueError:
        count = 0
    if count < 1 or isinstance(value, float):
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return count
