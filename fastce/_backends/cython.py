"""The C kernels of `fastce._native`, one object for each instruction set."""

from __future__ import annotations

from typing import Any

from numpy import float64, int64
from numpy.typing import NDArray

from fastce.kernels import Kernels, tile_rows

try:
    import fastce._native.kernels as kernels
except ModuleNotFoundError as error:
    raise ImportError("not built; install a C compiler, then install fastce again") from error


def load(isa: str | None) -> Kernels:
    """Return the kernels compiled for an instruction set."""
    assert isa is not None
    if not kernels.runs_here(isa):
        raise ImportError(f"the extension module has no {isa} kernels that run on this machine")
    return CythonKernels(isa)


class CythonKernels:
    """`fastce.kernels.Kernels` on one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def max_threads(self) -> int:
        """Return OpenMP's limit: OMP_NUM_THREADS, threadpoolctl, or all cores."""
        return kernels.max_threads()

    def rows(
        self,
        logits: NDArray[Any],
        targets: NDArray[int64],
        losses: NDArray[Any],
        tile_sums: NDArray[float64],
        *,
        ranks: NDArray[int64] | None,
        scale: NDArray[float64] | None,
        grad: NDArray[Any] | None,
        num_threads: int,
    ) -> None:
        """See `fastce.kernels.Kernels.rows`."""
        kernels.rows(
            self.isa,
            logits,
            targets,
            losses,
            tile_sums,
            ranks,
            scale,
            grad,
            tile_rows(logits.shape[1]),
            num_threads,
        )
