"""How far results are from the true values, on a sample of rows; independent of fastce's kernels.

The reference is computed in extended precision (64 significant bits on x86). Where ``long double`` is
no wider than float64, float64 results cannot be judged and have no error figures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Elements in the sample: a second of extended precision at the most, 16 MB.
_SAMPLE_ELEMENTS = 2**20


class Reference(NamedTuple):
    """True losses and gradients of some rows, in extended precision."""

    rows: NDArray[np.intp]
    losses: NDArray[np.longdouble]
    grad: NDArray[np.longdouble]


def reference(logits: NDArray[Any], targets: NDArray[np.int64]) -> Reference | None:
    """Compute true values for rows spread evenly over the batch, or None where that is impossible."""
    if np.finfo(np.longdouble).nmant <= np.finfo(logits.dtype).nmant:
        return None
    n_rows, n_classes = logits.shape
    n_sample = min(n_rows, max(1, _SAMPLE_ELEMENTS // n_classes))
    rows = np.linspace(0, n_rows - 1, n_sample).astype(np.intp)
    x, n = logits[rows].astype(np.longdouble), np.arange(n_sample)
    target, top = targets[rows], x.argmax(axis=1)
    largest = x[n, top]
    gap = largest - x[n, target]
    grad = np.exp(x - largest[:, None])
    grad[n, top] = 0
    rest = grad.sum(axis=1)
    grad[n, top] = 1
    # Neither log(1 + rest) nor p - 1: both cancel where the target's probability is next to 1.
    others = np.where(top == target, rest, 1 + rest - grad[n, target])
    grad /= 1 + rest[:, None]
    grad[n, target] = -others / (1 + rest)
    return Reference(rows, gap + np.log1p(rest), grad)


def errors(
    losses: NDArray[Any], grad: NDArray[Any] | None, truth: Reference | None
) -> dict[str, float]:
    """Return the largest errors in the sample, in ULP of the true value and absolute.

    Parameters
    ----------
    losses : ndarray, shape (n_rows,)
        As the contender returned them.
    grad : ndarray, shape (n_rows, n_classes), or None
        Gradient of the sum of the losses.
    truth : Reference or None
        Without it, there is nothing to say.

    Returns
    -------
    dict
        ``loss_max_ulp`` and ``loss_max_abs``, and with a gradient ``grad_max_ulp``, ``grad_max_abs``.
    """
    if truth is None:
        return {}
    found = _largest("loss", losses[truth.rows], truth.losses)
    return found if grad is None else found | _largest("grad", grad[truth.rows], truth.grad)


def _largest(what: str, got: NDArray[Any], true: NDArray[np.longdouble]) -> dict[str, float]:
    off = np.abs(got.astype(np.longdouble) - true)
    unit = np.spacing(np.abs(true).astype(got.dtype))
    return {f"{what}_max_ulp": float((off / unit).max()), f"{what}_max_abs": float(off.max())}
