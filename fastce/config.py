"""What runs here: the answer behind `show_config` and ``fastce doctor``."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any, Literal, overload

from fastce import __version__, cpu, registry, threads


@overload
def show_config(mode: Literal["text"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: str = "text") -> dict[str, Any] | None:
    """Print the processor, caches, instruction sets, threads, backends and versions in use.

    Parameters
    ----------
    mode : {"text", "dict"}, default "text"
        Print, or return the same as a dictionary.

    Returns
    -------
    dict or None
        A dictionary of JSON-ready values with ``mode="dict"``.
    """
    if mode not in ("text", "dict"):
        raise ValueError(f"mode: expected 'text' or 'dict', got {mode!r}")
    config = _config()
    if mode == "dict":
        return config
    for section, values in config.items():
        print(f"{section}:")
        for key, value in values.items():
            print(f"  {key}: {value}")
    return None


def _config() -> dict[str, Any]:
    infos = registry.backends()
    return {
        "processor": {
            "model": cpu.model(),
            "instruction_sets": list(cpu.instruction_sets()),
            "caches": cpu.caches(),
        },
        "threads": _threads(),
        "backends": {
            info.name: ("available, chosen" if info.chosen else "available")
            if info.available
            else f"unavailable: {info.reason}"
            for info in infos
        },
        "extension": _extension(),
        "openmp": _openmp_runtimes(),
        "versions": _versions(),
    }


def _threads() -> dict[str, Any]:
    asked = threads.requested(None)
    count = asked.number
    if count is None:
        kernels = registry.load(registry.choose(None, "float32"))
        count = threads.automatic(kernels.max_threads())
    return {"count": count, "source": asked.source, "usable_cores": cpu.usable_cores()}


def _extension() -> dict[str, str]:
    """Return how the extension module was built, and what to install where it could be better."""
    again = "then install fastce again, from its source"
    try:
        openmp = importlib.import_module("fastce._native.kernels").OPENMP
    except ImportError as error:
        return {"built": f"no: {error}", "remedy": f"install a C compiler, {again}"}
    if not openmp:
        compilers = "a C compiler with OpenMP (gcc; clang with libomp)"
        return {"built": "yes, for one thread", "remedy": f"install {compilers}, {again}"}
    return {"built": "yes, with OpenMP"}


def _openmp_runtimes() -> dict[str, str]:
    """Return the OpenMP runtimes loaded now; threadpoolctl knows them, where it is installed."""
    try:
        import threadpoolctl
    except ImportError:
        return {"unknown": "install threadpoolctl to list the runtimes loaded"}
    return {
        info["filepath"]: f"{info['prefix']}, {info['num_threads']} threads"
        for info in threadpoolctl.threadpool_info()
        if info["user_api"] == "openmp"
    }


def _versions() -> dict[str, str]:
    found = {"fastce": __version__}
    for package in ("numpy", "numba"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "python": platform.python_version()}
