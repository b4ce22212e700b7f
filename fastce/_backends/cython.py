"""The C kernels of `fastce._native`, one object for each instruction set."""

from __future__ import annotations

from fastce.kernels import Kernels

try:
    import fastce._native.kernels as kernels
except ModuleNotFoundError as error:
    raise ImportError("not built; install a C compiler, then install fastce again") from error


def load(isa: str | None) -> Kernels:
    """Return the kernels compiled for an instruction set."""
    assert isa is not None
    return kernels.RowKernels(isa)
