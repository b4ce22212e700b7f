"""Who is timed: fastce's backends and its peers, each as a competent user would call it.

All return the loss of each row, and the gradient of their sum. Each library is imported when its
contender is loaded and not before, so that a process holds one OpenMP runtime, not all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastce import registry
from fastce.bench import numpy_dtype

Array = Any  # a NumPy array or the library's own
Call = Callable[[], Any]

_HALF = ("float16", "bfloat16")


class AbsentError(RuntimeError):
    """A contender cannot run here, or not on such logits; the message says why."""


class Batch(NamedTuple):
    """What a contender gets."""

    logits: NDArray[Any]
    targets: NDArray[np.int64]
    axis: int  # of the classes

    @property
    def dtype(self) -> str:
        """The name of the logits' dtype."""
        return self.logits.dtype.name


class Contender(Protocol):
    """One way to compute the loss and the gradient, with the number of threads it was loaded with.

    Its methods return the call to time. What a library wants done once, such as a conversion to its
    own arrays, happens before they return.
    """

    #: Whether it can write the gradient into an array it is given.
    fills: bool

    def loss(self, batch: Batch) -> Call:
        """Return a call that returns the losses."""
        ...

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        """Return a call that returns losses and gradient, the latter in ``grad`` if that can be."""
        ...

    def to_numpy(self, array: Array) -> NDArray[Any]:
        """Return a result as a NumPy array of the same dtype."""
        ...


class _Numbers:
    """What takes and returns NumPy arrays."""

    fills = True

    def to_numpy(self, array: Array) -> NDArray[Any]:
        return np.asarray(array)


class _Fastce(_Numbers):
    def __init__(self, backend: registry.Backend, num_threads: int) -> None:
        reason = registry.why_unavailable(backend)
        if reason is not None:
            raise AbsentError(reason)
        import fastce

        self._backend, self._fastce = backend, fastce
        self._how = {"reduction": "none", "num_threads": num_threads, "backend": backend.name}

    def loss(self, batch: Batch) -> Call:
        return functools.partial(
            self._fastce.cross_entropy, *self._arguments(batch), **self._how_on(batch)
        )

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        return functools.partial(
            self._fastce.cross_entropy_with_grad,
            *self._arguments(batch),
            out=grad,
            **self._how_on(batch),
        )

    def _arguments(self, batch: Batch) -> tuple[Array, Array]:
        if batch.dtype not in self._backend.dtypes:
            raise AbsentError(f"no kernels for {batch.dtype}")
        return batch.logits, batch.targets

    def _how_on(self, batch: Batch) -> dict[str, Any]:
        return self._how if batch.axis == -1 else {**self._how, "axis": batch.axis}


class _Numpy(_Numbers):
    """In the logits' dtype, with one temporary at most; half logits by way of float32.

    NumPy's loops use one thread.
    """

    def __init__(self, num_threads: int) -> None:
        pass

    def loss(self, batch: Batch) -> Call:
        return lambda: self._exp(batch, None)[0]

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        half = batch.dtype in _HALF
        at = np.expand_dims(batch.targets, batch.axis)

        def call() -> tuple[Array, Array]:
            losses, work, total = self._exp(batch, None if half else grad)
            work /= total
            at_target = np.take_along_axis(work, at, axis=batch.axis)
            np.put_along_axis(work, at, at_target - 1, axis=batch.axis)
            if not half:
                return losses, work
            if grad is None:
                return losses, work.astype(batch.logits.dtype)
            grad[...] = work
            return losses, grad

        return call

    @staticmethod
    def _exp(batch: Batch, work: Array | None) -> tuple[Array, Array, Array]:
        logits, targets, axis = batch
        if batch.dtype in _HALF:
            logits = work = logits.astype(np.float32)
        work = np.subtract(logits, logits.max(axis=axis, keepdims=True), out=work)
        target_logit = np.take_along_axis(work, np.expand_dims(targets, axis), axis=axis)
        np.exp(work, out=work)
        total = work.sum(axis=axis, keepdims=True)
        return np.squeeze(np.log(total) - target_logit, axis=axis), work, total


