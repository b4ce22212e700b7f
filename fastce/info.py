"""Information, entropy, cross-entropy and Kullback-Leibler divergence: of distributions, in bits.

Probabilities are taken as they are: nothing is renormalised or clipped. ``0 log 0`` is 0, and what has
probability 0 carries infinite information.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastce import registry, threads
from fastce.kernels import Stats
from fastce.losses import run
from fastce.problem import (
    Operand,
    Problem,
    RowView,
    check_base,
    check_pair,
    check_rows,
    elementwise,
    format_of,
    invalid_probs,
    sliced,
)

__all__ = [
    "cross_entropy",
    "entropy",
    "entropy_from_logits",
    "information",
    "kl_divergence",
    "kl_divergence_from_logits",
]


def information(
    p: ArrayLike,
    *,
    base: float | None = 2.0,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Information that an event of probability p carries: ``-log p``.

    Parameters
    ----------
    p : array_like of float32, float64, float16 or bfloat16
        Probabilities, of any shape.
    base : float or None, default 2
        Of the logarithm: 2 for bits, None for nats.
    dtype, num_threads, backend
        As in `fastce.cross_entropy`.

    Returns
    -------
    float or ndarray
        Shape of ``p``; float64 for float64 probabilities, float32 otherwise. Exact for powers of two in
        bits.

    Raises
    ------
    TypeError
        If the dtype is not supported.
    ValueError
        If a probability is negative or NaN, or ``base`` is not positive, or 1.

    Examples
    --------
    Every value of a 16-bit number drawn evenly carries 16 bits; that a fair die shows five, log2 6:

    >>> import fastce.info
    >>> float(fastce.info.information(1 / 2**16))
    16.0
    >>> round(float(fastce.info.information(1 / 6)), 4)
    2.585
    """
    check_base(base)
    x = _probabilities(p)
    format = format_of(x, "p", dtype)
    kernels = registry.load(registry.choose(backend, format.name))
    count = threads.resolve(num_threads, x.size, kernels.max_threads)
    found = np.empty(x.shape, format.result)
    n_bad = 0
    for (part,), (result,) in elementwise([Operand(x, format, format)], [Operand.of(found)]):
        n_bad += kernels.information(part, result, base=base, num_threads=count)
    if n_bad:
        raise _invalid(("p", x))
    return found[()]


