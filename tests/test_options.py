"""Every combination of the options, against PyTorch in float64; and where we mean to differ from it."""

from __future__ import annotations

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import (
    ALL_DTYPES,
    INF,
    NAN,
    assert_near,
    assert_same_bits,
    both,
    probabilities,
    problem,
)
from torch.nn import functional

import fastce

torch.set_num_threads(1)  # its threads wait for each other longer than they work

# Shape of the logits and the class axis; in PyTorch it is the second of several.
LAYOUTS = {
    "rows": ((6, 5), -1),
    "image": ((2, 4, 3, 2), 1),
    "first": ((40, 3), 0),
    "one row": ((7,), 0),
}
KINDS = ("ids", "probabilities")

OPTIONS = {
    "weighted": (False, True),
    "label_smoothing": (0.0, 0.1),
    "ignore_index": (-100, 1),
    "sampled": (False, True),
    "reduction": ("none", "sum", "mean", "normalizer"),
    "base": (None, 2.0),
    "upstream": (False, True),
}


@functools.cache
def arguments(layout, kind, dtype):
    """Return logits, targets, weights of classes and rows, and an upstream gradient for each row."""
    shape, axis = LAYOUTS[layout]
    n_classes, batch = shape[axis], tuple(np.delete(shape, axis))
    n_rows = math.prod(batch)
    x, y = problem(n_rows, n_classes, dtype)
    y[0] = 0
    y[1:2] = 1  # which is ignore_index, at times
    logits = np.moveaxis(x.reshape(*batch, n_classes), -1, axis)
    if kind == "ids":
        targets = y.reshape(batch)
    else:
        targets = probabilities(n_rows, n_classes, dtype).reshape(*batch, n_classes)
        targets = np.moveaxis(targets, -1, axis)
    rng = np.random.default_rng(1)
    weight = rng.integers(0, 9, n_classes) / 4
    weight[:2] = 0.75, 2.0
    sample_weight = rng.integers(0, 9, n_rows) / 4
    sample_weight[2:3], sample_weight[0] = 0.0, 1.5
    sample_weight = sample_weight.reshape(batch)
    return logits, targets, weight, sample_weight, rng.standard_normal(batch)


@functools.cache
def of_torch(layout, kind, dtype, **options):
    """Return PyTorch's loss and autograd's gradient of the same numbers in float64."""
    logits, targets, weight, sample_weight, upstream = arguments(layout, kind, dtype)
    _, axis = LAYOUTS[layout]
    x = torch.tensor(logits.astype(np.float64), requires_grad=True)
    t = torch.tensor(targets if kind == "ids" else targets.astype(np.float64))
    w = torch.tensor(weight) if options["weighted"] else None
    rows = torch.tensor(sample_weight) if options["sampled"] else None
    second = (lambda array: array.movedim(axis, 1)) if logits.ndim > 1 else (lambda array: array)
    loss = functools.partial(
        functional.cross_entropy,
        second(x),
        t if kind == "ids" else second(t),
        weight=w,
        label_smoothing=options["label_smoothing"],
        ignore_index=options["ignore_index"],
    )
    reduction = options["reduction"]
    if rows is None and reduction != "normalizer":
        value = loss(reduction=reduction)
    else:  # which PyTorch does not have
        losses = loss(reduction="none") * (1.0 if rows is None else rows)
        value = losses if reduction == "none" else losses.sum()
        if reduction == "normalizer":
            value = value / 7.5
        elif reduction == "mean":
            kept = torch.ones_like(rows) if kind != "ids" else (t != options["ignore_index"]) * 1.0
            if kind == "ids" and w is not None:
                kept = kept * w[torch.where(t < 0, 0, t)]
            value = value / (rows * kept).sum()
    value = value / (1.0 if options["base"] is None else math.log(options["base"]))
    scale = torch.ones_like(value)
    if options["upstream"]:
        scale = torch.tensor(upstream) if reduction == "none" else torch.tensor(2.5).double()
    (value * scale).sum().backward()
    return value.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_is_as_in_pytorch(backend, layout, kind, dtype):
    logits, targets, weight, sample_weight, upstream = arguments(layout, kind, dtype)
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        if kind == "probabilities" and options["ignore_index"] != -100:
            continue  # which only ids can be
        if dtype != "float64" and options["upstream"] != (options["base"] is not None):
            continue  # both are factors, whatever the dtype
        expected = of_torch(layout, kind, dtype, **options)
        reduction = options["reduction"]
        given = {
            "axis": LAYOUTS[layout][1],
            "weight": weight if options["weighted"] else None,
            "sample_weight": sample_weight if options["sampled"] else None,
            "ignore_index": options["ignore_index"],
            "label_smoothing": options["label_smoothing"],
            "reduction": "mean" if reduction == "normalizer" else reduction,
            "normalizer": 7.5 if reduction == "normalizer" else None,
            "base": options["base"],
            "backend": backend,
        }
        grad_output = (upstream if reduction == "none" else 2.5) if options["upstream"] else None
        loss, grad = fastce.cross_entropy_with_grad(logits, targets, grad_output=grad_output, **given)
        if reduction != "none":
            assert type(loss) is float
            loss = np.asarray(loss, np.float64 if dtype == "float64" else np.float32)
        assert grad.dtype == dtype
        assert_near(loss, expected[0], options)
        assert_near(grad, expected[1], options, larger_term=np.abs(expected[1]).max())
        alone = fastce.cross_entropy(logits, targets, **given)
        assert_same_bits(np.asarray(alone, loss.dtype), loss, options)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 33, 700, 2100])
