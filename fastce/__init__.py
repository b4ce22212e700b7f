"""The softmax cross-entropy of logits, and its gradient, on CPUs: fast and accurate."""

from fastce.config import show_config
from fastce.losses import cross_entropy, cross_entropy_with_grad
from fastce.registry import BackendUnavailable, backends, use_backend
from fastce.stats import row_stats
from fastce.threads import set_num_threads

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "backends",
    "cross_entropy",
    "cross_entropy_with_grad",
    "row_stats",
    "set_num_threads",
    "show_config",
    "use_backend",
]
