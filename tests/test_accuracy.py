"""Loss and gradient against 200 bits, for each backend and variant, over rows that are hard."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest
from cases import HALVES, accuracy_cases
from tolerances import GRAD_ULP, LOSS_ULP, SUM_REL

import fastce

DTYPES = ("float32", "float64")


@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_loss(backend, dtype, record_ulp):
    for case in accuracy_cases(dtype):
        got = fastce.cross_entropy(case.logits, case.targets, reduction="none", backend=backend)
        result = "float32" if dtype in HALVES else dtype
        assert got.dtype == result
        assert not np.signbit(got[~np.isnan(got)]).any(), f"{case.name}: negative loss or -0.0"
        exact, _ = case.exact
        smallest = float(np.finfo(result).smallest_subnormal)
        assert (got[exact[0] >= smallest] > 0).all(), f"{case.name}: a loss that is not 0 became 0"
        record = functools.partial(record_ulp, backend, "loss", dtype)
        _check(got, exact, LOSS_ULP[result], case.name, record)


@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_gradient(backend, dtype, record_ulp):
    for case in accuracy_cases(dtype):
        _, got = fastce.cross_entropy_with_grad(
            case.logits, case.targets, reduction="none", backend=backend
        )
        assert got.dtype == dtype
        _, exact = case.exact
        record = functools.partial(record_ulp, backend, "gradient", dtype)
        _check(got, exact, GRAD_ULP[dtype], case.name, record)


def _check(got, exact, limit, name, record):
    errors = oracle.ulp_errors(got, exact)
    worst = np.unravel_index(errors.argmax(), errors.shape)
    record(float(errors[worst]), name)
    assert errors[worst] <= limit, f"{name}{worst}: got {got[worst]!r}, {errors[worst]:.2f} ULP off"


@pytest.mark.parametrize("dtype", DTYPES + HALVES)
def test_loss_and_gradient_agree_with_loss_alone(backend, dtype):
    for case in accuracy_cases(dtype):
        alone = fastce.cross_entropy(case.logits, case.targets, reduction="none", backend=backend)
        both, _ = fastce.cross_entropy_with_grad(
            case.logits, case.targets, reduction="none", backend=backend
        )
        np.testing.assert_array_equal(alone, both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [10, 1000])
def test_mean_is_the_exact_mean_of_the_rows(backend, dtype, n_classes):
    import mpmath

    rng = np.random.default_rng(7)
    x = rng.standard_normal((3000, n_classes)).astype(dtype)
    y = rng.integers(0, n_classes, 3000)
    losses = fastce.cross_entropy(x, y, reduction="none", backend=backend)
    with mpmath.workprec(200):
        exact = mpmath.fsum(map(mpmath.mpf, losses.tolist()))
        total = fastce.cross_entropy(x, y, reduction="sum", backend=backend)
        mean = fastce.cross_entropy(x, y, backend=backend)
        assert abs(total - exact) <= SUM_REL * exact
        assert abs(mean - exact / 3000) <= SUM_REL * exact / 3000


@pytest.mark.parametrize(("dtype", "shift"), [("float32", 1024.0), ("float64", 2.0**40)])
@pytest.mark.parametrize("n_classes", [2, 10, 40, 1500])
def test_exact_shifts_change_no_bit(backend, dtype, shift, n_classes):
    rng = np.random.default_rng(11)
    # multiples of 2^-8: the shifted row is exactly representable
    x = (np.round(rng.standard_normal((50, n_classes)) * 4 * 256) / 256).astype(dtype)
    y = rng.integers(0, n_classes, 50)
    loss, grad = fastce.cross_entropy_with_grad(x, y, reduction="none", backend=backend)
    for moved in (x + np.asarray(shift, dtype), x - np.asarray(shift, dtype)):
        moved_loss, moved_grad = fastce.cross_entropy_with_grad(
            moved, y, reduction="none", backend=backend
        )
        np.testing.assert_array_equal(moved_loss, loss)
        np.testing.assert_array_equal(moved_grad, grad)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 1e8])
def test_equal_logits_at_any_offset(backend, offset):
    """Two equal logits carry log 2 however large: `lse - x_t` gives 0 at 1e8."""
    x = np.full((1, 2), offset, np.float32)
    loss = fastce.cross_entropy(x, [1], reduction="none", backend=backend)
    assert loss[0] == np.float32(np.log(2))


def test_many_equal_logits(backend):
    """A float32 sum stops growing at 2^24 terms; ours is log C."""
    x = np.broadcast_to(np.float32(1.5), (1, 2**25))
    assert fastce.cross_entropy(x, [3], backend=backend) == pytest.approx(np.log(2**25), rel=1e-7)
