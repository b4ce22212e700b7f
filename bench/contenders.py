"""Who is timed: fastce's backends and its peers, each as a competent user would call it.

All return the loss of each row, and the gradient of their sum. Each library is imported when its
contender is loaded and not before, so that a process holds one OpenMP runtime, not all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastce import registry

Array = Any  # a NumPy array or the library's own


class AbsentError(RuntimeError):
    """A contender cannot run here; the message says why."""


class Contender(Protocol):
    """One way to compute the loss and the gradient."""

    def inputs(self, logits: NDArray[Any], targets: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return the inputs as the library wants them; called once per workload, not timed."""
        ...

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        """Return the losses."""
        ...

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        """Return losses and gradient, the latter in the buffer if the library can write there."""
        ...


class _TakesNumpy:
    def inputs(
        self, logits: NDArray[Any], targets: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        return logits, targets


class _Fastce(_TakesNumpy):
    def __init__(self, backend: registry.Backend) -> None:
        reason = registry.why_unavailable(backend)
        if reason is not None:
            raise AbsentError(reason)
        import fastce

        self._backend = backend.name
        self._fastce = fastce

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        return self._fastce.cross_entropy(
            logits, targets, reduction="none", num_threads=num_threads, backend=self._backend
        )

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        return self._fastce.cross_entropy_with_grad(
            logits,
            targets,
            reduction="none",
            out=grad_buffer,
            num_threads=num_threads,
            backend=self._backend,
        )


class _Numpy(_TakesNumpy):
    """In the logits' dtype, with one temporary at most; NumPy's loops use one thread."""

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        return self._exp(logits, targets, np.empty_like(logits))[0]

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        losses, total = self._exp(logits, targets, grad_buffer)
        grad_buffer /= total
        grad_buffer[np.arange(len(targets)), targets] -= 1
        return losses, grad_buffer

    @staticmethod
    def _exp(logits: Array, targets: Array, work: Array) -> tuple[Array, Array]:
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=work)
        target_logit = np.take_along_axis(work, targets[:, None], axis=1)
        np.exp(work, out=work)
        total = work.sum(axis=1, keepdims=True)
        return (np.log(total) - target_logit)[:, 0], total


class _Scipy(_TakesNumpy):
    """One thread, as NumPy."""

    def __init__(self) -> None:
        from scipy.special import log_softmax

        self._log_softmax = log_softmax

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        log_p = self._log_softmax(logits, axis=1)
        return -np.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        log_p = self._log_softmax(logits, axis=1)
        losses = -np.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
        np.exp(log_p, out=grad_buffer)
        grad_buffer[np.arange(len(targets)), targets] -= 1
        return losses, grad_buffer


class _Sklearn:
    """The loss behind scikit-learn's LogisticRegression and gradient boosting."""

    def __init__(self) -> None:
        from sklearn._loss.loss import HalfMultinomialLoss

        self._make = HalfMultinomialLoss

    def inputs(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        self._loss = self._make(n_classes=logits.shape[1])
        return logits, targets.astype(logits.dtype)  # it takes the targets in the logits' dtype

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        return self._loss.loss(targets, logits, n_threads=num_threads)

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        return self._loss.loss_gradient(
            targets, logits, gradient_out=grad_buffer, n_threads=num_threads
        )


class _Torch:
    """Eager PyTorch. Autograd returns a fresh gradient: there is no way to hand it a buffer."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._losses = functools.partial(torch.nn.functional.cross_entropy, reduction="none")

    def inputs(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        return self._torch.from_numpy(logits), self._torch.from_numpy(targets)  # the same memory

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        self._set_threads(num_threads)
        with self._torch.no_grad():
            return self._losses(logits, targets)

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        self._set_threads(num_threads)
        leaf = logits.detach().requires_grad_()
        losses = self._losses(leaf, targets)
        (grad,) = self._torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grad

    def _set_threads(self, num_threads: int) -> None:
        if self._torch.get_num_threads() != num_threads:
            self._torch.set_num_threads(num_threads)


class _TorchCompile(_Torch):
    """PyTorch through its compiler; the compilation falls into the first call."""

    def inputs(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        self._torch.compiler.reset()  # each shape gets code of its own, not a general one
        cross_entropy = self._torch.nn.functional.cross_entropy
        self._losses = self._torch.compile(
            lambda x, t: cross_entropy(x, t, reduction="none"), dynamic=False
        )
        return super().inputs(logits, targets)


class _Jax:
    """``jax.jit`` of optax's formula. XLA uses all cores the process has: it takes no number."""

    def __init__(self) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        self._jax = jax
        self._loss = jax.jit(self._losses)
        # The vector-Jacobian product returns the losses with the gradient, from one evaluation.
        self._loss_grad = jax.jit(self._losses_and_grad)

    def inputs(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        return self._jax.numpy.asarray(logits), self._jax.numpy.asarray(targets)

    def loss(self, logits: Array, targets: Array, num_threads: int) -> Array:
        return self._loss(logits, targets).block_until_ready()

    def loss_grad(
        self, logits: Array, targets: Array, grad_buffer: NDArray[Any], num_threads: int
    ) -> tuple[Array, Array]:
        return self._jax.block_until_ready(self._loss_grad(logits, targets))

    def _losses(self, logits: Array, targets: Array) -> Array:
        jnp = self._jax.numpy
        target_logit = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return self._jax.nn.logsumexp(logits, axis=1) - target_logit

    def _losses_and_grad(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        losses, backward = self._jax.vjp(lambda x: self._losses(x, targets), logits)
        return losses, backward(self._jax.numpy.ones_like(losses))[0]


CONTENDERS: dict[str, Callable[[], Contender]] = {
    **{f"fastce-{b.name}": functools.partial(_Fastce, b) for b in registry.BACKENDS},
    "numpy": _Numpy,
    "scipy": _Scipy,
    "sklearn": _Sklearn,
    "torch": _Torch,
    "torch-compile": _TorchCompile,
    "jax": _Jax,
}


def load(name: str) -> Contender:
    """Import what a contender needs and return it, or raise `AbsentError` with the reason."""
    try:
        return CONTENDERS[name]()
    except ImportError as error:
        raise AbsentError(error.msg.partition(" (")[0]) from error  # without the path in parentheses
