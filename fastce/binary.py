"""Binary cross-entropy of logits or probabilities, element by element, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce import registry, threads
from fastce.kernels import BINARY_TILE, array_sum, exact_sum, widened
from fastce.problem import (
    FLOAT32,
    Format,
    Operand,
    check_base,
    check_loss_dtype,
    check_out,
    check_reduction,
    elementwise,
    finite_numbers,
    format_beside,
    format_of,
    place,
    real_numbers,
    unraveled,
)

_Array = NDArray[Any]


def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    base: float | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> float | _Array:
    r"""Binary cross-entropy between logits and targets.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16
        The logarithm of the odds of "yes", of any shape and memory layout; never copied as a whole,
        never written to. bfloat16: as ``ml_dtypes.bfloat16``, or as uint16 with ``dtype="bfloat16"``.
    targets : array_like of these dtypes, of integers or booleans
        The probability of "yes", in [0, 1]; shape of ``logits``.
    weight : array_like, optional
        Multiplies the loss of each element; any shape that broadcasts to that of ``logits``. Elements
        with weight 0 are not read.
    pos_weight : array_like, optional
        Multiplies the part of the loss that is due to "yes", so that more than 1 raises recall; not
        negative; any shape that broadcasts to that of ``logits``, such as (n_labels,).
    sample_weight : array_like, optional
        A weight for each row: the shape of ``logits`` without some of its last axes, such as (n_rows,).
    reduction : {"mean", "sum", "none"}, default "mean"
        The mean divides the sum by the number of elements or, with ``sample_weight``, by the sum of
        their sample weights; ``weight`` and ``pos_weight`` do not count. That is PyTorch's rule.
    base : float, optional
        Of the logarithm: 2 gives bits. Default e, which gives nats.
    dtype : str or dtype, optional
        ``"bfloat16"`` says that uint16 arrays hold its bits.
    out : ndarray of float32 or float64, optional
        With ``reduction="none"``: where to store the losses; shape of ``logits``.
    num_threads, backend
        As in `cross_entropy`.

    Returns
    -------
    float or ndarray
        With "mean" and "sum" a float, accumulated in float64; the mean over no weight is NaN. With
        "none" an array of shape of ``logits``, float64 for float64 logits and float32 otherwise.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        If a shape or the value of an argument is wrong, or a target is outside [0, 1] or NaN. ``out``
        may have been written to in part in that last case.
    BackendUnavailable
        If the backend asked for cannot run here.

    See Also
    --------
    binary_cross_entropy : The same of probabilities.

    Notes
    -----
    With a = pos_weight * t and b = 1 - t the loss is :math:`a \log(1 + e^{-x}) + b \log(1 + e^x)`,
    computed from :math:`e^{-|x|}`: neither term loses digits, at most 4 ULP for float64 logits and 5
    for float32. Infinite logits give the limits, 0 or +inf, also with ``pos_weight``; NaN gives NaN.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.binary_cross_entropy_with_logits(np.array([0.0, np.inf]), [1, 1], base=2)
    0.5
    """
    return _run(
        logits, targets, "logits", True, weight, pos_weight, sample_weight, reduction, base, dtype, out,
        num_threads, backend,
    )[0]  # fmt: skip


def binary_cross_entropy(
    probs: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    base: float | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> float | _Array:
    r"""Binary cross-entropy between probabilities and targets.

    Parameters
    ----------
    probs : array_like of float32, float64, float16 or bfloat16
        The probability of "yes", in [0, 1]; otherwise as the logits of
        `binary_cross_entropy_with_logits`.
    targets, weight, sample_weight, reduction, base, dtype, out, num_threads, backend
        As in `binary_cross_entropy_with_logits`.

    Returns
    -------
    float or ndarray
        As from `binary_cross_entropy_with_logits`.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `binary_cross_entropy_with_logits`; ValueError also if a probability is outside [0, 1].

    Notes
    -----
    :math:`-t \log p - (1 - t) \log(1 - p)`, with 0 log 0 = 0 and nothing clipped: what was held to be
    impossible and happens costs +inf. Probabilities next to 1 have lost what logits keep, so prefer
    `binary_cross_entropy_with_logits` where there are logits.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> fastce.binary_cross_entropy(np.array([0.5, 0.0]), [1.0, 0.0], reduction="none", base=2)
    array([1., 0.])
    """
    return _run(
        probs, targets, "probs", False, weight, None, sample_weight, reduction, base, dtype, out,
        num_threads, backend,
    )[0]  # fmt: skip


def binary_cross_entropy_with_logits_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    base: float | None = None,
    grad_output: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[float | _Array, _Array]:
    r"""Binary cross-entropy and its gradient with respect to the logits.

    Parameters
    ----------
    logits, targets, weight, pos_weight, sample_weight, reduction, base, dtype, num_threads, backend
        As in `binary_cross_entropy_with_logits`.
    grad_output : array_like, optional
        Upstream gradient of the loss: a scalar, or with ``reduction="none"`` also of shape of
        ``logits``. Default 1.
    out : ndarray of float32, float64, float16 or bfloat16, optional
        Where to store the gradient; shape of ``logits``. ``out=logits`` works in place.

    Returns
    -------
    loss : float or ndarray
        As from `binary_cross_entropy_with_logits`.
    grad : ndarray
        Shape of ``logits``, dtype of ``out`` or of ``logits``.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `binary_cross_entropy_with_logits`.

    Notes
    -----
    :math:`b\,\sigma(x) - a\,\sigma(-x)`; with targets 0 and 1 one of the terms is 0, and nothing
    cancels.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> loss, grad = fastce.binary_cross_entropy_with_logits_with_grad(np.zeros(2), [1.0, 0.0])
    >>> grad.tolist()
    [-0.25, 0.25]
    """
    return _run(
        logits, targets, "logits", True, weight, pos_weight, sample_weight, reduction, base, dtype, out,
        num_threads, backend, with_grad=True, grad_output=grad_output,
    )  # fmt: skip


def binary_cross_entropy_with_grad(
    probs: ArrayLike,
    targets: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    base: float | None = None,
    grad_output: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: _Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[float | _Array, _Array]:
    r"""Binary cross-entropy and its gradient with respect to the probabilities.

    Parameters
    ----------
    probs, targets, weight, sample_weight, reduction, base, dtype, num_threads, backend
        As in `binary_cross_entropy`.
    grad_output, out
        As in `binary_cross_entropy_with_logits_with_grad`.

    Returns
    -------
    loss : float or ndarray
        As from `binary_cross_entropy`.
    grad : ndarray
        Shape of ``probs``, dtype of ``out`` or of ``probs``: :math:`(1-t)/(1-p) - t/p`, infinite where
        the loss is.

    Raises
    ------
    TypeError, ValueError, BackendUnavailable
        As `binary_cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastce
    >>> loss, grad = fastce.binary_cross_entropy_with_grad(np.array([0.5, 0.25]), [1.0, 0.0])
    >>> grad.round(4).tolist()
    [-1.0, 0.6667]
    """
    return _run(
        probs, targets, "probs", False, weight, None, sample_weight, reduction, base, dtype, out,
        num_threads, backend, with_grad=True, grad_output=grad_output,
    )  # fmt: skip


def _run(
    given: ArrayLike,
    targets: ArrayLike,
    name: str,
    from_logits: bool,
    weight: ArrayLike | None,
    pos_weight: ArrayLike | None,
    sample_weight: ArrayLike | None,
    reduction: str,
    base: float | None,
    dtype: DTypeLike | None,
    out: _Array | None,
    num_threads: int | None,
    backend: str | None,
    with_grad: bool = False,
    grad_output: ArrayLike | None = None,
) -> tuple[float | _Array, Any]:
    x, t = np.asarray(given), np.asarray(targets)
    own = format_of(x, name, dtype)
    if t.shape != x.shape:
        raise ValueError(f"targets: expected the shape of {name}, {x.shape}; got {t.shape}")
    if t.dtype.kind in "biu" and not (dtype is not None and t.dtype == np.uint16):
        t = _as_numbers(t, own)
    of_targets = format_beside(t, "targets", dtype)
    check_reduction(reduction)
    unit = check_base(base)
    other_out = with_grad and out is not None and format_of(out, "out", _bits(out, x)) is not own
    half = own.memory.itemsize == 2
    format = FLOAT32 if half and (of_targets is not own or other_out) else own

    inputs = [Operand(x, own, format), Operand(t, of_targets, format)]
    extras: dict[str, int] = {}  # where in the inputs each stands

    def add(role: str, values: _Array) -> None:
        extras[role] = len(inputs)
        inputs.append(Operand.of(np.broadcast_to(values.astype(format.result), x.shape)))

    n_counted = float(x.size)
    if weight is not None:
        add("weight", finite_numbers(real_numbers(weight, "weight", x.shape), "weight"))
    if sample_weight is not None:
        prefixes = [x.shape[:k] for k in range(1, max(1, x.ndim) + 1)]
        rows = finite_numbers(real_numbers(sample_weight, "sample_weight", prefixes), "sample_weight")
        n_counted = array_sum(rows.reshape(-1)) * (x.size // max(1, rows.size))
        add("sample_weight", rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim)))
    if pos_weight is not None:
        positive = finite_numbers(real_numbers(pos_weight, "pos_weight", x.shape), "pos_weight")
        if (positive < 0).any():
            raise ValueError(
                f"pos_weight: expected no negative number, got {positive[positive < 0][0]}"
            )
        add("pos_weight", positive)
    grad_unit = unit / n_counted if reduction == "mean" and n_counted else unit
    if reduction == "mean" and not n_counted:
        grad_unit = 0.0
    if grad_output is not None:
        upstream = real_numbers(grad_output, "grad_output", [()] if reduction != "none" else x.shape)
        if upstream.ndim:
            add("grad_output", upstream)
        else:
            grad_unit *= float(upstream)

    outputs: dict[str, Operand] = {}
    losses = grad = None
    if out is not None and not with_grad:
        if reduction != "none":
            raise ValueError(f"out: takes the losses, which needs reduction='none'; got {reduction!r}")
        check_loss_dtype(out)
        check_out(out, x.shape, [(name, x), ("targets", t)], None)
    if reduction == "none":
        losses = np.empty(x.shape, format.result)
        outputs["losses"] = Operand.of(losses)
    if with_grad:
        grad = np.empty(x.shape, x.dtype.newbyteorder("=")) if out is None else out
        if out is not None:
            check_out(out, x.shape, [(name, x), ("targets", t)], name)
        outputs["grad"] = Operand(grad, format_of(grad, "out", _bits(grad, x)), format)

    kernels = registry.load(registry.choose(backend, format.name))
    count = threads.resolve(num_threads, x.size, kernels.max_threads)
    sums: list[float] = []
    n_bad = 0
    for ins, outs in elementwise(inputs, list(outputs.values())):
        found = dict(zip(outputs, outs, strict=True))
        extra = {role: ins[at] for role, at in extras.items()}
        weights = _product(extra.get("weight"), extra.get("sample_weight"))
        piece_sums = np.empty((-(-len(ins[0]) // BINARY_TILE), 2))
        n_bad += kernels.binary(
            ins[0],
            ins[1],
            found.get("losses"),
            piece_sums,
            from_logits=from_logits,
            weight=weights,
            pos_weight=extra.get("pos_weight"),
            unit=unit,
            scale=_product(weights, extra.get("grad_output")),
            grad_unit=grad_unit,
            grad=found.get("grad"),
            num_threads=count,
        )
        sums += piece_sums.reshape(-1).tolist()
    if n_bad:
        raise _invalid(x, t, name, from_logits)
    if losses is not None:
        if out is not None and not with_grad:
            out[...] = losses
            return out, grad
        return losses[()], grad
    total = exact_sum(sums)
    if reduction == "sum":
        return total, grad
    return (total / n_counted if n_counted else math.nan), grad


def _as_numbers(t: _Array, own: Format) -> _Array:
    """Return integers or booleans as numbers of the logits' dtype, which has 0 and 1."""
    outside = (t < 0) | (t > 1) if t.dtype.kind != "b" else np.zeros(1, bool)
    if outside.any():
        raise _outside_error("targets", t, outside)
    return t.astype(np.float32 if own.name == "bfloat16" else own.memory)


def _product(a: _Array | None, b: _Array | None) -> _Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _bits(array: _Array, x: _Array) -> str | None:
    return "bfloat16" if array.dtype == np.uint16 == x.dtype else None


def _invalid(x: _Array, t: _Array, name: str, from_logits: bool) -> ValueError:
    numbers = widened(t)
    outside = ~((numbers >= 0) & (numbers <= 1))
    if outside.any():
        return _outside_error("targets", numbers, outside)
    numbers = widened(x)
    outside = (numbers < 0) | (numbers > 1)
    if outside.any():
        return _outside_error(name, numbers, outside)
    return ValueError(f"{name}: changed while they were read")


def _outside_error(name: str, numbers: _Array, outside: NDArray[np.bool_]) -> ValueError:
    at = unraveled(outside.argmax(), outside.shape)
    return ValueError(f"{place(name, at)} = {numbers[at]}: expected a probability in [0, 1]")