class _Scipy(_Numbers):
    """One thread, as NumPy."""

    def __init__(self, num_threads: int) -> None:
        from scipy.special import log_softmax

        self._log_softmax = log_softmax

    def loss(self, batch: Batch) -> Call:
        self._check(batch)
        return lambda: self._losses(batch)[0]

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        self._check(batch)
        at = np.expand_dims(batch.targets, batch.axis)

        def call() -> tuple[Array, Array]:
            losses, log_p = self._losses(batch)
            found = np.exp(log_p, out=log_p if grad is None else grad)
            np.put_along_axis(found, at, np.take_along_axis(found, at, batch.axis) - 1, batch.axis)
            return losses, found

        return call

    def _losses(self, batch: Batch) -> tuple[Array, Array]:
        log_p = self._log_softmax(batch.logits, axis=batch.axis)
        at = np.expand_dims(batch.targets, batch.axis)
        return -np.squeeze(np.take_along_axis(log_p, at, batch.axis), axis=batch.axis), log_p

    @staticmethod
    def _check(batch: Batch) -> None:
        if batch.dtype in _HALF:
            raise AbsentError("no half precision of its own")


class _Sklearn(_Numbers):
    """The loss behind scikit-learn's LogisticRegression and gradient boosting."""

    def __init__(self, num_threads: int) -> None:
        from sklearn._loss.loss import HalfMultinomialLoss

        self._make, self._n_threads = HalfMultinomialLoss, num_threads

    def loss(self, batch: Batch) -> Call:
        loss, targets = self._prepare(batch)
        return functools.partial(loss.loss, targets, batch.logits, n_threads=self._n_threads)

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        loss, targets = self._prepare(batch)
        return functools.partial(
            loss.loss_gradient,
            targets,
            batch.logits,
            gradient_out=grad,
            n_threads=self._n_threads,
        )

    def _prepare(self, batch: Batch) -> tuple[Any, Array]:
        if batch.dtype in _HALF:
            raise AbsentError("float32 and float64 only")
        if not batch.logits.flags.c_contiguous or batch.axis != -1:
            raise AbsentError("contiguous rows only")
        # it takes the targets in the logits' dtype
        return self._make(n_classes=batch.logits.shape[1]), batch.targets.astype(batch.logits.dtype)


