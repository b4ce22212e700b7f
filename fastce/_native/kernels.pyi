from typing import Any

from numpy import float64, int64
from numpy.typing import NDArray

from fastce.kernels import Soft, Stats

OPENMP: bool

class RowKernels:
    def __init__(self, isa: str) -> None: ...
    def max_threads(self) -> int: ...
    def plain(
        self,
        logits: object,
        targets: object,
        ignore_index: object,
        max_elements: int,
        wants_losses: bool,
        grad_scale: float | None,
        out: object,
    ) -> tuple[float | NDArray[Any], NDArray[Any] | None] | None: ...
    def rows(
        self,
        logits: NDArray[Any],
        first_row: int,
        targets: NDArray[int64],
        losses: NDArray[Any],
        tile_sums: NDArray[float64],
        *,
        row_weights: NDArray[float64] | None,
        soft: Soft | None,
        stats: Stats | None,
        scale: NDArray[float64] | None,
        grad: NDArray[Any] | None,
        stream: bool,
        num_threads: int,
    ) -> int: ...
    def softmax(
        self,
        logits: NDArray[Any],
        first_row: int,
        n_rows: int,
        out: NDArray[Any],
        *,
        log: bool,
        stream: bool,
        num_threads: int,
    ) -> None: ...
    def kl_from_logits(
        self,
        p_logits: NDArray[Any],
        q_logits: NDArray[Any],
        first_row: int,
        out: NDArray[Any],
        *,
        num_threads: int,
    ) -> None: ...
    def distributions(
        self,
        measure: str,
        p: NDArray[Any],
        q: NDArray[Any] | None,
        first_row: int,
        out: NDArray[Any],
        *,
        base: float | None,
        num_threads: int,
    ) -> int: ...
    def information(
        self, p: NDArray[Any], out: NDArray[Any], *, base: float | None, num_threads: int
    ) -> int: ...
    def binary(
        self,
        x: NDArray[Any],
        targets: NDArray[Any],
        losses: NDArray[Any] | None,
        sums: NDArray[float64],
        *,
        from_logits: bool,
        weight: NDArray[Any] | None,
        pos_weight: NDArray[Any] | None,
        unit: float,
        scale: NDArray[Any] | None,
        grad_unit: float,
        grad: NDArray[Any] | None,
        num_threads: int,
    ) -> int: ...
