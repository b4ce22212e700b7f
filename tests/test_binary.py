"""Binary cross-entropy: its options against PyTorch, shapes, targets and properties."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import ALL_DTYPES, INF, assert_near, assert_same_bits
from torch.nn import functional

import fastce

torch.set_num_threads(1)

LOSSES = {
    fastce.binary_cross_entropy_with_logits: fastce.binary_cross_entropy_with_logits_with_grad,
    fastce.binary_cross_entropy: fastce.binary_cross_entropy_with_grad,
}
SHAPE = (3, 4, 5)


def arguments(dtype, from_logits, seed=0):
    """Return logits or probabilities, targets, weights that broadcast, and an upstream gradient."""
    rng = np.random.default_rng(seed)
    x = 3 * rng.standard_normal(SHAPE) if from_logits else rng.uniform(0.01, 0.99, SHAPE)
    t = rng.random(SHAPE) * (rng.random(SHAPE) < 0.6)
    t[0] = t[0] > 0.5
    weight, pos_weight = rng.integers(0, 9, (4, 1)) / 4, rng.integers(0, 9, 5) / 4
    return x.astype(dtype), t.astype(dtype), weight, pos_weight, rng.standard_normal(SHAPE)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("from_logits", [True, False])
def test_every_combination_is_as_in_pytorch(backend, from_logits, dtype):
    x, t, weight, pos_weight, upstream = arguments(dtype, from_logits)
    sample_weight = np.array([0.5, 2.0, 0.0])
    loss_of = list(LOSSES)[0 if from_logits else 1]
    for weighted, positive, sampled, reduction, base, scaled in itertools.product(
        (False, True), (False, True), (False, True), ("none", "sum", "mean"), (None, 2.0), (False, True)
    ):
        if positive and not from_logits:
            continue
        options = {
            "weight": weight if weighted else None,
            "sample_weight": sample_weight if sampled else None,
            "reduction": reduction,
            "base": base,
            "backend": backend,
        }
        if positive:
            options["pos_weight"] = pos_weight
        grad_output = (upstream if reduction == "none" else 2.5) if scaled else None
        loss, grad = LOSSES[loss_of](x, t, grad_output=grad_output, **options)
        alone = loss_of(x, t, **options)

        wide = torch.tensor(x.astype(np.float64), requires_grad=True)
        given = {"weight": torch.tensor(weight) if weighted else None}
        if positive:
            given["pos_weight"] = torch.tensor(pos_weight)
        reference = functional.binary_cross_entropy
        reference = functional.binary_cross_entropy_with_logits if from_logits else reference
        value = reference(wide, torch.tensor(t.astype(np.float64)), reduction="none", **given)
        if sampled:  # which PyTorch does not have
            value = value * torch.tensor(sample_weight).reshape(3, 1, 1)
        n_counted = sample_weight.sum() * 20 if sampled else x.size
        if reduction != "none":
            value = value.sum() / (n_counted if reduction == "mean" else 1.0)
        value = value / (1.0 if base is None else math.log(base))
        scale = 1.0 if grad_output is None else torch.tensor(grad_output).double()
        (value * scale).sum().backward()

        named = f"{weighted=}, {positive=}, {sampled=}, {reduction}, {base=}, {scaled=}"
        if reduction != "none":
            assert type(loss) is type(alone) is float
            loss = np.asarray(loss, "float64" if dtype == "float64" else "float32")
        assert_near(loss, alone, named)
        assert grad.dtype == dtype
        assert_near(loss, value.detach().numpy(), named, larger_term=2.0)  # as PyTorch computes it
        assert_near(grad, wide.grad.numpy(), named, larger_term=np.abs(wide.grad.numpy()).max())


def test_the_mean_without_sample_weight_is_that_of_pytorch(backend):
    """Weights do not count in its denominator."""
    x, t, weight, pos_weight, _ = arguments("float64", True)
    expected = functional.binary_cross_entropy_with_logits(
        torch.tensor(x),
        torch.tensor(t),
        weight=torch.tensor(weight),
        pos_weight=torch.tensor(pos_weight),
    )
    got = fastce.binary_cross_entropy_with_logits(
        x, t, weight=weight, pos_weight=pos_weight, backend=backend
    )
    assert got == pytest.approx(expected.item(), rel=1e-15)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_two_classes_are_as_one_logit(backend, dtype):
    """The softmax of (0, x) is the sigmoid of x."""
    x = np.concatenate([np.linspace(-30, 30, 101), [INF, -INF, 0.0]]).astype(dtype)
    y = np.arange(104) % 2
    rows = np.stack([np.zeros_like(x), x], axis=1)
    finite = np.isfinite(x) | (x < 0)
    loss, grad = fastce.binary_cross_entropy_with_logits_with_grad(
        x, y, reduction="none", backend=backend
    )
    of_rows = fastce.cross_entropy_with_grad(rows, y, reduction="none", backend=backend)
    assert_near(loss[finite], of_rows[0][finite])
    assert_near(grad[finite], of_rows[1][finite, 1])


@pytest.mark.parametrize(
    "kind", [bool, "int8", "int64", "uint8", "float16", "bfloat16", "float64", "list"]
)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_targets_of_any_dtype(backend, loss, dtype, kind):
    x = np.linspace(0.1, 0.9, 50).astype(dtype)
    t = np.arange(50) % 2
    given = t.tolist() if kind == "list" else t.astype(kind)
    expected = LOSSES[loss](x, t.astype(dtype), reduction="none", backend=backend)
    for got, truth in zip(
        LOSSES[loss](x, given, reduction="none", backend=backend), expected, strict=True
    ):
        assert_same_bits(got, truth)
    if dtype == "bfloat16":
        bits = x.view(np.uint16)
        got = LOSSES[loss](bits, given, dtype="bfloat16", reduction="none", backend=backend)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1].view(np.uint16))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_scalar(backend, loss):
    got = loss(np.float32(0.25), 1.0, reduction="none", backend=backend)
    assert got.shape == ()
    assert got.dtype == np.float32
    value, grad = LOSSES[loss](np.float64(0.25), 1.0, backend=backend)
    assert value == pytest.approx(got, rel=1e-6)
    assert grad.shape == ()


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (4, 5), (3, 1, 1), (1, 4, 5), (3, 4, 5)])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_broadcast(backend, name, shape):
    x, t, *_ = arguments("float32", True)
    weight = np.random.default_rng(1).integers(0, 9, shape) / 4
    full = np.broadcast_to(weight, SHAPE).copy()
    run = fastce.binary_cross_entropy_with_logits_with_grad
    for got, expected in zip(
        run(x, t, reduction="none", backend=backend, **{name: weight}),
        run(x, t, reduction="none", backend=backend, **{name: full}),
        strict=True,
    ):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5)])
@pytest.mark.parametrize("loss", LOSSES)
def test_sample_weights_are_for_rows(backend, loss, shape):
    """And count in the mean's denominator, once for each element of the row."""
    x, t, *_ = arguments("float64", loss is fastce.binary_cross_entropy_with_logits)
    weight = np.random.default_rng(1).integers(0, 9, shape) / 4
    full = np.broadcast_to(weight.reshape(shape + (1,) * (3 - len(shape))), SHAPE)
    losses = loss(x, t, reduction="none", backend=backend)
    assert_near(loss(x, t, sample_weight=weight, reduction="none", backend=backend), losses * full)
    mean = loss(x, t, sample_weight=weight, backend=backend)
    assert mean == pytest.approx((losses * full).sum() / full.sum(), rel=1e-14)
    assert loss(x, t, sample_weight=full, backend=backend) == pytest.approx(mean, rel=1e-15)


