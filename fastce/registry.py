"""The backends, why one cannot run here, and which one a call takes.

This is the only module that knows more than one backend. A new one is a file in ``_backends/`` and
a row in `BACKENDS`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from fastce import cpu
from fastce.kernels import Kernels


@dataclass(frozen=True, slots=True, eq=False)  # a hash by identity, for the caches
class Backend:
    """One way to run the kernels: what it is called, where it lives, what it needs."""

    name: str
    module: str
    isa: str | None = None
    dtypes: frozenset[str] = frozenset({"float32", "float64", "float16", "bfloat16"})


# In order of preference: automatic choice takes the first one that is available.
BACKENDS = (
    Backend("cython-avx512", "fastce._backends.cython", "avx512"),
    Backend("cython-avx2", "fastce._backends.cython", "avx2"),
    Backend("cython-baseline", "fastce._backends.cython", "baseline"),
    Backend("numba", "fastce._backends.numba"),
    Backend("numpy", "fastce._backends.numpy"),
)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What `backends` says of one backend."""

    name: str
    available: bool
    reason: str | None  #: why it is not available
    chosen: bool  #: whether a call that names no backend takes it now


# Read once: a look-up in os.environ would take a third of the time of a small call.
_environment = os.environ.get("FASTCE_BACKEND")
_in_use: ContextVar[str | None] = ContextVar("fastce_backend", default=None)


def why_unavailable(backend: Backend) -> str | None:
    """Return why a backend cannot run here, or None if it can."""
    if backend.isa is not None:
        missing = cpu.missing_features(backend.isa)
        if missing:
            return f"this processor lacks {', '.join(missing)}"
    try:
        load(backend)
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def load(backend: Backend) -> Kernels:
    """Import a backend's module and return its kernels."""
    kernels: Kernels = importlib.import_module(backend.module).load(backend.isa)
    return kernels


def choose(name: str | None, dtype: str) -> Backend:
    """Return the backend for a call: argument, `use_backend`, FASTCE_BACKEND, then automatic.

    A name stands for the first available backend of that name or with that name and an instruction
    set: "cython" for "cython-avx512", "cython-avx2" or "cython-baseline".
    """
    return _choose(requested(name), dtype)


def requested(name: str | None = None) -> str | None:
    """Return the name asked for, or None where the choice is automatic."""
    name = name or _in_use.get() or _environment
    return None if name == "auto" else name


@functools.cache
def _choose(name: str | None, dtype: str) -> Backend:
    named = [b for b in BACKENDS if name is None or name in (b.name, b.name.partition("-")[0])]
    if not named:
        names = ", ".join(["auto", "cython", *(b.name for b in BACKENDS)])
        source = " from FASTCE_BACKEND" if name == _environment else ""
        raise ValueError(f"backend: expected one of {names}; got {name!r}{source}")
    reasons: dict[str, list[str]] = {}
    for backend in named:
        reason = why_unavailable(backend)
        if reason is None and dtype not in backend.dtypes:
            reason = f"it has no kernels for {dtype}"
        if reason is None:
            return backend
        reasons.setdefault(reason, []).append(backend.name)
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    usable = ", ".join(b.name for b in BACKENDS if why_unavailable(b) is None)
    raise BackendUnavailable(f"backend {name!r} cannot run here ({why}); available: {usable}")


def backends() -> tuple[BackendInfo, ...]:
    """List the backends, in order of preference.

    Returns
    -------
    tuple of BackendInfo
        For each: its name, whether it is available, the reason if not, and whether
        a float32 call that names no backend takes it now.

    Examples
    --------
    >>> import fastce
    >>> [b.name for b in fastce.backends()][-2:]
    ['numba', 'numpy']
    """
    try:
        chosen = choose(None, "float32")
    except (BackendUnavailable, ValueError):  # FASTCE_BACKEND names one that cannot run
        chosen = None
    return tuple(
        BackendInfo(b.name, reason is None, reason, b is chosen)
        for b in BACKENDS
        for reason in [why_unavailable(b)]
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use a backend in calls that do not name one, within a ``with`` block.

    Parameters
    ----------
    name : str
        A name from `backends`, "cython" for its best variant here, or "auto".

    Raises
    ------
    ValueError
        If there is no backend of that name.
    BackendUnavailable
        If it cannot run here; the message says why.

    Notes
    -----
    The choice holds for the current thread or asynchronous task alone.

    Examples
    --------
    >>> import fastce
    >>> with fastce.use_backend("numpy"):
    ...     print(f"{fastce.cross_entropy([[0.0, 0.0]], [1]):.6f}")
    0.693147
    """
    choose(name, "float32")
    token = _in_use.set(name)
    try:
        yield
    finally:
        _in_use.reset(token)
