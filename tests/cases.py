"""Rows of logits and targets: ordinary ones in any layout, and those that are hard for a reason."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  gives NumPy the dtype bfloat16
import numpy as np
import oracle
from numpy.typing import NDArray
from tolerances import NEAR_ABS, NEAR_REL

import fastce

INF, NAN = np.inf, np.nan
DTYPES = ("float32", "float64")
HALVES = ("float16", "bfloat16")
ALL_DTYPES = DTYPES + HALVES
# Narrow rows, one block, several blocks: the three ways through a compiled kernel.
WIDTHS = (3, 10, 40, 700, 2100)

# Around the lanes (4, 8, 16), the strips of four vectors (32, 64), the switch from rows to classes as
# lanes (32), and the blocks of a long row (512, 1024).
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 511, 513, 1023, 1025, 2050)


def both(x, y, backend, **options):
    """Return the losses of the rows and their gradients."""
    return fastce.cross_entropy_with_grad(x, y, backend=backend, reduction="none", **options)


def assert_same_bits(got, expected, message=""):
    assert got.dtype == expected.dtype, message
    kind = f"u{got.itemsize}"
    same = np.ascontiguousarray(got).view(kind) == np.ascontiguousarray(expected).view(kind)
    assert (same | (np.isnan(got) & np.isnan(expected))).all(), message


def assert_near(got, expected, message="", larger_term=0.0):
    """Compare with a float64 computation; a difference is as accurate as its larger term."""
    name = got.dtype.name
    if name == "int64":
        np.testing.assert_array_equal(got, expected, err_msg=message)
        return
    atol = np.maximum(NEAR_ABS[name], NEAR_REL[name] * np.asarray(larger_term))
    got, expected = got.astype(np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, message
    with np.errstate(invalid="ignore"):
        off = np.abs(got - expected) > atol + NEAR_REL[name] * np.abs(expected)
    off = np.where(np.isfinite(expected), off | ~np.isfinite(got), got != expected)
    off &= ~(np.isnan(got) & np.isnan(expected))
    assert not off.any(), f"{message}: {got[off][:4]} for {expected[off][:4]} at {np.argwhere(off)[:4]}"


def problem(n_rows, n_classes, dtype="float32", seed=0):
    """Return ordinary logits and class ids."""
    rng = np.random.default_rng([seed, n_rows, n_classes])
    x = (3 * rng.standard_normal((n_rows, n_classes))).astype(dtype)
    return x, rng.integers(0, n_classes, n_rows)


def probabilities(n_rows, n_classes, dtype="float32", seed=0):
    """Return distributions: some classes impossible, every third row certain."""
    rng = np.random.default_rng([seed, n_rows, n_classes])
    p = rng.exponential(size=(n_rows, n_classes)) * (rng.random((n_rows, n_classes)) < 0.7)
    p[:, rng.integers(0, n_classes)] += 0.1
    p[::3] = np.arange(n_classes) == rng.integers(0, n_classes, (len(p[::3]), 1))
    return (p / p.sum(axis=1, keepdims=True)).astype(dtype)


def layouts(x):
    """Return the same rows, by the name of how they lie in memory."""
    n, c = x.shape
    wide = np.zeros((n, 2 * c), x.dtype)
    wide[:, ::2] = x
    padded = np.zeros((n, c + 3), x.dtype)
    padded[:, :c] = x
    raw = np.zeros(x.nbytes + 1, np.uint8)
    misaligned = raw[1:].view(x.dtype).reshape(x.shape)
    misaligned[:] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    found = {
        "Fortran": np.asfortranarray(x),
        "every other column": wide[:, ::2],
        "padded rows": padded[:, :c],
        "rows backwards": x[::-1].copy()[::-1],
        "columns backwards": x[:, ::-1].copy()[:, ::-1],
        "misaligned": misaligned,
        "read-only": read_only,
    }
    if x.dtype.name != "bfloat16":  # whose type knows no other order
        found["other byte order"] = x.astype(x.dtype.newbyteorder())
    return found


@dataclass(frozen=True, eq=False)
class Case:
    """Rows of one width in one dtype."""

    name: str
    logits: NDArray
    targets: NDArray[np.int64]

    @functools.cached_property
    def exact(self) -> tuple[oracle.Pair, oracle.Pair]:
        """The exact losses and gradients for the class ids."""
        rows = [
            oracle.loss_and_gradient(x, int(t))
            for x, t in zip(self.logits.tolist(), self.targets, strict=True)
        ]
        return (
            oracle.as_pair([loss for loss, _ in rows]),
            oracle.as_pair([g for _, grad in rows for g in grad]),
        )

    @functools.cached_property
    def rows(self) -> list[oracle.Row]:
        """What else is exact about each row is made of this."""
        return [oracle.Row.of(x) for x in self.logits.tolist()]


def _targets(rng: np.random.Generator, logits: NDArray) -> NDArray[np.int64]:
    """Ask for the largest logit in even rows (p next to 1 where it leads), any in odd ones."""
    targets = rng.integers(0, logits.shape[1], len(logits))
    targets[::2] = logits[::2].argmax(axis=1)
    return targets


def _lead(logits: NDArray, lead: float) -> NDArray:
    """Raise one class of each row above the others by about ``lead``."""
    raised = logits.copy()
    raised[np.arange(len(logits)), np.arange(len(logits)) % logits.shape[1]] += lead
    return raised


def _families(rng: np.random.Generator, n: int, dtype: str) -> dict[str, NDArray]:
    normal = rng.standard_normal((4, n))
    far = 700.0 if dtype == "float64" else 80.0
    ramp = np.linspace(0, 30, n)
    late = normal.copy()
    late[:, -1] = 60.0
    return {
        "ordinary": normal,
        # p next to 1: where log(sum) and p - 1 lose every digit
        "lead-10": _lead(normal * 0.5, 10.0),
        "lead-17": _lead(normal * 0.1, 17.0),
        "lead-40": _lead(normal, 40.0),
        # a loss near the smallest normal number of float32; far below 1 ULP of 1 in float64
        "lead-far": _lead(normal, far),
        # x - m rounds: the carried remainder matters
        "scale-20": normal * 20,
        "scale-100": normal * 100,
        "shifted-up": normal + 1e4,
        "shifted-down": normal - 1e4,
        "huge": normal * 1e30,
        "subnormal": normal * 1e-40,
        # all rounding errors of x - m have one sign
        "equal-but-one": np.where(np.arange(n) == n // 2, 0.3, -10.37) * np.ones((4, 1)),
        "all-equal": np.full((4, n), 3.7),
        "two-maxima": np.where(np.arange(n) % max(1, n - 1) == 0, 5.0, normal),
        # the running maximum moves often, or once, late, and far
        "ascending": ramp + np.zeros((4, 1)),
        "descending": -ramp + np.zeros((4, 1)),
        "late-maximum": late,
        "masked": np.where(rng.random((4, n)) < 0.7, -np.inf, normal),
    }


@functools.cache
def accuracy_cases(dtype: str) -> tuple[Case, ...]:
    """Return every family at the sizes where the kernels take another path."""
    cases = []
    # half logits differ in how they are read and written only
    for n in SIZES if dtype not in HALVES else (2, 5, 17, 33, 97, 513, 1025):
        rng = np.random.default_rng([20261122, n])
        for name, logits in _families(rng, n, dtype).items():
            if n > 100 and name in ("lead-10", "shifted-down", "subnormal", "descending", "two-maxima"):
                continue  # the same code as at 97 classes; mpmath is slow
            with np.errstate(over="ignore"):  # "huge" is, for float16
                x = logits.astype(dtype)
            x[:, 0] = np.where((x == -np.inf).all(axis=1), 0.0, x[:, 0])  # keep one class
            cases.append(Case(f"{name}-{n}", x, _targets(rng, x)))
    return tuple(cases)


@functools.cache
def further_cases(dtype: str) -> tuple[Case, ...]:
    """Return a certain row and another of each family, at fewer sizes: for all that is not a loss."""
    sizes = {"float32": (2, 5, 17, 33, 97, 1025), "float64": (2, 5, 17, 33, 97, 513)}
    return tuple(
        Case(case.name, case.logits[:2], case.targets[:2])
        for case in accuracy_cases(dtype)
        # the maximum rises in each block of the longest
        if (case.logits.shape[1] in sizes.get(dtype, (5, 33, 97)) or case.name == "ascending-2050")
        and np.isfinite(case.logits.max(axis=1)).all()
    )
