"""Values, gradients and outputs by the rules of `fastce.kernels`, on every backend and variant."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from cases import DTYPES, INF, SIZES, WIDTHS, both, problem
from tolerances import FINITE_DIFFERENCE_ABS, LOSS_ULP

import fastce


def test_hand_derived_values(backend):
    """Derived by hand: log 2, log(1 + e^-1), and log 4 for the lesser side of odds 3 to 1."""
    x = np.log(
        [[1.0, 1.0, 0.0], [1.0, np.e, 0.0], [3.0, 1.0, 0.0]],
        where=[[True, True, False]] * 3,
        out=np.full((3, 3), -INF),
    )
    loss = fastce.cross_entropy(x, [0, 1, 1], reduction="none", backend=backend)
    np.testing.assert_allclose(loss, [np.log(2), np.log1p(np.exp(-1)), np.log(4)], rtol=1e-15)


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_gradient_against_finite_differences(backend, n_classes):
    x, y = problem(4, n_classes, "float64")
    _, grad = fastce.cross_entropy_with_grad(x, y, backend=backend)
    step = 1e-6
    for j in {0, 1, n_classes - 1, int(y[2])}:
        up, down = x.copy(), x.copy()
        up[2, j] += step
        down[2, j] -= step
        slope = fastce.cross_entropy(up, y, backend=backend) - fastce.cross_entropy(
            down, y, backend=backend
        )
        assert grad[2, j] == pytest.approx(slope / (2 * step), abs=FINITE_DIFFERENCE_ABS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_gradient_rows_sum_to_zero(backend, dtype, n_classes):
    x, y = problem(20, n_classes, dtype)
    _, grad = both(x, y, backend)
    total = np.abs(grad.sum(axis=1, dtype=np.float64))
    assert (total <= 4 * np.finfo(dtype).eps * np.abs(grad).sum(axis=1)).all()


@pytest.mark.parametrize("n_classes", SIZES)
def test_ranks(backend, n_classes):
    x, y = problem(30, n_classes)
    x = np.round(x)  # many ties
    stats = fastce.row_stats(x, y, outputs=["rank"], backend=backend)
    assert stats.loss is None
    expected = [oracle.rank(row, t) for row, t in zip(x.tolist(), y.tolist(), strict=True)]
    assert stats.rank.tolist() == expected


def test_reductions_agree(backend):
    x, y = problem(100, 10)
    y[::7] = -100
    losses = fastce.cross_entropy(x, y, reduction="none", backend=backend)
    total = fastce.cross_entropy(x, y, reduction="sum", backend=backend)
    mean = fastce.cross_entropy(x, y, backend=backend)
    assert type(total) is type(mean) is float
    assert losses.dtype == np.float32
    assert total == pytest.approx(losses.sum(dtype=np.float64), rel=1e-15)
    assert mean == total / np.count_nonzero(y != -100)
    for reduction, n_kept in (("sum", 1), ("mean", np.count_nonzero(y != -100))):
        _, grad = fastce.cross_entropy_with_grad(x, y, reduction=reduction, backend=backend)
        np.testing.assert_allclose(grad, both(x, y, backend)[1] / n_kept, rtol=1e-6)


@pytest.mark.parametrize("upstream", [2.5, -1.0, 0.0, 1e-30])
@pytest.mark.parametrize("n_classes", [4, 50])
def test_upstream_gradient(backend, upstream, n_classes):
    x, y = problem(6, n_classes, "float64")
    _, unit = both(x, y, backend)
    _, grad = both(x, y, backend, grad_output=upstream)
    np.testing.assert_allclose(grad, upstream * unit, rtol=1e-15, atol=1e-300)
    assert upstream != 0 or not grad.any()
    rows = np.linspace(-1, 2, 6)
    _, grad = both(x, y, backend, grad_output=rows)
    np.testing.assert_allclose(grad, rows[:, None] * unit, rtol=1e-15)


@pytest.mark.parametrize("n_classes", [4, 50])
def test_upstream_gradient_may_overflow(backend, n_classes):
    """2^127 and more: the largest components become infinite, the others keep their value."""
    x = np.zeros((1, n_classes), np.float32)
    x[0, 0] = 120.0
    _, grad = both(x, [1], backend, grad_output=1e39)
    assert grad[0, 0] == INF
    assert grad[0, 1] == -INF
    assert grad[0, 2] == pytest.approx(1e39 * np.exp(-120.0), rel=1e-5)


# ---- Outputs ----


def test_out_takes_losses(backend):
    x, y = problem(10, 4)
    expected = fastce.cross_entropy(x, y, reduction="none", backend=backend)
    for out in (np.empty(10, np.float32), np.empty(20, np.float32)[::2], np.empty(10)):
        assert fastce.cross_entropy(x, y, reduction="none", out=out, backend=backend) is out
        np.testing.assert_array_equal(out, expected)


def test_more_than_two_to_the_31_elements(backend):
    """2^31 + 2^11 elements over a broadcast row: an int index would wrap."""
    row = np.zeros(2048, np.float32)
    x = np.broadcast_to(row, (2**20 + 1, 2048))
    y = np.full(2**20 + 1, -100)
    y[-1] = 2047
    assert fastce.cross_entropy(x, y, backend=backend) == np.float32(np.log(2048))


# ---- Properties ----

finite_rows = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
    elements=st.floats(-500, 500),
)


@hypothesis.settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(x=finite_rows, data=st.data())
def test_properties(backend, x, data):
    n_rows, n_classes = x.shape
    y = data.draw(hnp.arrays(np.int64, n_rows, elements=st.integers(0, n_classes - 1)))
    loss, grad = both(x, y, backend)
    rows = np.arange(n_rows)
    assert (loss >= 0).all()
    assert (loss >= x.max(axis=1) - x[rows, y]).all()
    others = grad.copy()
    others[rows, y] = 0
    assert (others >= 0).all()
    assert (grad[rows, y] <= 0).all()
    # other classes may be permuted; the sums change order, so within twice the bound
    order = np.random.default_rng(0).permutation(n_classes)
    permuted, _ = both(x[:, order], np.argsort(order)[y], backend)
    allowed = 2 * LOSS_ULP["float64"] * np.spacing(np.maximum(loss, np.finfo(np.float64).tiny))
    assert (np.abs(permuted - loss) <= allowed).all()