def test_rows_of_any_length_are_as_in_pytorch(backend, n_classes, kind, dtype):
    x, targets = problem(5, n_classes, dtype)
    if kind == "probabilities":
        targets = probabilities(5, n_classes, dtype)
    weight = np.random.default_rng(2).integers(0, 9, n_classes) / 4
    for options in itertools.product((None, weight), (0.0, 0.3, 1.0)):
        wide = torch.tensor(x.astype(np.float64), requires_grad=True)
        expected = functional.cross_entropy(
            wide,
            torch.tensor(targets if kind == "ids" else targets.astype(np.float64)),
            weight=None if options[0] is None else torch.tensor(weight),
            label_smoothing=options[1],
            reduction="none",
        )
        expected.sum().backward()
        loss, grad = both(x, targets, backend, weight=options[0], label_smoothing=options[1])
        assert_near(loss, expected.detach().numpy())
        assert_near(grad, wide.grad.numpy(), larger_term=np.abs(wide.grad.numpy()).max())


@pytest.mark.parametrize("of_logits", ALL_DTYPES)
@pytest.mark.parametrize("of_targets", ALL_DTYPES)
@pytest.mark.parametrize("n_classes", [5, 700])
def test_probabilities_of_another_dtype(backend, of_logits, of_targets, n_classes):
    """Both as numbers of the losses' dtype."""
    x, _ = problem(4, n_classes, of_logits)
    t = probabilities(4, n_classes, of_targets)
    loss, grad = both(x, t, backend, label_smoothing=0.1)
    assert loss.dtype == ("float64" if of_logits == "float64" else "float32")
    assert grad.dtype == of_logits
    common = loss.dtype
    expected = both(
        x.astype(common), t.astype(common), backend, label_smoothing=0.1, out=np.empty_like(grad)
    )
    assert_same_bits(loss, expected[0])
    assert_same_bits(grad, expected[1])


@pytest.mark.parametrize("name", ["weight", "sample_weight", "grad_output"])
@pytest.mark.parametrize("kind", ["int8", "uint64", "float16", "float32", "bfloat16", ">f8", "list"])
def test_weights_of_any_dtype(backend, name, kind):
    x, y = problem(5, 5)
    numbers = np.array([1.0, 2.0, 0.0, 3.0, 1.0])
    given = numbers.tolist() if kind == "list" else numbers.astype(kind)
    for got, expected in zip(
        both(x, y, backend, **{name: given}), both(x, y, backend, **{name: numbers}), strict=True
    ):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("base", [2, 2.0, 10, 0.5, np.float32(4)])
