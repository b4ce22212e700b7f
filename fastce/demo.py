"""The demo: train a small byte-level language model with fastce's gradient, and score it.

The text is the language reference that comes with Python, so that it runs anywhere, offline. The model
reads the last bytes, looks up an embedding of each, and has one hidden layer; its loss and the gradient
of its logits are one call of `fastce.cross_entropy_with_grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import NDArray

import fastce
from fastce.scoring import Figures
from fastce.scoring.atomic import atomic_file
from fastce.scoring.formats.npy import NpyWriter

N_CLASSES = 256  # one for each value of a byte
N_STEPS = 700

_CONTEXT = 10  # bytes the model reads to predict the next one
_EMBEDDING = 24
_HIDDEN = 256
_BATCH = 1024
_LEARNING_RATE = 0.004
_N_SHARDS = 4

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found."""

    figures: Figures  #: of the held-out bytes
    unigram_bits: float  #: per held-out byte, of a model that knows only how frequent each byte is


def run_demo(
    folder: Path,
    *,
    n_steps: int = N_STEPS,
    on_step: Callable[[int, int, str], None] | None = None,
) -> DemoResult:
    """Train on 90 % of the text, write logits and targets of the rest as `.npy` shards, and score them.

    Parameters
    ----------
    folder : Path
        Where to write ``logits-00.npy`` and so on and ``targets.npy``; made if it is missing. Files of
        these names are replaced.
    n_steps : int, default 700
        Steps of training, of 1024 bytes each; 700 take about 15 s on two cores.
    on_step : callable, optional
        Called after each step with its number, ``n_steps`` and the loss as text.

    Returns
    -------
    DemoResult
        The same in each run on one machine.
    """
    text = np.frombuffer("".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    cut = len(text) * 9 // 10
    model = ByteModel(np.random.default_rng(0))
    train(model, text[:cut], n_steps, on_step or (lambda step, n_steps, loss: None))
    contexts, targets = windows(text[cut - _CONTEXT :])  # the first held-out byte has a context too
    folder.mkdir(parents=True, exist_ok=True)
    logits_paths = []
    for i, shard in enumerate(np.array_split(contexts, _N_SHARDS)):
        logits_paths.append(folder / f"logits-{i:02}.npy")
        _save(logits_paths[-1], model.logits(shard))
    _save(folder / "targets.npy", targets)
    figures = fastce.score_files(logits_paths, folder / "targets.npy", n_bytes=len(targets))
    return DemoResult(figures, unigram_bits(text[:cut], targets))


class ByteModel:
    """Logits of the next byte from the last ones: embeddings, a hidden layer of ReLU, a linear one."""

    def __init__(self, rng: np.random.Generator) -> None:
        def normal(*shape: int, std: float) -> _Floats:
            return (std * rng.standard_normal(shape)).astype(np.float32)

        n_inputs = _CONTEXT * _EMBEDDING
        self.embedding = normal(N_CLASSES, _EMBEDDING, std=0.3)
        self.w1 = normal(n_inputs, _HIDDEN, std=math.sqrt(2 / n_inputs))
        self.b1 = np.zeros(_HIDDEN, np.float32)
        self.w2 = normal(_HIDDEN, N_CLASSES, std=math.sqrt(0.25 / _HIDDEN))
        self.b2 = np.zeros(N_CLASSES, np.float32)

    @property
    def parameters(self) -> tuple[_Floats, ...]:
        """The arrays that training changes in place."""
        return self.embedding, self.w1, self.b1, self.w2, self.b2

    def logits(self, contexts: _Bytes) -> _Floats:
        """Return the logits of the byte after each context, (n, 256)."""
        return self._forward(contexts)[2]

    def loss_and_gradients(
        self, contexts: _Bytes, targets: _Bytes
    ) -> tuple[float, tuple[_Floats, ...]]:
        """Return the mean loss of a batch and its gradient in each of the parameters."""
        x, hidden, logits = self._forward(contexts)
        loss, d_logits = fastce.cross_entropy_with_grad(logits, targets, out=logits)
        d_hidden = (d_logits @ self.w2.T) * (hidden > 0)
        d_x = (d_hidden @ self.w1.T).reshape(-1, _EMBEDDING)
        one_hot = np.eye(N_CLASSES, dtype=np.float32)[contexts.reshape(-1)]
        gradients = (
            one_hot.T @ d_x,
            x.T @ d_hidden,
            d_hidden.sum(axis=0),
            hidden.T @ d_logits,
            d_logits.sum(axis=0),
        )
        return float(loss), gradients

    def _forward(self, contexts: _Bytes) -> tuple[_Floats, _Floats, _Floats]:
        x = self.embedding[contexts].reshape(len(contexts), -1)
        hidden = np.maximum(x @ self.w1 + self.b1, 0)
        return x, hidden, hidden @ self.w2 + self.b2


def train(
    model: ByteModel, text: _Bytes, n_steps: int, on_step: Callable[[int, int, str], None]
) -> None:
    """Fit the model by Adam, with a learning rate that falls to zero along a cosine."""
    rng = np.random.default_rng(1)
    contexts, targets = windows(text)
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in model.parameters]
    for step in range(1, n_steps + 1):
        batch = rng.integers(len(targets), size=_BATCH)
        loss, gradients = model.loss_and_gradients(contexts[batch], targets[batch])
        rate = _LEARNING_RATE * (1 + math.cos(math.pi * step / n_steps)) / 2
        rate *= math.sqrt(1 - 0.99**step) / (1 - 0.9**step)  # Adam's moments start at zero
        for parameter, gradient, (m, v) in zip(model.parameters, gradients, moments, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.01 * (gradient * gradient - v)
            parameter -= rate * m / (np.sqrt(v) + 1e-8)
        on_step(step, n_steps, f"{loss / math.log(2):.3f} bits per byte")


def windows(text: _Bytes) -> tuple[_Bytes, _Bytes]:
    """Return each run of context bytes, as views, and the byte that follows it."""
    runs = np.lib.stride_tricks.sliding_window_view(text, _CONTEXT + 1)
    return runs[:, :-1], runs[:, -1]


def unigram_bits(text: _Bytes, targets: _Bytes) -> float:
    """Return the bits per target byte of the byte frequencies of a text, add-one smoothed."""
    counts = np.bincount(text, minlength=N_CLASSES) + 1
    return float(-np.log2(counts / counts.sum())[targets].mean())


def _save(path: Path, array: NDArray[np.generic]) -> None:
    with atomic_file(path) as file:
        NpyWriter(file, array.shape, array.dtype).write(array)
