"""The softmax cross-entropy of logits, and its gradient, on CPUs: fast and accurate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastce import info
    from fastce.activations import log_softmax, logsumexp, softmax
    from fastce.binary import (
        binary_cross_entropy,
        binary_cross_entropy_with_grad,
        binary_cross_entropy_with_logits,
        binary_cross_entropy_with_logits_with_grad,
    )
    from fastce.config import show_config
    from fastce.losses import cross_entropy, cross_entropy_with_grad, nll_loss, nll_loss_with_grad
    from fastce.registry import BackendUnavailable, backends, use_backend
    from fastce.scoring import Scorer, calibrate_files, compare_files, inspect_files, score_files
    from fastce.stats import row_stats
    from fastce.threads import set_num_threads

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Scorer",
    "backends",
    "binary_cross_entropy",
    "binary_cross_entropy_with_grad",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_with_grad",
    "calibrate_files",
    "compare_files",
    "cross_entropy",
    "cross_entropy_with_grad",
    "info",
    "inspect_files",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "nll_loss_with_grad",
    "row_stats",
    "score_files",
    "set_num_threads",
    "show_config",
    "softmax",
    "use_backend",
]

# Names load with their module when first used, so that `fastce --help` waits for no library.
_HOMES = {
    "BackendUnavailable": "fastce.registry",
    "Scorer": "fastce.scoring",
    "backends": "fastce.registry",
    "binary_cross_entropy": "fastce.binary",
    "binary_cross_entropy_with_grad": "fastce.binary",
    "binary_cross_entropy_with_logits": "fastce.binary",
    "binary_cross_entropy_with_logits_with_grad": "fastce.binary",
    "calibrate_files": "fastce.scoring",
    "compare_files": "fastce.scoring",
    "cross_entropy": "fastce.losses",
    "cross_entropy_with_grad": "fastce.losses",
    "inspect_files": "fastce.scoring",
    "log_softmax": "fastce.activations",
    "logsumexp": "fastce.activations",
    "nll_loss": "fastce.losses",
    "nll_loss_with_grad": "fastce.losses",
    "row_stats": "fastce.stats",
    "score_files": "fastce.scoring",
    "set_num_threads": "fastce.threads",
    "show_config": "fastce.config",
    "softmax": "fastce.activations",
    "use_backend": "fastce.registry",
}


def __getattr__(name: str) -> object:
    if name == "info":
        return importlib.import_module("fastce.info")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
