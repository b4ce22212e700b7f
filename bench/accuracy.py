"""How far results are from the true values, on a sample of rows; independent of fastce's kernels.

The reference is computed in extended precision (64 significant bits on x86). Where ``long double`` is
no wider than float64, float64 results cannot be judged and have no error figures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Elements in the sample: some tens of milliseconds of extended precision, 8 MB.
_SAMPLE_ELEMENTS = 2**19

# Bits of the significand after the first, and the exponent of the smallest normal number.
_FORMATS = {
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float32": (23, -126),
    "float64": (52, -1022),
}


class Reference(NamedTuple):
    """True losses and gradients of some rows, in extended precision."""

    rows: tuple[NDArray[np.intp], ...]  # indices into the batch's axes
    axis: int  # of the classes
    losses: NDArray[np.longdouble]
    grad: NDArray[np.longdouble]


def reference(logits: NDArray[Any], targets: NDArray[np.int64], axis: int) -> Reference | None:
    """Compute true values for rows spread evenly over the batch, or None where that is impossible."""
    if logits.dtype == np.float64 and np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        return None
    n_rows, n_classes = targets.size, logits.shape[axis]
    n_sample = min(n_rows, max(1, _SAMPLE_ELEMENTS // n_classes))
    numbers = np.linspace(0, n_rows - 1, n_sample).astype(np.intp)
    rows, n = np.unravel_index(numbers, targets.shape), np.arange(n_sample)
    # by way of float64, which holds every logit and which every dtype converts to
    x = np.moveaxis(logits, axis, -1)[rows].astype(np.float64).astype(np.longdouble)
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
    return Reference(rows, axis, gap + np.log1p(rest), grad)


def errors(losses: NDArray[Any], grad: NDArray[Any] | None, truth: Reference | None) -> dict[str, Any]:
    """Return the largest errors in the sample, in ULP of the dtype returned and absolute.

    Parameters
    ----------
    losses : ndarray
        As the contender returned them, in whatever dtype: half logits may give half losses.
    grad : ndarray, shape of the logits, or None
        Gradient of the sum of the losses.
    truth : Reference or None
        Without it, there is nothing to say.

    Returns
    -------
    dict
        ``loss_max_ulp``, ``loss_max_abs`` and ``loss_dtype``, and with a gradient the same of ``grad``.
    """
    if truth is None:
        return {}
    found = _largest("loss", losses[truth.rows], truth.losses)
    if grad is None:
        return found
    return found | _largest("grad", np.moveaxis(grad, truth.axis, -1)[truth.rows], truth.grad)


def _largest(what: str, got: NDArray[Any], true: NDArray[np.longdouble]) -> dict[str, Any]:
    n_bits, least_exponent = _FORMATS[got.dtype.name]
    exponent = np.frexp(true)[1] - 1
    unit = np.ldexp(np.longdouble(1), np.maximum(exponent, least_exponent) - n_bits)
    if what == "grad":  # below the smallest normal number, where 0 will do, that is the unit
        unit = np.where(exponent < least_exponent, np.ldexp(np.longdouble(1), least_exponent), unit)
    off = np.abs(got.astype(np.float64) - true)
    return {
        f"{what}_max_ulp": float((off / unit).max()),
        f"{what}_max_abs": float(off.max()),
        f"{what}_dtype": got.dtype.name,
    }