class _Torch:
    """Eager PyTorch. Autograd returns a fresh gradient: there is no way to hand it a buffer."""

    fills = False

    def __init__(self, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._torch = torch

    def loss(self, batch: Batch) -> Call:
        return functools.partial(self._losses(), *self._tensors(batch))

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        losses_of, (logits, targets) = self._losses(), self._tensors(batch)
        leaf = logits.detach().requires_grad_()

        def call() -> tuple[Array, Array]:
            losses = losses_of(leaf, targets)
            (found,) = self._torch.autograd.grad(losses.sum(), leaf)
            return losses.detach(), found

        # The gradient has the classes where the tensor has them, the second axis; `to_numpy` of a
        # view moves them back.
        if batch.axis in (-1, 1):
            return call
        return lambda: self._moved_back(call(), batch.axis)

    def to_numpy(self, array: Array) -> NDArray[Any]:
        if array.dtype == self._torch.bfloat16:
            return array.view(self._torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return array.numpy()

    def _losses(self) -> Callable[[Array, Array], Array]:
        return functools.partial(self._torch.nn.functional.cross_entropy, reduction="none")

    def _tensors(self, batch: Batch) -> tuple[Array, Array]:
        """Return tensors on the same memory, the classes in the second axis."""
        from_numpy = self._torch.from_numpy
        if batch.dtype == "bfloat16":  # which from_numpy does not know
            logits = from_numpy(batch.logits.view(np.int16)).view(self._torch.bfloat16)
        else:
            logits = from_numpy(batch.logits)
        return self._torch.movedim(logits, batch.axis, 1), from_numpy(batch.targets)

    def _moved_back(self, result: tuple[Array, Array], axis: int) -> tuple[Array, Array]:
        return result[0], self._torch.movedim(result[1], 1, axis)


class _TorchCompile(_Torch):
    """PyTorch through its compiler; the compilation falls into the first call."""

    def _losses(self) -> Callable[[Array, Array], Array]:
        self._torch.compiler.reset()  # each shape gets code of its own, not a general one
        cross_entropy = self._torch.nn.functional.cross_entropy
        return self._torch.compile(lambda x, t: cross_entropy(x, t, reduction="none"), dynamic=False)


class _Jax:
    """``jax.jit`` of optax's formula. XLA uses all cores the process has: it takes no number."""

    fills = False

    def __init__(self, num_threads: int) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        self._jax = jax

    def loss(self, batch: Batch) -> Call:
        logits, targets = self._arrays(batch)
        losses = self._jax.jit(functools.partial(self._losses, axis=batch.axis))
        return lambda: losses(logits, targets).block_until_ready()

    def loss_grad(self, batch: Batch, grad: NDArray[Any] | None) -> Call:
        logits, targets = self._arrays(batch)
        # The vector-Jacobian product returns the losses with the gradient, from one evaluation.
        both = self._jax.jit(functools.partial(self._losses_and_grad, axis=batch.axis))
        return lambda: self._jax.block_until_ready(both(logits, targets))

    def to_numpy(self, array: Array) -> NDArray[Any]:
        return np.asarray(array)

    def _arrays(self, batch: Batch) -> tuple[Array, Array]:
        if not batch.logits.flags.c_contiguous:
            raise AbsentError("its arrays have no strides")
        return self._jax.numpy.asarray(batch.logits), self._jax.numpy.asarray(batch.targets)

    def _losses(self, logits: Array, targets: Array, axis: int) -> Array:
        jnp = self._jax.numpy
        at = jnp.expand_dims(targets, axis)
        target_logit = jnp.take_along_axis(logits, at, axis=axis).squeeze(axis)
        return self._jax.nn.logsumexp(logits, axis=axis) - target_logit

    def _losses_and_grad(self, logits: Array, targets: Array, axis: int) -> tuple[Array, Array]:
        losses, backward = self._jax.vjp(lambda x: self._losses(x, targets, axis), logits)
        return losses, backward(self._jax.numpy.ones_like(losses))[0]


CONTENDERS: dict[str, Callable[[int], Contender]] = {
    **{f"fastce-{b.name}": functools.partial(_Fastce, b) for b in registry.BACKENDS},
    "numpy": _Numpy,
    "scipy": _Scipy,
    "sklearn": _Sklearn,
    "torch": _Torch,
    "torch-compile": _TorchCompile,
    "jax": _Jax,
}

# The slow ones stop at this many logits: their figures are no news, and would take most of a run.
_MAX_ELEMENTS = {
    "fastce-numpy": 12_000_000,
    "scipy": 12_000_000,
    "numpy float16": 12_000_000,  # 100 ns to convert what is subnormal there
}


def too_slow(name: str, dtype: str, n_elements: int) -> bool:
    """Whether a contender is left out of a workload of this size."""
    limit = _MAX_ELEMENTS.get(name, _MAX_ELEMENTS.get(f"{name} {dtype}"))
    return limit is not None and n_elements > limit


def load(name: str, num_threads: int) -> Contender:
    """Import what a contender needs and return it, or raise `AbsentError` with the reason."""
    try:
        return CONTENDERS[name](num_threads)
    except ImportError as error:
        raise AbsentError(error.msg.partition(" (")[0]) from error  # without the path in parentheses
