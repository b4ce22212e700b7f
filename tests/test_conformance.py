"""Every rule of `fastce.kernels`, and every corner case, on every backend and variant."""

from __future__ import annotations

import ctypes
import mmap
import sys

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from cases import HALVES, SIZES
from tolerances import FINITE_DIFFERENCE_ABS, LOSS_ULP

import fastce

INF, NAN = np.inf, np.nan
DTYPES = ("float32", "float64")
ALL_DTYPES = DTYPES + HALVES
# Narrow rows, one block, several blocks: the three ways through a compiled kernel.
WIDTHS = (3, 10, 40, 700, 2100)


def both(x, y, backend, **options):
    return fastce.cross_entropy_with_grad(x, y, backend=backend, reduction="none", **options)


def assert_same_bits(got, expected, message=""):
    assert got.dtype == expected.dtype
    kind = f"u{got.itemsize}"
    same = np.ascontiguousarray(got).view(kind) == np.ascontiguousarray(expected).view(kind)
    assert (same | (np.isnan(got) & np.isnan(expected))).all(), message


def problem(n_rows, n_classes, dtype="float32", seed=0):
    rng = np.random.default_rng([seed, n_rows, n_classes])
    x = (3 * rng.standard_normal((n_rows, n_classes))).astype(dtype)
    return x, rng.integers(0, n_classes, n_rows)


# ---- Values ----


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


# ---- Corner cases (the contract's table) ----


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_ignored_row_is_not_read(backend, n_classes):
    x, y = problem(5, n_classes)
    x[1], x[3] = NAN, INF
    y[1] = y[3] = -100
    loss, grad = both(x, y, backend)
    assert loss[1] == loss[3] == 0.0
    assert not grad[[1, 3]].any()
    kept = [0, 2, 4]
    np.testing.assert_array_equal(loss[kept], both(x[kept], y[kept], backend)[0])
    assert fastce.row_stats(x, y, backend=backend).rank[1] == -1
    assert np.isfinite(fastce.cross_entropy(x, y, backend=backend))


@pytest.mark.parametrize("ignore_index", [0, 2, 255])
def test_ignore_index_may_be_a_class_or_any_number(backend, ignore_index):
    x, y = problem(40, 5)
    y[3] = ignore_index
    targets = y.astype(np.uint8)
    loss = fastce.cross_entropy(
        x, targets, reduction="none", ignore_index=ignore_index, backend=backend
    )
    np.testing.assert_array_equal(loss == 0, y == ignore_index)


def test_every_row_ignored(backend):
    x, _ = problem(3, 4)
    y = np.full(3, -100)
    assert np.isnan(fastce.cross_entropy(x, y, backend=backend))
    assert fastce.cross_entropy(x, y, reduction="sum", backend=backend) == 0.0
    assert not fastce.cross_entropy(x, y, reduction="none", backend=backend).any()
    loss, grad = fastce.cross_entropy_with_grad(x, y, backend=backend)
    assert np.isnan(loss)
    assert not grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0, 5)])
def test_empty_batch(backend, shape):
    x, y = np.empty(shape, np.float32), np.empty(shape[:-1], np.int64)
    assert np.isnan(fastce.cross_entropy(x, y, backend=backend))
    assert fastce.cross_entropy(x, y, reduction="sum", backend=backend) == 0.0
    loss, grad = both(x, y, backend)
    assert loss.shape == y.shape
    assert grad.shape == shape


def test_one_class(backend):
    loss, grad = both(np.array([[3.0], [-7.0]]), [0, 0], backend)
    for array in (loss, grad):
        np.testing.assert_array_equal(array, np.zeros_like(array))
        assert not np.signbit(array).any()