def test_base_changes_the_unit(backend, base):
    x, y = problem(30, 7, "float64")
    loss, grad = fastce.cross_entropy_with_grad(x, y, backend=backend)
    got_loss, got_grad = fastce.cross_entropy_with_grad(x, y, base=base, backend=backend)
    assert got_loss == pytest.approx(loss / math.log(base), rel=1e-15)
    np.testing.assert_allclose(got_grad, grad / math.log(base), rtol=1e-15)


def test_micro_batches_add_up(backend):
    """Each divided by the tokens of all: the losses and gradients of the whole batch."""
    x, y = problem(64, 11, "float64")
    y[::5] = -100
    loss, grad = fastce.cross_entropy_with_grad(x, y, label_smoothing=0.1, backend=backend)
    total = np.count_nonzero(y != -100)
    parts = [
        fastce.cross_entropy_with_grad(
            x[i : i + 16], y[i : i + 16], normalizer=total, label_smoothing=0.1, backend=backend
        )
        for i in range(0, 64, 16)
    ]
    assert math.fsum(loss for loss, _ in parts) == pytest.approx(loss, rel=1e-15)
    np.testing.assert_allclose(np.concatenate([grad for _, grad in parts]), grad, rtol=1e-15)


def test_a_normalizer_of_zero(backend):
    x, y = problem(4, 5)
    loss, grad = fastce.cross_entropy_with_grad(x, y, normalizer=0, backend=backend)
    assert math.isnan(loss)
    assert not grad.any()


# ---- Negative log-likelihood ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_softmax_then_nll_loss_is_cross_entropy(backend, layout, dtype):
    logits, targets, weight, sample_weight, upstream = arguments(layout, "ids", dtype)
    axis = LAYOUTS[layout][1]
    log_probs = fastce.log_softmax(logits, axis=axis, backend=backend)
    for weighted, sampled, ignore_index, reduction, base in itertools.product(
        (None, weight), (None, sample_weight), (-100, 1), ("none", "sum", "mean"), (None, 2.0)
    ):
        options = {
            "axis": axis,
            "weight": weighted,
            "sample_weight": sampled,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "base": base,
        }
        got = fastce.nll_loss(log_probs, targets, **options)
        expected = fastce.cross_entropy(logits, targets, backend=backend, **options)
        assert type(got) is type(expected)
        assert_near(np.asarray(got, dtype), np.asarray(expected), options)
        # the gradient, taken further through log_softmax by hand
        grad_output = upstream if reduction == "none" else 2.5
        loss, grad = fastce.nll_loss_with_grad(log_probs, targets, grad_output=grad_output, **options)
        np.testing.assert_array_equal(loss, got)
        p = fastce.softmax(logits, axis=axis, backend=backend)
        through = grad - p * grad.sum(axis=axis, keepdims=True)
        _, expected = fastce.cross_entropy_with_grad(
            logits, targets, grad_output=grad_output, backend=backend, **options
        )
        assert_near(through, expected, options, larger_term=4 * np.abs(grad).max())


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_nll_loss_is_as_in_pytorch(dtype):
    log_probs, y = problem(12, 5, dtype)
    y[3] = -100
    weight = np.array([0.5, 1.0, 2.0, 0.0, 1.5])
    for reduction, weighted in itertools.product(("none", "sum", "mean"), (None, weight)):
        x = torch.tensor(log_probs.astype(np.float64), requires_grad=True)
        w = None if weighted is None else torch.tensor(weight)
        expected = functional.nll_loss(x, torch.tensor(y), weight=w, reduction=reduction)
        expected.sum().backward()
        loss, grad = fastce.nll_loss_with_grad(log_probs, y, weight=weighted, reduction=reduction)
        assert_near(np.asarray(loss, "float64" if dtype == "float64" else "float32"), expected.detach())
        assert_near(grad, x.grad.numpy())
        np.testing.assert_array_equal(
            loss, fastce.nll_loss(log_probs, y, weight=weighted, reduction=reduction)
        )