def entropy(
    p: ArrayLike,
    *,
    axis: int = -1,
    base: float | None = 2.0,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Entropy of distributions: ``sum(-p log p)``, the information expected.

    Parameters
    ----------
    p : array_like of float32, float64, float16 or bfloat16
        Probabilities, with those of one distribution along ``axis``. Any layout; never copied as a
        whole.
    axis : int, default -1
        Along which a distribution lies.
    base, dtype, num_threads, backend
        As in `information`.

    Returns
    -------
    float or ndarray
        Shape of ``p`` without ``axis``; float64 for float64 probabilities, float32 otherwise.

    Raises
    ------
    TypeError, ValueError
        As `information`.

    Examples
    --------
    Odds of 99 to 1, in bits; and of a fair coin:

    >>> import fastce.info
    >>> round(float(fastce.info.entropy([0.99, 0.01])), 4)
    0.0808
    >>> fastce.info.entropy([[0.5, 0.5], [1.0, 0.0]]).tolist()
    [1.0, 0.0]
    """
    x = _probabilities(p)
    check_base(base)
    problem = check_rows(x, axis=axis, dtype=dtype, name="p")
    return _measure("entropy", problem, None, base, num_threads, backend, ("p", x))


def cross_entropy(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: int = -1,
    base: float | None = 2.0,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Cross-entropy of distributions: ``sum(-p log q)``, the information expected by who believes q.

    Parameters
    ----------
    p, q : array_like of float32, float64, float16 or bfloat16
        Probabilities, of one shape, with those of one distribution along ``axis``.
    axis, base, dtype, num_threads, backend
        As in `entropy`.

    Returns
    -------
    float or ndarray
        Shape of ``p`` without ``axis``; float64 if either is, float32 otherwise. +inf where q is 0 and
        p is not.

    Raises
    ------
    TypeError, ValueError
        As `information`.

    See Also
    --------
    fastce.cross_entropy : Of logits and targets.

    Examples
    --------
    >>> import fastce.info
    >>> float(fastce.info.cross_entropy([0.5, 0.5], [0.25, 0.75]).round(4))
    1.2075
    """
    return _compare("cross_entropy", p, q, axis, base, dtype, num_threads, backend)


def kl_divergence(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: int = -1,
    base: float | None = 2.0,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Kullback-Leibler divergence of q from p: ``sum(p log(p / q))``.

    Parameters
    ----------
    p, q, axis, base, dtype, num_threads, backend
        As in `cross_entropy`.

    Returns
    -------
    float or ndarray
        Shape of ``p`` without ``axis``; float64 if either is, float32 otherwise. Never negative, and
        exactly 0 where p and q are the same. +inf where q is 0 and p is not.

    Raises
    ------
    TypeError, ValueError
        As `information`.

    Notes
    -----
    Computed as ``sum(p log(p/q) - p + q)``, no term of which is negative, so that it is accurate also
    where p and q hardly differ. Where the sums of p and q differ by more than the rounding of their
    terms, their difference is added: then the result is what the formula says, and may be negative.

    Examples
    --------
    It is the cross-entropy less the entropy:

    >>> import fastce.info
    >>> p, q = [0.5, 0.5], [0.25, 0.75]
    >>> float(fastce.info.kl_divergence(p, q).round(4))
    0.2075
    """
    return _compare("kl_divergence", p, q, axis, base, dtype, num_threads, backend)


def entropy_from_logits(
    logits: ArrayLike,
    *,
    axis: int = -1,
    base: float | None = 2.0,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Entropy of ``softmax(logits)``, from one read of the logits.

    Parameters
    ----------
    logits, axis, dtype, num_threads, backend
        As in `fastce.cross_entropy`.
    base : float or None, default 2
        Of the logarithm: 2 for bits, None for nats.

    Returns
    -------
    float or ndarray
        Shape of ``logits`` without ``axis``; float64 for float64 logits, float32 otherwise. NaN for a
        row that holds NaN or +inf, or -inf alone.

    Raises
    ------
    TypeError, ValueError
        As `fastce.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastce.info
    >>> float(fastce.info.entropy_from_logits(np.zeros(8)).round(4))
    3.0
    """
    unit = check_base(base)
    problem = check_rows(logits, axis=axis, dtype=dtype)
    found = np.empty(problem.n_rows, problem.dtype)
    run(problem, stats=Stats(entropy=found), num_threads=num_threads, backend=backend)
    return _scaled(found, unit, problem)


def kl_divergence_from_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int = -1,
    base: float | None = 2.0,
    dtype: DTypeLike | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Any:
    """Kullback-Leibler divergence of ``softmax(q_logits)`` from ``softmax(p_logits)``.

    Parameters
    ----------
    p_logits, q_logits : array_like of float32, float64, float16 or bfloat16
        Of one shape; layouts and dtypes as the logits of `fastce.cross_entropy`.
    axis, base, dtype, num_threads, backend
        As in `entropy_from_logits`.

    Returns
    -------
    float or ndarray
        Shape of ``p_logits`` without ``axis``; float64 if either is, float32 otherwise. Never negative,
        and exactly 0 where the logits are the same. +inf where a class is impossible for q alone; NaN
        for a row of either that holds NaN or +inf, or -inf alone.

    Raises
    ------
    TypeError, ValueError
        As `fastce.cross_entropy`.

    Examples
    --------
    >>> import numpy as np, fastce.info
    >>> float(fastce.info.kl_divergence_from_logits(np.log([0.5, 0.5]), np.log([0.25, 0.75])).round(4))
    0.2075
    """
    unit = check_base(base)
    names = ("p_logits", "q_logits")
    problem, other = check_pair(p_logits, q_logits, axis=axis, dtype=dtype, names=names)
    view, n_classes = problem.rows, problem.n_classes
    kernels = registry.load(registry.choose(backend, view.format.name))
    count = threads.resolve(num_threads, 2 * view.n_rows * n_classes, kernels.max_threads)
    found = np.empty(view.n_rows, problem.dtype)
    for rows, first_row, (p, q), _ in sliced(n_classes, [view, other]):
        kernels.kl_from_logits(p, q, first_row, found[rows], num_threads=count)
    return _scaled(found, unit, problem)


def _probabilities(p: ArrayLike) -> NDArray[Any]:
    """Return an array; whole numbers, which certain events have, as float64."""
    array = np.asarray(p)
    return array.astype(np.float64) if array.dtype.kind == "i" else array


def _compare(
    measure: str,
    p: ArrayLike,
    q: ArrayLike,
    axis: int,
    base: float | None,
    dtype: DTypeLike | None,
    num_threads: int | None,
    backend: str | None,
) -> Any:
    check_base(base)
    x, y = _probabilities(p), _probabilities(q)
    problem, other = check_pair(x, y, axis=axis, dtype=dtype, names=("p", "q"))
    return _measure(measure, problem, other, base, num_threads, backend, ("p", x), ("q", y))


def _measure(
    measure: str,
    problem: Problem,
    other: RowView | None,
    base: float | None,
    num_threads: int | None,
    backend: str | None,
    *given: tuple[str, NDArray[Any]],
) -> Any:
    view, n_classes = problem.rows, problem.n_classes
    kernels = registry.load(registry.choose(backend, view.format.name))
    count = threads.resolve(num_threads, view.n_rows * n_classes, kernels.max_threads)
    found = np.empty(view.n_rows, problem.dtype)
    n_bad = 0
    for rows, first_row, blocks, _ in sliced(n_classes, [view] if other is None else [view, other]):
        q = blocks[1] if other is not None else None
        n_bad += kernels.distributions(
            measure, blocks[0], q, first_row, found[rows], base=base, num_threads=count
        )
    if n_bad:
        raise _invalid(*given)
    return found.reshape(problem.batch_shape)[()]


def _invalid(*given: tuple[str, NDArray[Any]]) -> ValueError:
    for name, array in given:
        error = invalid_probs(array, name)
        if error is not None:
            return error
    return ValueError(f"{given[0][0]}: the probabilities changed while they were read")


def _scaled(nats: NDArray[Any], unit: float, problem: Problem) -> Any:
    found = nats if unit == 1.0 else (nats.astype(np.float64) * unit).astype(nats.dtype)
    return found.reshape(problem.batch_shape)[()]
