from typing import Any

from numpy import float64, int64
from numpy.typing import NDArray

OPENMP: bool

def max_threads() -> int: ...
def runs_here(isa: str) -> bool: ...
def rows(
    isa: str,
    logits: NDArray[Any],
    targets: NDArray[int64],
    losses: NDArray[Any],
    tile_sums: NDArray[float64],
    ranks: NDArray[int64] | None,
    scale: NDArray[float64] | None,
    grad: NDArray[Any] | None,
    tile_rows: int,
    num_threads: int,
) -> None: ...
