"""Faults that users of other libraries have reported, by issue: none of them is here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from cases import ALL_DTYPES, DTYPES, HALVES, INF, NAN, assert_near, assert_same_bits, both, problem

import fastce
from fastce import info


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 1e8])
def test_offsets(backend, dtype, offset):
    """pytorch#11752, ml-explore/mlx#4188: `lse - x_t` is 0 for logits of 1e8."""
    for logits in ([2.0, -1.0], [0.0, 0.0]):
        x = np.array([logits], dtype) + np.asarray(offset, dtype)
        gap = float(x[0, 0] - x[0, 1])  # exact; 0 in float32 at 1e8
        loss = fastce.cross_entropy(x, [0], reduction="none", backend=backend)
        assert_near(loss, [math.log1p(math.exp(-gap))])
        log_p = fastce.log_softmax(x, backend=backend)
        assert_near(log_p, [[-math.log1p(math.exp(-gap)), -gap - math.log1p(math.exp(-gap))]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_confident_rows(backend, dtype):
    """pytorch#113708, scipy#19521: below half an epsilon, log(1 + e) is 0."""
    finfo = np.finfo(dtype)
    for smallest in (finfo.eps, finfo.tiny):
        lead = np.asarray(1 - np.log(smallest.astype(np.float64)), dtype)
        x = np.array([[lead, 0]], dtype)
        expected = math.exp(-float(lead))  # and half its square less
        loss, grad = both(x, [0], backend)
        if smallest == finfo.eps:
            assert_near(loss, [expected - expected**2 / 2])
            assert_near(grad, [[-expected, expected]])
            assert_near(fastce.log_softmax(x, backend=backend)[:, 0], [-expected])
        else:  # below the smallest normal number, where more is not promised
            assert 0 < loss[0] < smallest
        entropy = info.entropy_from_logits(x, base=None, backend=backend)
        assert 0 < entropy[0] == pytest.approx(expected * (1 + float(lead)), rel=1e-6)


def test_a_long_run_of_masked_classes(backend):
    """Dao-AILab/flash-attention#1930: NaN where the first block is -inf."""
    x = np.full((1, 100_000), -INF, np.float32)
    x[0, 50_000] = 3.0
    assert fastce.cross_entropy(x, [50_000], reduction="none", backend=backend)[0] == 0.0
    stats = fastce.row_stats(x, [50_000], backend=backend)
    assert (stats.argmax[0], stats.rank[0], stats.lse[0], stats.entropy[0]) == (50_000, 0, 3.0, 0.0)
    assert fastce.softmax(x, backend=backend).sum() == 1.0


def test_impossible_class_without_probability(backend):
    """google-deepmind/optax#896, #1762: 0 * -inf is NaN, and so is its gradient."""
    x, t = np.array([[-INF, 0.0]]), np.array([[0.0, 1.0]])
    loss, grad = both(x, t, backend)
    assert loss.tolist() == [0.0]
    assert grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_smoothing_and_ignored_rows_together(backend, dtype):
    """pytorch#69339, #73205, #91383: some of the combinations were wrong. Here by their definition."""
    x, y = problem(12, 5, dtype)
    y[[2, 7]] = 3
    weights = np.array([0.5, 2.0, 1.0, 0.75, 1.5])
    wide = x.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    for weight, smoothing, ignore_index, reduction in itertools.product(
        (None, weights), (0.0, 0.1, 0.5, 1.0), (-100, 3), ("none", "sum", "mean")
    ):
        w = np.ones(5) if weight is None else weight
        q = w * ((1 - smoothing) * (np.arange(5) == y[:, None]) + smoothing / 5)
        kept = y != ignore_index
        losses = np.where(kept, -(q * log_p).sum(axis=1), 0.0)
        grads = np.where(kept[:, None], q.sum(axis=1, keepdims=True) * np.exp(log_p) - q, 0.0)
        divisor = w[y][kept].sum() if reduction == "mean" else 1.0
        loss, grad = fastce.cross_entropy_with_grad(
            x,
            y,
            weight=weight,
            label_smoothing=smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
        )
        expected = losses if reduction == "none" else losses.sum() / divisor
        assert_near(np.asarray(loss, dtype), expected)
        assert_near(grad, grads / divisor, larger_term=2 * w.max() / divisor)


def test_the_weighted_mean(backend):
    """pytorch#8062, #40560: the mean divides by the sum of the weights, not by the rows."""
    x, weight = np.array([[4000.0, 0.0], [4000.0, 0.0]]), [20.0, 10.0]
    assert fastce.cross_entropy(x[:1], [1], weight=weight, backend=backend) == 4000.0
    mean = fastce.cross_entropy(x, [0, 1], weight=weight, backend=backend)
    assert mean == 10 * 4000.0 / 30
    options = {"weight": weight, "backend": backend}
    assert fastce.cross_entropy(x, [0, 1], reduction="sum", **options) == 40_000.0
    assert fastce.cross_entropy(x, [0, 1], reduction="none", **options).tolist() == [0.0, 40_000.0]
    assert fastce.cross_entropy(x, [0, 1], normalizer=2, **options) == 20_000.0


@pytest.mark.parametrize(
    ("half", "n_rows"), [("float16", 70_000), ("bfloat16", 70_000), ("float16", 17_000_000)]
)
def test_the_mean_of_many_half_rows(backend, half, n_rows):
    """pytorch#29429, #85791: float16 counts to 65 504, float32 to 16 777 216."""
    x = np.broadcast_to(np.zeros(2, half), (n_rows, 2))
    y = np.zeros(n_rows, np.int64)
    assert fastce.cross_entropy(x, y, backend=backend) == np.float32(math.log(2))


def test_sum_and_mean_of_an_image(backend):
    """pytorch#55657: a float32 sum over (128, 2, 768, 768) was off; here of its first four."""
    image, _ = problem(768 * 768, 2)
    x = np.broadcast_to(image.T.reshape(1, 2, 768, 768), (4, 2, 768, 768))
    y = np.broadcast_to((np.arange(768 * 768) % 2).reshape(1, 768, 768), (4, 768, 768))
    total = fastce.cross_entropy(x, y, axis=1, reduction="sum", backend=backend)
    mean = fastce.cross_entropy(x, y, axis=1, backend=backend)
    one = fastce.cross_entropy(x[:1], y[:1], axis=1, reduction="none", backend=backend)
    assert total == pytest.approx(4 * math.fsum(one.ravel().tolist()), rel=4e-16)
    assert mean == total / (4 * 768 * 768)


@pytest.mark.parametrize("n_classes", [3, 40, 2100])
def test_an_ignored_row_full_of_nan(backend, n_classes):
    """pytorch#11551: its gradient was NaN."""
    x, y = problem(4, n_classes)
    x[2], y[2] = NAN, -100
    loss, grad = fastce.cross_entropy_with_grad(x, y, backend=backend)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    assert not grad[2].any()


@pytest.mark.parametrize("bad", [-1, 3, -(2**31), 2**32 + 1, 2**31, -(2**63)])
def test_class_ids_out_of_range(backend, bad):
    """pytorch#194802, tensorflow#8484, #126005: read out of bounds, wrapped, or NaN in silence."""
    y = np.array([0, bad, 2])
    with pytest.raises(IndexError, match=rf"targets\[1\] = {bad} is outside \[0, 3\)"):
        fastce.cross_entropy(np.zeros((3, 3), np.float32), y, reduction="none", backend=backend)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("target", [257, 2049])
def test_class_ids_that_no_half_can_hold(backend, half, target):
    """keras#15012, #15014: ids were cast to the dtype of the loss, so 257 became 256."""
    x = np.zeros((1, 3000), half)
    x[0, target] = 10.0
    loss, grad = both(x, [target], backend)
    assert loss[0] < 1
    assert grad[0].argmin() == target


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_batches_and_threads_change_no_bit(backend, dtype):
    """pytorch#39134, EleutherAI/lm-evaluation-harness#704."""
    x, y = problem(2000, 300, dtype)
    loss, grad = both(x, y, backend, num_threads=1)
    for num_threads in (2, 3, 4):
        got = both(x, y, backend, num_threads=num_threads)
        assert_same_bits(got[0], loss)
        assert_same_bits(got[1], grad)
    for batch in (1, 7, 1000):
        got = [fastce.cross_entropy(x[:batch], y[:batch], reduction="none", backend=backend)]
        assert_same_bits(got[0], loss[:batch])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_classes_changes_hardly_a_bit(backend, dtype):
    """pytorch#39134: within 2 ULP."""
    x, y = problem(200, 30, dtype)
    order = np.random.default_rng(0).permutation(30)
    loss = fastce.cross_entropy(x, y, reduction="none", backend=backend)
    moved = fastce.cross_entropy(x[:, order], np.argsort(order)[y], reduction="none", backend=backend)
    assert (np.abs(moved - loss) <= 2 * np.spacing(loss)).all()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_binary_losses_of_infinite_logits(backend, dtype):
    """pyro-ppl/numpyro#2240, pytorch#49844, #135359: NaN in three of the four cases."""
    x, t = np.array([INF, -INF, INF, -INF], dtype), np.array([1, 0, 0, 1], dtype)
    loss = fastce.binary_cross_entropy_with_logits(x, t, reduction="none", backend=backend)
    assert loss.tolist() == [0.0, 0.0, INF, INF]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_divergences_are_not_negative(backend, dtype):
    """ggml-org/llama.cpp#5076: negative ones were printed for saved logits that hardly differ."""
    rng = np.random.default_rng(0)
    for n_classes in (2, 10, 40, 2100):
        x, _ = problem(50, n_classes, dtype)
        assert not info.kl_divergence_from_logits(x, x, backend=backend).any()
        p = fastce.softmax(x, backend=backend)
        assert not info.kl_divergence(p, p, backend=backend).any()
        # a unit in the last place, or a few, here and there
        steps = rng.integers(-2, 3, x.shape) * (rng.random(x.shape) < 0.2)
        near = x + (steps * np.spacing(x.astype(dtype)).astype(np.float64)).astype(dtype)
        assert (info.kl_divergence_from_logits(x, near, backend=backend) >= 0).all()
        assert (info.kl_divergence_from_logits(near, x, backend=backend) >= 0).all()


def test_perplexity_over_parts_is_token_weighted(backend):
    """pytorch/torcheval#154, ggml-org/llama.cpp#7066: not the average of the parts' perplexities."""
    x, y = problem(100, 7, "float64")
    y[:20] = -100  # the first part has fewer tokens
    parts = [slice(0, 50), slice(50, 100)]
    total = math.fsum(
        fastce.cross_entropy(x[part], y[part], reduction="sum", backend=backend) for part in parts
    )
    together = fastce.cross_entropy(x, y, backend=backend)
    assert math.exp(total / 80) == pytest.approx(math.exp(together), rel=1e-15)
    means = [fastce.cross_entropy(x[part], y[part], backend=backend) for part in parts]
    assert abs(np.exp(means).mean() - math.exp(together)) > 1e-3
