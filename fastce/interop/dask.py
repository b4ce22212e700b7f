"""Dask: parts of a scoring run on a cluster's workers, and the loss of dask arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastce.losses import cross_entropy as _cross_entropy

_INSTALL = "python -m pip install 'fastce[dask]'"

#: How often Dask starts a part again whose worker died. Its own limit of workers that one task may
#: take down comes on top.
_RETRIES = 3

#: Seconds within which a finished part's record, which is small, arrives, or it is lost.
_FETCH = 10.0


class _Workers(Executor):
    """The workers of a cluster.

    When a worker dies whose result is not fetched yet, Dask may take it for an error (in
    `Client.get_executor`), forget the task, or wait for ever. Here it is then a new task.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def start(retries: int) -> None:
            task = self._client.submit(fn, *args, pure=False, retries=_RETRIES, **kwargs)
            future.add_done_callback(lambda future: task.cancel() if future.cancelled() else None)
            task.add_done_callback(lambda task: finish(task, retries))

        def finish(task: Any, retries: int) -> None:
            if future.cancelled():
                return
            try:
                try:
                    result = task.result(timeout=_FETCH)
                except (CancelledError, TimeoutError):
                    if not retries:
                        raise
                    task.cancel()
                    start(retries - 1)
                    return
            except BaseException as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(result)

        start(_RETRIES)
        return future


@contextmanager
def cluster_executor(address: str) -> Iterator[Executor]:
    """Connect to a Dask cluster, for `score_files`.

    Parameters
    ----------
    address : str
        ``tcp://HOST:PORT`` of a scheduler, whose workers must see the files by the same paths; or
        ``local:N``, N processes on this machine.

    Yields
    ------
    concurrent.futures.Executor
        Its tasks are tried again when a worker dies.

    Raises
    ------
    ValueError
        If the address is neither.
    ModuleNotFoundError
        If Dask is not installed.
    OSError
        If the scheduler does not answer.
    """
    try:
        from distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"dask: not installed; {_INSTALL}") from error
    kind, _, rest = address.partition(":")
    if kind == "local" and rest.isdecimal() and int(rest) > 0:
        # Loopback, no dashboard, no limit on memory: it asks nothing of the network, and blocks are
        # bounded already.
        with (
            LocalCluster(
                n_workers=int(rest),
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                memory_limit=None,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield _Workers(client)
    elif kind in ("tcp", "tls", "ucx"):
        with Client(address) as client:
            yield _Workers(client)
    else:
        raise ValueError(f"dask: expected tcp://HOST:PORT or local:N, got {address!r}")


def cross_entropy(
    logits: Any,
    targets: Any,
    *,
    weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    base: float | None = None,
    num_threads: int | None = 1,
    backend: str | None = None,
) -> Any:
    """Softmax cross-entropy of dask arrays, lazily, chunk by chunk.

    Parameters
    ----------
    logits : dask.array.Array, shape (..., n_classes)
        The classes in one chunk.
    targets : dask.array.Array or array_like
        Class ids, shape (...), or class probabilities, shape of ``logits``.
    weight, ignore_index, label_smoothing, reduction, base, backend
        As in `fastce.cross_entropy`.
    num_threads : int or None, default 1
        Of each chunk; Dask runs several at a time.

    Returns
    -------
    dask.array.Array
        Losses, shape (...), or their sum or mean, 0-dimensional. The sum adds the chunks' sums in
        Dask's order: its last bits depend on the chunks.

    Raises
    ------
    ValueError
        If the classes are in several chunks, or an argument is wrong.
    ModuleNotFoundError
        If Dask is not installed.
    """
    try:
        import dask.array as da
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"dask: not installed; {_INSTALL}") from error
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction: expected none, sum or mean, got {reduction!r}")
    x, y = da.asarray(logits), da.asarray(targets)
    if x.numblocks[-1] != 1:
        raise ValueError(
            f"logits: expected the class axis in one chunk, got {x.numblocks[-1]}; "
            "use logits.rechunk({-1: -1})"
        )
    soft = y.ndim == x.ndim
    if y.shape != (x.shape if soft else x.shape[:-1]):
        raise ValueError(f"targets: expected shape {x.shape[:-1]} or {x.shape}, got {y.shape}")
    y = y.rechunk(x.chunks if soft else x.chunks[:-1])
    axes = tuple(range(x.ndim))
    losses = da.blockwise(
        _cross_entropy,
        axes[:-1],
        x,
        axes,
        y,
        axes if soft else axes[:-1],
        dtype=np.float64 if x.dtype == np.float64 else np.float32,
        concatenate=True,
        meta=np.empty((0,) * (x.ndim - 1), np.float64 if x.dtype == np.float64 else np.float32),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
        base=base,
        num_threads=num_threads,
        backend=backend,
    )
    if reduction == "none":
        return losses
    total = losses.sum(dtype=np.float64)
    if reduction == "sum":
        return total
    if soft:
        return total / np.prod(y.shape[:-1])
    kept = da.ones(y.shape, dtype=bool, chunks=y.chunks) if ignore_index is None else y != ignore_index
    if weight is None:
        return total / kept.sum()
    weights = da.where(kept, y, 0).map_blocks(np.asarray(weight).__getitem__, dtype=np.float64)
    return total / da.where(kept, weights, 0).sum()
