"""The contract's table of corner cases, row by row, for every function it concerns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import (
    ALL_DTYPES,
    DTYPES,
    INF,
    NAN,
    WIDTHS,
    assert_near,
    assert_same_bits,
    both,
    probabilities,
    problem,
)

import fastce
from fastce import info

KINDS = ("ids", "probabilities")
BINARY = (fastce.binary_cross_entropy_with_logits, fastce.binary_cross_entropy)
BINARY_WITH_GRAD = (
    fastce.binary_cross_entropy_with_logits_with_grad,
    fastce.binary_cross_entropy_with_grad,
)


def as_kind(kind, y, n_classes, dtype="float32"):
    """Return class ids, or all the probability on them."""
    y = np.asarray(y)
    return y if kind == "ids" else (np.arange(n_classes) == y[..., None]).astype(dtype)


def assert_nothing(array):
    """All zeros, and none of them -0.0."""
    np.testing.assert_array_equal(array, np.zeros_like(array))
    assert not np.signbit(array).any()


# ---- Rows that are not read ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_ignored_row_is_not_read(backend, n_classes, smoothing):
    x, y = problem(5, n_classes)
    x[1], x[3] = NAN, INF
    y[1] = y[3] = -100
    loss, grad = both(x, y, backend, label_smoothing=smoothing)
    assert_nothing(loss[[1, 3]])
    assert_nothing(grad[[1, 3]])
    kept = [0, 2, 4]
    expected = both(x[kept], y[kept], backend, label_smoothing=smoothing)
    assert_same_bits(loss[kept], expected[0])
    assert_same_bits(grad[kept], expected[1])
    assert np.isfinite(fastce.cross_entropy(x, y, label_smoothing=smoothing, backend=backend))
    both(x, y, backend, label_smoothing=smoothing, out=x)
    assert_same_bits(x, grad, "in place")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_row_of_sample_weight_zero_is_not_read(backend, n_classes, kind):
    x, y = problem(4, n_classes)
    targets = as_kind(kind, y, n_classes)
    expected = both(x, targets, backend)
    x[1], x[2] = NAN, -INF
    if kind == "probabilities":
        targets[1], targets[2] = NAN, -1.0
    weights = [1.0, 0.0, 0.0, 1.0]
    loss, grad = both(x, targets, backend, sample_weight=weights)
    for got, full in zip((loss, grad), expected, strict=True):
        assert_nothing(got[1:3])
        assert_same_bits(got[[0, 3]], full[[0, 3]])
    mean = fastce.cross_entropy(x, targets, sample_weight=weights, backend=backend)
    assert mean == pytest.approx(expected[0][[0, 3]].mean(dtype=np.float64), rel=1e-15)


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_statistics_of_an_ignored_row(backend, n_classes):
    x, y = problem(5, n_classes)
    kept = fastce.row_stats(x, y, backend=backend)
    x[1], x[3] = NAN, INF
    y[1] = y[3] = -100
    stats = fastce.row_stats(x, y, backend=backend)
    for name, array in stats._asdict().items():
        absent = {"loss": 0.0, "argmax": -1, "rank": -1}.get(name, NAN)
        np.testing.assert_array_equal(array[[1, 3]], absent, err_msg=name)
        assert_same_bits(array[[0, 2, 4]], getattr(kept, name)[[0, 2, 4]], name)


def test_ignored_log_probabilities_are_not_read():
    log_probs = np.log([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])
    log_probs[1:] = NAN
    options = {"sample_weight": [1.0, 1.0, 0.0], "reduction": "none"}
    loss, grad = fastce.nll_loss_with_grad(log_probs, [0, -100, 1], **options)
    assert loss.tolist() == [np.log(4), 0.0, 0.0]
    assert grad.tolist() == [[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    loss, grad = fastce.nll_loss_with_grad([[NAN, -1.0]], [1])  # only the target's is read
    assert loss == 1.0
    assert grad.tolist() == [[0.0, -1.0]]


@pytest.mark.parametrize("name", ["weight", "sample_weight"])
@pytest.mark.parametrize("loss_and_grad", BINARY_WITH_GRAD)
def test_element_of_weight_zero_is_not_read(backend, loss_and_grad, name):
    x = np.linspace(0.1, 0.9, 40)
    t = np.linspace(0, 1, 40)
    expected = loss_and_grad(x, t, reduction="none", backend=backend)
    weight = np.ones(40)
    weight[5:25:2] = 0
    x[5], x[7], x[9], t[11], t[13] = NAN, INF, -INF, NAN, 7.0
    got = loss_and_grad(x, t, reduction="none", backend=backend, **{name: weight})
    for array, full in zip(got, expected, strict=True):
        assert_nothing(array[weight == 0])
        assert_near(array[weight == 1], full[weight == 1])


@pytest.mark.parametrize("ignore_index", [0, 2, 255])
def test_ignore_index_may_be_a_class_or_any_number(backend, ignore_index):
    x, y = problem(40, 5)
    y[3] = ignore_index
    targets = y.astype(np.uint8)
    options = {"reduction": "none", "ignore_index": ignore_index}
    loss = fastce.cross_entropy(x, targets, backend=backend, **options)
    np.testing.assert_array_equal(loss == 0, y == ignore_index)
    expected = fastce.nll_loss(fastce.log_softmax(x, backend=backend), targets, **options)
    assert_near(loss, expected)


# ---- Nothing to average ----


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": [1.0, 2.0, 0.5, 1.0]}])
def test_every_row_ignored(backend, options):
    x, _ = problem(3, 4)
    y = np.full(3, -100)
    options = {**options, "backend": backend}
    assert np.isnan(fastce.cross_entropy(x, y, **options))
    assert fastce.cross_entropy(x, y, reduction="sum", **options) == 0.0
    assert_nothing(fastce.cross_entropy(x, y, reduction="none", **options))
    for reduction in ("mean", "sum", "none"):
        assert_nothing(fastce.cross_entropy_with_grad(x, y, reduction=reduction, **options)[1])
    assert fastce.cross_entropy(x, y, normalizer=5.0, **options) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_that_sum_to_zero(backend, kind, smoothing):
    """The mean over no weight is NaN; sum and gradient stay what they are."""
    x, y = problem(4, 5)
    targets = as_kind(kind, y, 5)
    options = {"label_smoothing": smoothing, "backend": backend}
    sample_weights = [np.zeros(4), np.array([1.0, -1.0, 2.0, -2.0])]
    for sample_weight in sample_weights:
        options["sample_weight"] = sample_weight
        mean, grad = fastce.cross_entropy_with_grad(x, targets, **options)
        assert np.isnan(mean)
        assert not grad.any()
        total = fastce.cross_entropy(x, targets, reduction="sum", **options)
        losses = fastce.cross_entropy(x, targets, reduction="none", **options)
        assert total == pytest.approx(losses.sum(dtype=np.float64), abs=1e-12)
    assert total != 0


def test_class_weights_that_sum_to_zero(backend):
    x, y = problem(4, 5)
    weight = np.ones(5)
    weight[y] = 0
    mean, grad = fastce.cross_entropy_with_grad(x, y, weight=weight, backend=backend)
    assert np.isnan(mean)
    assert not grad.any()
    assert fastce.cross_entropy(x, y, weight=weight, reduction="sum", backend=backend) == 0.0
    assert_nothing(fastce.cross_entropy(x, y, weight=weight, reduction="none", backend=backend))
    # smoothing spreads to classes whose weight is not 0, but the mean's denominator is weight[y]
    options = {"weight": weight, "label_smoothing": 0.1, "backend": backend}
    assert np.isnan(fastce.cross_entropy(x, y, **options))
    assert fastce.cross_entropy(x, y, reduction="sum", **options) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0, 5)])
def test_empty_batch(backend, shape, kind):
    x = np.empty(shape, np.float32)
    targets = np.empty(shape[:-1], np.int64) if kind == "ids" else x.copy()
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing, "backend": backend}
        assert np.isnan(fastce.cross_entropy(x, targets, **options))
        assert fastce.cross_entropy(x, targets, reduction="sum", **options) == 0.0
        loss, grad = both(x, targets, **options)
        assert loss.shape == shape[:-1]
        assert grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (2, 0, 5)])
def test_empty_batch_of_everything_else(backend, shape):
    x = np.empty(shape, np.float32)
    y = np.empty(shape[:-1], np.int64)
    for activation in (fastce.softmax, fastce.log_softmax):
        assert activation(x, backend=backend).shape == shape
    for per_row in (fastce.logsumexp, info.entropy, info.entropy_from_logits):
        assert per_row(x, backend=backend).shape == shape[:-1]
    for per_row in (info.cross_entropy, info.kl_divergence, info.kl_divergence_from_logits):
        assert per_row(x, x, backend=backend).shape == shape[:-1]
    assert info.information(x, backend=backend).shape == shape
    assert {array.shape for array in fastce.row_stats(x, y, backend=backend)} == {shape[:-1]}
    assert np.isnan(fastce.nll_loss(x, y))
    assert fastce.nll_loss_with_grad(x, y, reduction="sum")[0] == 0.0
    for loss_and_grad in BINARY_WITH_GRAD:
        mean, grad = loss_and_grad(x, x, backend=backend)
        assert np.isnan(mean)
        assert grad.shape == shape
        assert loss_and_grad(x, x, reduction="sum", backend=backend)[0] == 0.0


@pytest.mark.parametrize("loss_and_grad", BINARY_WITH_GRAD)
def test_binary_weights_that_sum_to_zero(backend, loss_and_grad):
    x, t = np.full((2, 3), 0.3), np.full((2, 3), 0.5)
    mean, grad = loss_and_grad(x, t, sample_weight=[0.0, 0.0], backend=backend)
    assert np.isnan(mean)
    assert_nothing(grad)
    # `weight` does not count in the denominator, as in PyTorch
    mean, grad = loss_and_grad(x, t, weight=0.0, backend=backend)
    assert mean == 0.0
    assert_nothing(grad)


def test_no_classes_with_rows(backend):
    x, y = np.empty((3, 0), np.float32), np.zeros(3, int)
    calls = (
        lambda: fastce.cross_entropy(x, y, backend=backend),
        lambda: fastce.cross_entropy_with_grad(x, x, backend=backend),
        lambda: fastce.row_stats(x, y, backend=backend),
        lambda: fastce.softmax(x, backend=backend),
        lambda: fastce.log_softmax(x, backend=backend),
        lambda: fastce.logsumexp(x, backend=backend),
        lambda: fastce.nll_loss(x, y),
        lambda: info.entropy(x, backend=backend),
        lambda: info.kl_divergence(x, x, backend=backend),
        lambda: info.kl_divergence_from_logits(x, x, backend=backend),
    )
    for call in calls:
        with pytest.raises(ValueError, match="expected at least one class"):
            call()


# ---- One class ----


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_one_class(backend, dtype):
    x = np.array([[3.0], [-7.0], [0.0]], dtype)
    for targets in ([0, 0, 0], np.ones((3, 1), dtype), np.full((3, 1), 0.25, dtype)):
        for options in ({}, {"label_smoothing": 0.3}, {"weight": [2.0], "label_smoothing": 1.0}):
            for array in both(x, targets, backend, **options):
                assert_nothing(array)
    stats = fastce.row_stats(x, [0, 0, 0], backend=backend)
    for name in ("loss", "argmax", "rank", "entropy", "brier"):
        assert_nothing(getattr(stats, name))
    for name in ("lse", "target_logit", "max_logit"):
        assert getattr(stats, name).tolist() == [3.0, -7.0, 0.0]
    assert stats.max_prob.tolist() == [1.0, 1.0, 1.0]
    assert fastce.softmax(x, backend=backend).tolist() == [[1.0]] * 3
    assert_nothing(fastce.log_softmax(x, backend=backend))
    assert_nothing(info.kl_divergence_from_logits(x, x[::-1], backend=backend))


# ---- Targets out of range ----


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (np.int64, -1),
        (np.int64, 5),
        (np.int64, 2**32 + 1),  # 1 in 32 bits
        (np.int64, -(2**63)),
        (np.uint64, 2**64 - 1),
        (np.uint64, 2**64 - 100),  # -100 in 64 bits
        (np.int32, -(2**31)),
        (np.int8, -128),
        (np.uint8, 255),
    ],
)
def test_target_out_of_range(backend, kind, bad):
    """The first one is named, and nothing has been written; no value wraps into another."""
    x, y = problem(8, 5)
    y = y.astype(kind)
    y[5], y[6] = bad, 77
    message = rf"targets\[5\] = {bad} is outside \[0, 5\); pass ignore_index={bad}"
    losses, grad = np.full(8, 7.0, np.float32), np.full((8, 5), 7.0, np.float32)
    log_probs = fastce.log_softmax(x, backend=backend)
    # targets are checked in rows of weight 0 too
    weighing = {"weight": np.ones(5)}, {"sample_weight": (np.arange(8) < 3) * 1.0}
    for options in ({}, {"label_smoothing": 0.1}, *weighing):
        with pytest.raises(IndexError, match=message):
            fastce.cross_entropy(x, y, reduction="none", out=losses, backend=backend, **options)
        with pytest.raises(IndexError, match=message):
            fastce.cross_entropy_with_grad(x, y, out=grad, backend=backend, **options)
        if "label_smoothing" not in options:
            with pytest.raises(IndexError, match=message):
                fastce.nll_loss(log_probs, y, **options)
            with pytest.raises(IndexError, match=message):
                fastce.nll_loss_with_grad(log_probs, y, out=grad, **options)
    with pytest.raises(IndexError, match=message):
        fastce.row_stats(x, y, backend=backend)
    assert (losses == 7).all()
    assert (grad == 7).all()


def test_target_out_of_range_without_batch_axes(backend):
    with pytest.raises(IndexError, match=r"^targets = 3 is outside \[0, 3\)"):
        fastce.cross_entropy(np.zeros(3), 3, backend=backend)


# ---- Infinite and missing logits ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 33, 600, 100_000])
def test_masked_logits_have_probability_zero_wherever_they_stand(backend, n_classes, kind):
    for keep in sorted({0, n_classes // 2, n_classes - 1}):
        x = np.full((1, n_classes), -INF, np.float32)
        x[0, keep] = 1.5
        targets = as_kind(kind, [keep], n_classes)
        loss, grad = both(x, targets, backend)
        assert loss[0] == 0.0
        assert not grad.any()
        x[0, (keep + 1) % n_classes] = 1.5
        loss, grad = both(x, targets, backend)
        assert loss[0] == np.float32(np.log(2))
        assert np.count_nonzero(grad) == 2


# Where blocks and segments of the kernels end, and a run of -inf may cover the whole of one.
RUNS = [(0, 512), (0, 1024), (0, 1025), (511, 1537), (512, 1024), (1024, 2100), (1, 2099)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", RUNS)
def test_runs_of_minus_infinity_at_the_edges_of_blocks(backend, dtype, run):
    """Masked classes change nothing: the rest of the row alone gives the same numbers."""
    masked = np.zeros(2100, bool)
    masked[slice(*run)] = True
    x, _ = problem(3, 2100, dtype)
    x[:, masked] = -INF
    rest = x[:, ~masked].astype(np.float64)
    t = probabilities(3, 2100, dtype)
    t[:, masked] = 0
    y = np.full(3, np.flatnonzero(~masked)[-1])
    y_rest = np.full(3, rest.shape[1] - 1)

    p = fastce.softmax(x, backend=backend)
    assert_nothing(p[:, masked])
    assert_near(p[:, ~masked], fastce.softmax(rest, backend="numpy"))
    log_p = fastce.log_softmax(x, backend=backend)
    assert (log_p[:, masked] == -INF).all()
    assert_near(log_p[:, ~masked], fastce.log_softmax(rest, backend="numpy"))
    for targets, of_rest in ((y, y_rest), (t, t[:, ~masked].astype(np.float64))):
        loss, grad = both(x, targets, backend)
        expected = both(rest, of_rest, "numpy")
        assert_near(loss, expected[0])
        assert_near(grad[:, ~masked], expected[1], larger_term=expected[1].max())
        assert not grad[:, masked].any()
    stats = fastce.row_stats(x, y, backend=backend)
    expected = fastce.row_stats(rest, y_rest, backend="numpy")
    for name in stats._fields:
        if name != "argmax":
            assert_near(getattr(stats, name), getattr(expected, name), name)
    np.testing.assert_array_equal(stats.argmax, np.flatnonzero(~masked)[expected.argmax])
    other = problem(3, 2100, dtype, seed=1)[0]
    other[:, masked] = -INF
    divergence = info.kl_divergence_from_logits(x, other, base=None, backend=backend)
    expected = info.kl_divergence_from_logits(
        rest, other[:, ~masked].astype(np.float64), base=None, backend="numpy"
    )
    assert_near(divergence, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_target_logit_minus_infinity(backend, dtype, n_classes, kind):
    x, y = problem(3, n_classes, dtype)
    targets = as_kind(kind, y, n_classes, dtype)
    _, p = both(x, targets, backend)
    x[1, y[1]] = -INF
    loss, grad = both(x, targets, backend)
    assert loss[1] == INF
    assert grad[1, y[1]] == -1.0
    assert grad[1].sum(dtype=np.float64) == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(loss[[0, 2]]).all()
    np.testing.assert_array_equal(grad[[0, 2]], p[[0, 2]])
    assert fastce.cross_entropy(x, targets, reduction="sum", backend=backend) == INF
    stats = fastce.row_stats(x, y, backend=backend)
    assert stats.loss[1] == INF
    assert stats.target_logit[1] == -INF
    for name in ("lse", "max_logit", "entropy", "max_prob", "brier"):
        assert np.isfinite(getattr(stats, name)).all()
    assert stats.rank[1] >= n_classes - 1 - y[1]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_nan_or_infinity_spoils_its_row_alone(backend, bad, n_classes, kind, options):
    """At every place in the row: the vector lanes, the remainder, the target."""
    places = range(n_classes) if n_classes < 100 else [*range(70), *range(n_classes - 70, n_classes)]
    places = places if kind == "ids" and not options else places[::9]
    x, y = problem(3, n_classes)
    targets = as_kind(kind, y, n_classes)
    expected = both(x, targets, backend, **options)
    for place in places:
        spoilt = x.copy()
        spoilt[1, place] = bad
        loss, grad = both(spoilt, targets, backend, **options)
        assert np.isnan(loss[1]), place
        assert np.isnan(grad[1]).all(), place
        np.testing.assert_array_equal(loss[[0, 2]], expected[0][[0, 2]])
        np.testing.assert_array_equal(grad[[0, 2]], expected[1][[0, 2]])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_what_a_row_that_is_not_finite_yields(backend, bad, n_classes):
    x, y = problem(3, n_classes)
    q, _ = problem(3, n_classes, seed=1)
    works = {
        "softmax": lambda x: fastce.softmax(x, backend=backend),
        "log_softmax": lambda x: fastce.log_softmax(x, backend=backend),
        "entropy": lambda x: info.entropy_from_logits(x, backend=backend),
        "divergence of p": lambda x: info.kl_divergence_from_logits(x, q, backend=backend),
        "divergence of q": lambda x: info.kl_divergence_from_logits(q, x, backend=backend),
    }
    expected = {name: work(x) for name, work in works.items()}
    full = fastce.row_stats(x, y, backend=backend)
    for place in sorted({0, n_classes // 2, n_classes - 1}):
        spoilt = x.copy()
        spoilt[1, slice(None) if bad == -INF else place] = bad
        for name, work in works.items():
            got = work(spoilt)
            assert np.isnan(got[1]).all(), name
            assert_same_bits(got[[0, 2]], expected[name][[0, 2]], name)
        stats = fastce.row_stats(spoilt, y, backend=backend)
        assert stats.rank[1] == stats.argmax[1] == -1
        for name in ("loss", "entropy", "max_prob", "brier"):
            assert np.isnan(getattr(stats, name)[1]), name
        for name in ("lse", "max_logit"):  # which have limits
            np.testing.assert_equal(getattr(stats, name)[1], np.float32(bad), name)
        np.testing.assert_equal(stats.target_logit[1], spoilt[1, y[1]])
        for name in stats._fields:
            assert_same_bits(getattr(stats, name)[[0, 2]], getattr(full, name)[[0, 2]], name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_row_of_minus_infinity(backend, n_classes, kind):
    x, y = problem(2, n_classes)
    x[0] = -INF
    loss, grad = both(x, as_kind(kind, y, n_classes), backend)
    assert np.isnan(loss[0])
    assert np.isnan(grad[0]).all()
    assert np.isfinite(loss[1])
    assert np.isfinite(grad[1]).all()


def test_nan_among_minus_infinities(backend):
    """A block of -inf is passed over; a NaN in it is not."""
    x = np.full((1, 3000), -INF, np.float32)
    x[0, 100], x[0, 2500] = NAN, 1.0
    for targets in ([2500], as_kind("probabilities", [2500], 3000)):
        assert np.isnan(both(x, targets, backend)[0][0])
    assert np.isnan(fastce.logsumexp(x, backend=backend)[0])
    assert np.isnan(fastce.softmax(x, backend=backend)).all()
    assert np.isnan(info.entropy_from_logits(x, backend=backend)[0])


@pytest.mark.parametrize("n_classes", [3, 40, 2100])
def test_nan_beside_infinity(backend, n_classes):
    """Whichever comes first: logsumexp is NaN, not +inf."""
    for first, second in itertools.permutations((0, n_classes - 1)):
        x = np.zeros((1, n_classes), np.float32)
        x[0, first], x[0, second] = NAN, INF
        stats = fastce.row_stats(x, [1], backend=backend)
        assert np.isnan([stats.loss[0], stats.lse[0], stats.max_logit[0], stats.max_prob[0]]).all()
        assert np.isnan(fastce.log_softmax(x, backend=backend)).all()


# ---- Nothing times infinity ----


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_soft_target_zero_on_a_minus_infinite_logit(backend, n_classes):
    x, _ = problem(3, n_classes)
    t = probabilities(3, n_classes)
    t[:, 0], t[:, -1] = 0.0, 1.0
    x[:, 0] = -INF
    loss, grad = both(x, t, backend)
    expected = both(x[:, 1:].astype(np.float64), t[:, 1:].astype(np.float64), "numpy")
    assert_near(loss, expected[0])
    assert_near(grad[:, 1:], expected[1], larger_term=np.maximum(t[:, 1:], expected[1].max()))
    assert_nothing(np.abs(grad[:, 0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_class_weight_zero_on_an_infinite_loss(backend, n_classes, smoothing, kind):
    x, y = problem(3, n_classes)
    y[0], y[1], y[2] = 1, 1, 0
    x[:, 1] = -INF
    weight = np.ones(n_classes)
    weight[1] = 0
    options = {"weight": weight, "label_smoothing": smoothing}
    loss, grad = both(x, as_kind(kind, y, n_classes), backend, **options)
    assert np.isfinite(loss).all()
    assert np.isfinite(grad).all()
    if smoothing == 0:
        assert_nothing(loss[:2])
        assert not grad[:2].any()
    assert loss[2] > 0
    assert not grad[:, 1].any()


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_class_weight_zero_does_not_hide_nan(backend, n_classes):
    x, y = problem(2, n_classes)
    x[0, 1] = NAN
    weight = np.zeros(n_classes)
    loss, grad = both(x, y, backend, weight=weight)
    assert np.isnan(loss[0])
    assert np.isnan(grad[0]).all()
    assert_nothing(loss[1:])
    assert not grad[1:].any()


def test_weight_zero_of_an_infinite_negative_log_likelihood():
    loss, grad = fastce.nll_loss_with_grad([[-INF, 0.0]], [0], weight=[0.0, 1.0], reduction="sum")
    assert loss == 0.0
    assert not grad.any()


@pytest.mark.parametrize("n_classes", WIDTHS)
def test_smoothing_with_a_minus_infinite_logit(backend, n_classes):
    """The exact value: the masked class has a share, and it is impossible."""
    x, y = problem(3, n_classes)
    place = n_classes // 2
    y[:] = 0
    x[1, place] = -INF
    for targets in (y, as_kind("probabilities", y, n_classes)):
        loss, grad = both(x, targets, backend, label_smoothing=0.3)
        assert loss[1] == INF
        assert np.isfinite(loss[[0, 2]]).all()
        assert grad[1, place] == pytest.approx(-0.3 / n_classes, rel=1e-6)
        assert np.isfinite(grad).all()
        # nobody asks for the masked class if it has no weight
        weight = (np.arange(n_classes) != place) * 1.0
        loss, grad = both(x, targets, backend, label_smoothing=0.3, weight=weight)
        assert np.isfinite(loss).all()
        assert grad[1, place] == 0.0


# ---- Probabilities as targets ----


@pytest.mark.parametrize("total", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_probabilities_that_do_not_sum_to_one(backend, n_classes, total):
    x, _ = problem(4, n_classes, "float64")
    t = total * probabilities(4, n_classes, "float64")
    loss, grad = both(x, t, backend)
    log_p = fastce.log_softmax(x, backend="numpy")
    assert_near(loss, -(t * log_p).sum(axis=1))
    p = np.exp(log_p)
    sums = t.sum(axis=1, keepdims=True)
    assert_near(grad, p * sums - t, larger_term=4 * np.maximum(p * sums, t))
    if total == 0:
        assert_nothing(loss)


@pytest.mark.parametrize("bad", [-1e-3, -INF, NAN])
@pytest.mark.parametrize("n_classes", WIDTHS)
def test_negative_or_nan_targets(backend, n_classes, bad):
    """At every place of the row, and whatever smoothing and weights would make of it."""
    x, _ = problem(5, n_classes)
    places = range(n_classes) if n_classes < 100 else [0, 17, 600, n_classes - 1]
    masking = np.ones(n_classes)
    for place in places:
        t = probabilities(5, n_classes)
        t[3, place] = bad
        message = rf"targets\[3, {place}\] = {t[3, place]}: expected a probability"
        masking[:] = 1
        masking[place] = 0
        for options in ({}, {"label_smoothing": 0.9}, {"weight": masking}, {"label_smoothing": 1.0}):
            with pytest.raises(ValueError, match=message):
                fastce.cross_entropy(x, t, backend=backend, **options)
            with pytest.raises(ValueError, match=message):
                fastce.cross_entropy_with_grad(x, t, backend=backend, **options)


def test_the_first_invalid_probability_is_named_along_any_axis(backend):
    x, t = np.zeros((2, 4, 3), np.float32), np.full((2, 4, 3), 0.25, np.float32)
    t[1, 2, 0] = -0.5
    with pytest.raises(ValueError, match=r"targets\[1, 2, 0\] = -0.5"):
        fastce.cross_entropy(x, t, axis=1, backend=backend)
    t[0, 1, 2] = NAN  # the first one, but in a row that is not read
    weight = np.ones((2, 3))
    weight[0, 2] = 0
    with pytest.raises(ValueError, match=r"targets\[1, 2, 0\] = -0.5"):
        fastce.cross_entropy(x, t, axis=1, sample_weight=weight, backend=backend)


# ---- Binary ----


@pytest.mark.parametrize("pos_weight", [None, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_binary_limits_at_infinite_logits(backend, dtype, pos_weight):
    """Loss 0 where the certain answer is right, or the wrong one costs nothing; +inf elsewhere."""
    a = 1.0 if pos_weight is None else pos_weight
    cases = [  # logit, target, loss, gradient
        (INF, 1.0, 0.0, 0.0),
        (-INF, 0.0, 0.0, 0.0),
        (INF, 0.0, INF, 1.0),
        (-INF, 1.0, INF if a else 0.0, -a),
        (INF, 0.5, INF, 0.5),
        (-INF, 0.5, INF if a else 0.0, -a / 2),
    ]
    x, t, loss, grad = (np.array(column * 5) for column in zip(*cases, strict=True))  # many lanes
    got = fastce.binary_cross_entropy_with_logits_with_grad(
        x.astype(dtype), t.astype(dtype), pos_weight=pos_weight, reduction="none", backend=backend
    )
    np.testing.assert_array_equal(got[0], loss)
    np.testing.assert_array_equal(got[1].astype(np.float64), grad)
    assert not np.signbit(got[0]).any()
    weight = np.where(np.isinf(loss), 0.0, 2.0)
    mean, got = fastce.binary_cross_entropy_with_logits_with_grad(
        x.astype(dtype), t.astype(dtype), weight=weight, pos_weight=pos_weight, backend=backend
    )
    assert mean == 0.0
    assert not got.any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_binary_limits_at_certain_probabilities(backend, dtype):
    cases = [  # probability, target, loss, gradient
        (1.0, 1.0, 0.0, -1.0),
        (0.0, 0.0, 0.0, 1.0),
        (1.0, 0.0, INF, INF),
        (0.0, 1.0, INF, -INF),
        (1.0, 0.5, INF, INF),
        (0.0, 0.5, INF, -INF),
    ]
    p, t, loss, grad = (np.array(column * 5) for column in zip(*cases, strict=True))
    got = fastce.binary_cross_entropy_with_grad(
        p.astype(dtype), t.astype(dtype), reduction="none", backend=backend
    )
    np.testing.assert_array_equal(got[0], loss)
    np.testing.assert_array_equal(got[1].astype(np.float64), grad)
    assert not np.signbit(got[0]).any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("loss_and_grad", BINARY_WITH_GRAD)
def test_binary_nan_stays_where_it_is(backend, loss_and_grad, dtype):
    x, t = np.full(70, 0.25, dtype), np.full(70, 0.5, dtype)
    expected = loss_and_grad(x, t, reduction="none", backend=backend)
    for place in range(0, 70, 3):
        spoilt = x.copy()
        spoilt[place] = NAN
        for got, full in zip(
            loss_and_grad(spoilt, t, reduction="none", backend=backend), expected, strict=True
        ):
            assert np.isnan(got[place])
            assert_same_bits(np.delete(got, place), np.delete(full, place))
        assert np.isnan(loss_and_grad(spoilt, t, backend=backend)[0])


@pytest.mark.parametrize("bad", [-0.001, 1.001, NAN, INF, -INF])
@pytest.mark.parametrize("loss", BINARY)
def test_binary_targets_outside_their_range(backend, loss, bad):
    x = np.full((2, 35), 0.5)
    for place in range(0, 70, 3):
        t = np.full((2, 35), 0.5)
        t.flat[place] = bad
        at = f"{place // 35}, {place % 35}"
        with pytest.raises(ValueError, match=rf"targets\[{at}\] = {bad}: expected a probability in"):
            loss(x, t, backend=backend)


@pytest.mark.parametrize("bad", [-0.001, 1.001, INF, -INF])
def test_binary_probabilities_outside_their_range(backend, bad):
    for place in range(0, 70, 3):
        p = np.full(70, 0.5)
        p[place] = bad
        with pytest.raises(ValueError, match=rf"probs\[{place}\] = {bad}: expected a probability in"):
            fastce.binary_cross_entropy(p, np.full(70, 0.5), backend=backend)