@pytest.mark.parametrize("out_dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_out_takes_losses(backend, loss, out_dtype):
    x, t, *_ = arguments("float32", loss is fastce.binary_cross_entropy_with_logits)
    expected = loss(x, t, reduction="none", backend=backend)
    for out in (np.empty(SHAPE, out_dtype), np.empty((3, 4, 10), out_dtype)[..., ::2]):
        assert loss(x, t, reduction="none", out=out, backend=backend) is out
        np.testing.assert_array_equal(out, expected)


def test_targets_may_be_the_logits(backend):
    """The entropy of predictions, as it were; in place too."""
    p = np.linspace(0, 1, 33)
    expected = fastce.binary_cross_entropy(p, p.copy(), reduction="none", backend=backend)
    assert_same_bits(fastce.binary_cross_entropy(p, p, reduction="none", backend=backend), expected)
    assert expected[0] == expected[-1] == 0.0


@hypothesis.settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    shape=st.lists(st.integers(0, 40), max_size=3).filter(lambda shape: math.prod(shape) < 30_000),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(ALL_DTYPES),
    scale=st.sampled_from([0.01, 1.0, 50.0]),
    pos_weight=st.sampled_from([None, 0.0, 1.0, 2.5]),
)
def test_any_call(backend, shape, seed, dtype, scale, pos_weight):
    """As the specification in float64, and never negative."""
    rng = np.random.default_rng(seed)
    x = (scale * rng.standard_normal(shape)).astype(dtype)
    x = np.where(rng.random(shape) < 0.05, np.asarray(rng.choice([-INF, INF]), dtype), x)
    t = np.where(rng.random(shape) < 0.5, rng.random(shape), rng.integers(0, 2, shape)).astype(dtype)
    run = fastce.binary_cross_entropy_with_logits_with_grad
    options = {"pos_weight": pos_weight, "reduction": "none"}
    loss, grad = run(x, t, backend=backend, **options)
    expected = run(x.astype(np.float64), t.astype(np.float64), backend="numpy", **options)
    assert_near(loss, expected[0])
    assert_near(grad, expected[1], larger_term=2.5)
    assert (loss >= 0).all()
    assert not np.signbit(loss).any()
    total = fastce.binary_cross_entropy_with_logits(
        x, t, pos_weight=pos_weight, reduction="sum", backend=backend
    )
    assert total == pytest.approx(math.fsum(loss.ravel().tolist()) if np.isfinite(loss).all() else INF)