def test_nll_loss_writes_to_out():
    log_probs, y = problem(12, 5)
    expected = fastce.nll_loss_with_grad(log_probs, y)[1]
    for out in (np.full((12, 5), 7.0, np.float32), np.full((12, 10), 7.0, np.float32)[:, ::2]):
        assert fastce.nll_loss_with_grad(log_probs, y, out=out)[1] is out
        assert_same_bits(out, expected)
    bits = log_probs.astype("bfloat16").view(np.uint16)
    _, grad = fastce.nll_loss_with_grad(bits, y, dtype="bfloat16")
    np.testing.assert_array_equal(grad.view("bfloat16"), expected.astype("bfloat16"))


# ---- Properties ----


@st.composite
def calls(draw):
    """Logits of any shape, class axis and dtype, targets of any kind, and options."""
    batch = draw(st.lists(st.integers(0, 5), max_size=3))
    n_classes = draw(st.one_of(st.integers(1, 70), st.sampled_from([511, 513, 1025])))
    axis = draw(st.integers(-len(batch) - 1, len(batch)))
    dtype = draw(st.sampled_from(ALL_DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (*batch, n_classes)
    x = draw(st.sampled_from([0.1, 1.0, 30.0])) * rng.standard_normal(shape)
    if draw(st.booleans()):
        x[rng.random(shape) < 0.3] = -INF
        x[..., rng.integers(n_classes)] = 0.0
    options = {"label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))}
    if draw(st.booleans()):
        options["weight"] = rng.integers(0, 9, n_classes) / 4
    if draw(st.booleans()):
        options["sample_weight"] = rng.integers(0, 5, batch) / 2
    if draw(st.booleans()):
        targets = rng.integers(0, n_classes, batch)
        if draw(st.booleans()):
            options["ignore_index"] = draw(st.integers(0, n_classes))
    else:
        t = rng.exponential(size=shape) * (rng.random(shape) < 0.5)
        targets = np.moveaxis(t.astype(dtype), -1, axis)
    return np.moveaxis(x.astype(dtype), -1, axis), targets, axis, options


@hypothesis.settings(
    deadline=None,
    max_examples=80,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(call=calls())
def test_any_call(backend, call):
    """As the specification in float64; no loss is negative; gradients sum to 0; classes may move."""
    x, targets, axis, options = call
    loss, grad = both(x, targets, backend, axis=axis, **options)
    t = targets if targets.ndim < x.ndim else targets.astype(np.float64)
    expected = both(x.astype(np.float64), t, "numpy", axis=axis, **options)
    size = np.abs(expected[1]).max(initial=0.0) + 4 * np.abs(targets).max(initial=1.0)
    assert_near(loss, expected[0])
    assert_near(grad, expected[1], larger_term=size)
    assert (loss >= 0).all()
    assert not np.signbit(loss).any()
    eps = (
        float(np.finfo(np.float32).eps)
        if grad.itemsize == 4
        else 2.0 ** -(8 if grad.itemsize == 2 else 52)
    )
    sums = np.abs(grad.astype(np.float64).sum(axis=axis))
    n_classes = x.shape[axis]
    assert (sums <= 8 * eps * n_classes * size).all()
    for reduction in ("sum", "mean"):
        reduced = fastce.cross_entropy(
            x, targets, axis=axis, reduction=reduction, backend=backend, **options
        )
        if reduction == "sum" and np.isfinite(loss).all():
            assert reduced == pytest.approx(math.fsum(loss.ravel().tolist()), rel=1e-15)

    order = np.random.default_rng(0).permutation(n_classes)
    moved = dict(options)
    if "weight" in options:
        moved["weight"] = options["weight"][order]
    if targets.ndim < x.ndim:
        y = np.argsort(order)[targets]
        if 0 <= moved.get("ignore_index", -100) < n_classes:
            moved["ignore_index"] = int(np.argsort(order)[moved["ignore_index"]])
    else:
        y = np.take(targets, order, axis)
    permuted = both(np.take(x, order, axis), y, backend, axis=axis, **moved)
    assert_near(permuted[0], expected[0])
    assert_near(permuted[1], np.take(expected[1], order, axis), larger_term=size)


# ---- Where we mean to differ from PyTorch ----


def of_pytorch(x, targets, **options):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(targets)
    targets = targets.double() if targets.is_floating_point() else targets
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"], dtype=torch.float64)
    loss = functional.cross_entropy(x, targets, **options)
    loss.backward()
    return loss.item(), x.grad.numpy()


def of_fastce(x, targets, backend, **options):
    return fastce.cross_entropy_with_grad(np.array(x), targets, backend=backend, **options)


def test_impossible_classes_that_nobody_asks_for_cost_nothing(backend):
    """PyTorch: 0 * inf is NaN."""
    x, t = [[-INF, 0.0, 0.0]], [[0.0, 1.0, 0.0]]
    assert math.isnan(of_pytorch(x, t)[0])
    loss, grad = of_fastce(x, t, backend)
    assert loss == pytest.approx(math.log(2))
    assert grad.tolist() == [[0.0, -0.5, 0.5]]


def test_a_weight_of_zero_makes_an_infinite_loss_zero(backend):
    x, weight = [[-INF, 0.0, 0.0]], [0.0, 1.0, 1.0]
    for options in ({"label_smoothing": 0.0}, {"label_smoothing": 0.1}):
        options |= {"weight": weight, "reduction": "sum"}
        assert math.isnan(of_pytorch(x, [0], **options)[0])
        assert math.isfinite(of_fastce(x, [0], backend, **options)[0])


def test_ignored_rows_are_not_read(backend):
    """PyTorch's gradient of the ignored row is NaN."""
    x, y = [[NAN, 0.0], [0.0, 0.0]], [-100, 1]
    assert np.isnan(of_pytorch(x, y)[1][0]).all()
    assert of_fastce(x, y, backend)[1].tolist() == [[0.0, 0.0], [0.5, -0.5]]


def test_the_gradient_over_no_weight_is_zero(backend):
    """The mean is NaN here and there; PyTorch's gradient too."""
    x, weight = [[0.0, 0.0, 0.0]], [1.0, 0.0, 1.0]
    loss, grad = of_pytorch(x, [1], weight=weight)
    assert math.isnan(loss)
    assert np.isnan(grad).all()
    loss, grad = of_fastce(x, [1], backend, weight=weight)
    assert math.isnan(loss)
    assert not grad.any()


@pytest.mark.parametrize("bad", [-0.5, NAN])
def test_targets_that_are_no_probabilities_are_refused(backend, bad):
    x, t = [[0.0, 0.0]], [[bad, 1.5]]
    of_pytorch(x, t)  # computes something
    with pytest.raises(ValueError, match="expected a probability"):
        of_fastce(x, t, backend)


def test_losses_next_to_zero_keep_their_digits(backend):
    """PyTorch adds exp(-40) to 1."""
    x = [[40.0, 0.0]]
    assert of_pytorch(x, [0])[0] == 0.0
    assert of_fastce(x, [0], backend)[0] == math.log1p(math.exp(-40))


def test_class_ids_of_any_integer_dtype(backend):
    with pytest.raises(RuntimeError, match="expected target dtype to be Long or Byte"):
        functional.cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int32))
    assert of_fastce([[0.0, 0.0]], np.zeros(1, np.int32), backend)[0] == math.log(2)


def test_probabilities_have_no_ignore_index(backend):
    """PyTorch refuses one that is not negative; here it speaks of class ids only, whatever it is."""
    t = torch.full((1, 2), 0.5)
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point"):
        functional.cross_entropy(torch.zeros(1, 2), t, ignore_index=1)
    assert of_fastce([[0.0, 0.0]], t.numpy(), backend, ignore_index=1)[0] == math.log(2)


def test_half_logits_are_averaged_in_float64(backend):
    """PyTorch counts rows in float16, which ends at 65 504."""
    x, y = np.zeros((70_000, 2), np.float16), np.zeros(70_000, np.int64)
    assert functional.cross_entropy(torch.tensor(x), torch.tensor(y)).item() == 0.0
    assert fastce.cross_entropy(x, y, backend=backend) == np.float32(math.log(2))