@pytest.mark.parametrize("n_classes", [2, 33, 600, 100_000])
def test_masked_logits_have_probability_zero_wherever_they_stand(backend, n_classes):
    for keep in {0, n_classes // 2, n_classes - 1}:
        x = np.full((1, n_classes), -INF, np.float32)
        x[0, keep] = 1.5
        loss, grad = both(x, [keep], backend)
        assert loss[0] == 0.0
        assert not grad.any()
        x[0, (keep + 1) % n_classes] = 1.5
        loss, grad = both(x, [keep], backend)
        assert loss[0] == np.float32(np.log(2))
        assert np.count_nonzero(grad) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_target_logit_minus_infinity(backend, dtype, n_classes):
    x, y = problem(3, n_classes, dtype)
    _, p = both(x, y, backend)
    x[1, y[1]] = -INF
    loss, grad = both(x, y, backend)
    assert loss[1] == INF
    assert grad[1, y[1]] == -1.0
    assert grad[1].sum(dtype=np.float64) == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(loss[[0, 2]]).all()
    np.testing.assert_array_equal(grad[[0, 2]], p[[0, 2]])
    assert fastce.cross_entropy(x, y, reduction="sum", backend=backend) == INF


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_nan_or_infinity_spoils_its_row_alone(backend, bad, n_classes):
    """At every place in the row: the vector lanes, the remainder, the target."""
    places = range(n_classes) if n_classes < 100 else [*range(70), *range(n_classes - 70, n_classes)]
    x, y = problem(3, n_classes)
    expected = both(x, y, backend)
    for place in places:
        spoilt = x.copy()
        spoilt[1, place] = bad
        loss, grad = both(spoilt, y, backend)
        assert np.isnan(loss[1]), place
        assert np.isnan(grad[1]).all(), place
        np.testing.assert_array_equal(loss[[0, 2]], expected[0][[0, 2]])
        np.testing.assert_array_equal(grad[[0, 2]], expected[1][[0, 2]])
        assert fastce.row_stats(spoilt, y, backend=backend).rank[1] == -1


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_row_of_minus_infinity(backend, n_classes):
    x, y = problem(2, n_classes)
    x[0] = -INF
    loss, grad = both(x, y, backend)
    assert np.isnan(loss[0])
    assert np.isnan(grad[0]).all()
    assert np.isfinite(loss[1])
    assert np.isfinite(grad[1]).all()


def test_nan_among_minus_infinities(backend):
    """A block of -inf is passed over; a NaN in it is not."""
    x = np.full((1, 3000), -INF, np.float32)
    x[0, 100], x[0, 2500] = NAN, 1.0
    assert np.isnan(both(x, [2500], backend)[0][0])


# ---- Same bits for any layout, batch and number of threads ----


def layouts(x):
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


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n_classes", [2, 3, 10, 31, 65, 700, 1500])
def test_any_layout_gives_the_same_bits(backend, dtype, n_classes):
    x, y = problem(37, n_classes, dtype)
    y[5] = -100
    x[7, n_classes // 2] = NAN
    x[9, 0] = -INF
    loss, grad = both(x, y, backend)
    for name, view in layouts(x).items():
        got_loss, got_grad = both(view, y, backend)
        assert_same_bits(got_loss, loss, name)
        assert_same_bits(got_grad, grad, name)
        if view.flags.writeable and view.dtype.isnative:
            both(view, y, backend, out=view)
            assert_same_bits(view, grad, f"{name}, in place")
    for name, out in layouts(np.zeros_like(x)).items():
        if out.flags.writeable:
            got = both(x, y, backend, out=out)
            assert got[1] is out
            assert_same_bits(out.astype(dtype), grad, name)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("inner", [1, 5, 16, 45])
@pytest.mark.parametrize("n_classes", [10, 40, 1100])
def test_classes_in_the_middle_give_the_same_bits(backend, dtype, inner, n_classes):
    x, y = problem(3 * inner, n_classes, dtype)
    loss, grad = both(x, y, backend)
    middle = np.ascontiguousarray(x.reshape(3, inner, n_classes).swapaxes(1, 2))
    y = y.reshape(3, inner)
    got_loss, got_grad = both(middle, y, backend, axis=1)
    assert_same_bits(got_loss.reshape(-1), loss)
    assert_same_bits(got_grad.swapaxes(1, 2).reshape(x.shape), grad)
    both(middle, y, backend, axis=1, out=middle)
    assert_same_bits(middle, got_grad, "in place")


def test_batch_axes_that_do_not_merge(backend):
    """Three batch axes in an order that no two strides describe: copied a block at a time."""
    x, y = problem(4 * 5 * 6, 12)
    loss, grad = both(x, y, backend)
    view = x.reshape(4, 5, 6, 12).transpose(2, 1, 0, 3).copy().transpose(2, 1, 0, 3)
    got_loss, got_grad = both(view, y.reshape(4, 5, 6), backend)
    assert_same_bits(got_loss.reshape(-1), loss)
    assert_same_bits(got_grad.reshape(x.shape), grad)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n_classes", [2, 10, 40, 1000, 2100])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_a_gradient_past_the_caches_has_the_same_bits(backend, dtype, n_classes, offset, monkeypatch):
    x, y = problem(150, n_classes, dtype)
    y[3] = -100
    _, grad = both(x, y, backend)
    monkeypatch.setattr("fastce.losses._STREAM_BYTES", 0)
    memory = np.full(x.size + offset + 1, 7, dtype)
    out = memory[offset:-1].reshape(x.shape)
    both(x, y, backend, out=out)
    assert_same_bits(out, grad)
    assert (memory[:offset] == 7).all()
    assert memory[-1] == 7


@pytest.mark.parametrize("n_classes", [10, 300])
@pytest.mark.parametrize("half", HALVES)
def test_half_logits_into_another_dtype(backend, half, n_classes):
    """Computed in float32 and rounded once, not to half first."""
    x, y = problem(40, n_classes, half)
    loss, grad = both(x.astype("float32"), y, backend)
    for dtype in ("float32", "float64"):
        out = np.empty(x.shape, dtype)
        assert_same_bits(both(x, y, backend, out=out)[0], loss)
        assert_same_bits(out, grad.astype(dtype))


@pytest.mark.parametrize("n_classes", [10, 300])
def test_the_bits_of_bfloat16(backend, n_classes):
    x, y = problem(40, n_classes, "bfloat16")
    loss, grad = both(x, y, backend)
    bits = x.view(np.uint16)
    got_loss, got_grad = both(bits, y, backend, dtype="bfloat16")
    assert_same_bits(got_loss, loss)
    assert_same_bits(got_grad, grad.view(np.uint16))
    both(bits, y, backend, dtype="bfloat16", out=bits)
    assert_same_bits(bits, got_grad, "in place")


@pytest.mark.parametrize("half", HALVES)
def test_every_half_is_widened_exactly(backend, half):
    """All finite numbers, subnormal ones too: log(1 + e^-x) of each, as from float32."""
    infinity = np.array(INF, half).view(
        np.uint16
    )  # the numbers, then this, then NaNs; twice, for the sign
    values = np.concatenate([np.arange(infinity), np.arange(infinity) + 2**15])
    values = values.astype(np.uint16).view(half)
    for n_classes in (2, 40):
        x = np.zeros((len(values), n_classes), half)
        x[:, 1] = values
        y = np.zeros(len(values), np.int64)
        expected = fastce.cross_entropy(x.astype("float32"), y, reduction="none", backend=backend)
        assert_same_bits(fastce.cross_entropy(x, y, reduction="none", backend=backend), expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_row_for_all_threads(backend, dtype, order):
    """Rows of more than 2^18 classes are cut at fixed places."""
    n_classes = 2 * 2**18 + 4321
    x, y = problem(3, n_classes, dtype)
    y[0], y[1] = 2**18 + 5, n_classes - 1
    x[0, 2**18 + 5] = 30.0
    x[2, : 2**18] = -INF
    truth = fastce.cross_entropy_with_grad(x.astype("float64"), y, reduction="none", backend="numpy")
    x = np.array(x, order=order)
    loss, grad = both(x, y, backend, num_threads=1)
    np.testing.assert_allclose(loss, truth[0], rtol=1e-6 if dtype != "float64" else 1e-14)
    rtol = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(
        grad.astype("float64"), truth[1], rtol=rtol, atol=6e-8 if dtype == "float16" else 0
    )
    for num_threads in (2, 3):
        got_loss, got_grad = both(x, y, backend, num_threads=num_threads)
        assert_same_bits(got_loss, loss)
        assert_same_bits(got_grad, grad)
    ranks = fastce.row_stats(x, y, backend=backend).rank
    assert ranks.tolist() == fastce.row_stats(x, y, backend="numpy").rank.tolist()
    both(x, y, backend, out=x)
    assert_same_bits(x, grad, "in place")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("n_classes", [1, 10, 40, 600])
def test_a_small_call_of_plain_arrays_is_like_any_other(backend, dtype, n_classes):
    """The short way round the checks, which other integers and lists do not take."""
    x, y = problem(20, n_classes, dtype)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": backend}
        short = fastce.cross_entropy_with_grad(x, y, **options)
        long = fastce.cross_entropy_with_grad(x, y.astype(np.int32), **options)
        np.testing.assert_array_equal(short[0], long[0])
        assert_same_bits(short[1], long[1])
        assert type(short[0]) is type(long[0])
        np.testing.assert_array_equal(fastce.cross_entropy(x, y, **options), long[0])
    y[4] = -100
    np.testing.assert_array_equal(
        fastce.cross_entropy(x, y, backend=backend),
        fastce.cross_entropy(x, y.astype(np.int32), backend=backend),
    )


@pytest.mark.parametrize("offset", [1, 3, 7, 15])
def test_any_alignment_gives_the_same_bits(backend, offset):
    x, y = problem(20, 777)
    moved = np.zeros(x.size + 16, x.dtype)[offset : offset + x.size].reshape(x.shape)
    moved[:] = x
    for got, expected in zip(both(moved, y, backend), both(x, y, backend), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by Linux' mprotect")
@pytest.mark.parametrize("n_classes", [1, 5, 31, 33, 40, 63, 65, 97, 1025, 1500])
@pytest.mark.parametrize("at_end", [False, True])
def test_nothing_is_read_outside_the_rows(backend, n_classes, at_end):
    """The logits lie between two pages that may not be touched: the process would die."""
    page, n_rows = mmap.PAGESIZE, 3
    n_bytes = n_rows * n_classes * 4
    size = -(-n_bytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (address, address + page + size):
        assert mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page + (size - n_bytes if at_end else 0)
    x = np.frombuffer(memory, np.float32, n_rows * n_classes, offset).reshape(n_rows, n_classes)
    expected, y = problem(n_rows, n_classes)
    x[:] = expected
    for got, truth in zip(both(x, y, backend), both(expected, y, backend), strict=True):
        np.testing.assert_array_equal(got, truth)
    fastce.cross_entropy_with_grad(x, y, out=x, backend=backend)


def test_broadcast_rows(backend):
    row = np.array([1.0, 2.0, 3.0], np.float32)
    x = np.broadcast_to(row, (50, 3))
    loss, grad = both(x, np.arange(50) % 3, backend)
    np.testing.assert_array_equal(loss[:3], both(np.tile(row, (3, 1)), [0, 1, 2], backend)[0])
    np.testing.assert_array_equal(grad[:3], grad[3:6])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_class_axis(backend, axis):
    x = np.random.default_rng(5).standard_normal((6, 7, 8)).astype(np.float32)
    rows = np.moveaxis(x, axis, -1)
    y = np.random.default_rng(6).integers(0, rows.shape[-1], rows.shape[:-1])
    loss, grad = both(x, y, backend, axis=axis)
    expected = both(rows.reshape(-1, rows.shape[-1]).copy(), y.reshape(-1), backend)
    np.testing.assert_array_equal(loss.reshape(-1), expected[0])
    np.testing.assert_array_equal(np.moveaxis(grad, axis, -1).reshape(expected[1].shape), expected[1])
    assert grad.shape == x.shape


def test_one_row_without_batch_axes(backend):
    loss, grad = both(np.array([1.0, 2.0]), 1, backend)
    assert loss.shape == ()
    assert grad.shape == (2,)
    assert loss == pytest.approx(np.log1p(np.exp(-1)))


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4", ">u8"]
)
def test_any_integer_dtype(backend, kind):
    x, y = problem(30, 9)
    expected = fastce.cross_entropy(x, y, backend=backend)
    assert fastce.cross_entropy(x, y.astype(kind), backend=backend) == expected
    assert fastce.cross_entropy(x, np.repeat(y, 2).astype(kind)[::2], backend=backend) == expected


@pytest.mark.parametrize("n_classes", [10, 40, 3000])
def test_rows_do_not_depend_on_their_neighbours(backend, n_classes):
    x, y = problem(150, n_classes)
    loss, grad = both(x, y, backend)
    for start, stop in ((0, 1), (5, 22), (70, 150)):
        part = both(x[start:stop], y[start:stop], backend)
        np.testing.assert_array_equal(part[0], loss[start:stop])
        np.testing.assert_array_equal(part[1], grad[start:stop])


@pytest.mark.parametrize("n_classes", [10, 300, 20_000])
def test_any_number_of_threads_gives_the_same_bits(backend, n_classes):
    x, y = problem(400_000 // n_classes, n_classes)
    y[::5] = -100
    total = fastce.cross_entropy(x, y, backend=backend, num_threads=1)
    loss, grad = both(x, y, backend, num_threads=1)
    for num_threads in (2, 3, 4, 7):
        assert fastce.cross_entropy(x, y, backend=backend, num_threads=num_threads) == total
        got = both(x, y, backend, num_threads=num_threads)
        np.testing.assert_array_equal(got[0], loss)
        np.testing.assert_array_equal(got[1], grad)


def test_slices_change_no_bit(backend, monkeypatch):
    """A long call goes to the kernels in slices, so that Ctrl-C is heard."""
    x, y = problem(3000, 50)
    expected = fastce.cross_entropy(x, y, backend=backend), both(x, y, backend)[1]
    monkeypatch.setattr("fastce.problem._SLICE_ELEMENTS", 1)
    monkeypatch.setattr("fastce.problem._COPY_ELEMENTS", 1)
    for layout in (x, np.asfortranarray(x)):
        assert fastce.cross_entropy(layout, y, backend=backend) == expected[0]
        np.testing.assert_array_equal(both(layout, y, backend)[1], expected[1])


# ---- Outputs ----


@pytest.mark.parametrize("n_classes", [10, 40, 3000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_in_place(backend, n_classes, order):
    x, y = problem(60, n_classes)
    y[4] = -100
    loss, grad = both(x, y, backend)
    buffer = x.copy(order=order)
    got_loss, got = fastce.cross_entropy_with_grad(
        buffer, y, reduction="none", out=buffer, backend=backend
    )
    assert got is buffer
    np.testing.assert_array_equal(got, grad)
    np.testing.assert_array_equal(got_loss, loss)


def test_out_takes_losses(backend):
    x, y = problem(10, 4)
    expected = fastce.cross_entropy(x, y, reduction="none", backend=backend)
    for out in (np.empty(10, np.float32), np.empty(20, np.float32)[::2], np.empty(10)):
        assert fastce.cross_entropy(x, y, reduction="none", out=out, backend=backend) is out
        np.testing.assert_array_equal(out, expected)


def test_inputs_are_unchanged(backend):
    x, y = problem(50, 20)
    before = x.copy(), y.copy()
    both(x, y, backend)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


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
