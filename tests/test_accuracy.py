"""Every result against 200 bits, for each backend and variant, over rows that are hard."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest
from cases import ALL_DTYPES, DTYPES, HALVES, accuracy_cases, both, further_cases, probabilities
from tolerances import GRAD_ULP, LOSS_ULP, SUM_REL

import fastce
from fastce import info


@pytest.mark.parametrize("dtype", ALL_DTYPES)
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


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_gradient(backend, dtype, record_ulp):
    for case in accuracy_cases(dtype):
        _, got = fastce.cross_entropy_with_grad(
            case.logits, case.targets, reduction="none", backend=backend
        )
        assert got.dtype == dtype
        _, exact = case.exact
        record = functools.partial(record_ulp, backend, "gradient", dtype)
        _check(got, exact, GRAD_ULP[dtype], case.name, record)


def _check(got, exact, limit, name, record, larger_terms=None):
    errors = oracle.ulp_errors(got, exact, larger_terms)
    worst = np.unravel_index(errors.argmax(), errors.shape)
    record(float(errors[worst]), name)
    assert errors[worst] <= limit, f"{name}{worst}: got {got[worst]!r}, {errors[worst]:.2f} ULP off"


@functools.cache
def _soft_call(case, kind):
    """Return targets and options that give each class a share, and the exact loss and gradient."""
    n_rows, n_classes = case.logits.shape
    one_hot = np.arange(n_classes) == case.targets[:, None]
    probs = probabilities(n_rows, n_classes, case.logits.dtype)
    probs[0] = one_hot[0]
    of_ids, smoothing, weighed = {
        "soft": (False, 0.0, False),
        "soft weighed": (False, 0.3, True),
        "smooth": (True, 0.1, False),
        "smooth weighed": (True, 0.1, True),
    }[kind]
    weight = (np.arange(n_classes) % 7 + 1) / 4.0 if weighed else None
    shares = [oracle.shares(t, weight, smoothing) for t in (one_hot if of_ids else probs).tolist()]
    losses = [row.soft_loss(q) for row, q in zip(case.rows, shares, strict=True)]
    gradients = [row.soft_gradient(q) for row, q in zip(case.rows, shares, strict=True)]
    return (
        case.targets if of_ids else probs,
        {"label_smoothing": smoothing, "weight": weight},
        oracle.as_pair(losses),
        oracle.as_pair([g for row, _ in gradients for g in row]),
        [term for _, row in gradients for term in row],
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in ("soft", "smooth") for dtype in DTYPES]
    + [(kind, dtype) for kind in ("soft weighed", "smooth weighed") for dtype in ALL_DTYPES],
)
def test_targets_of_many_shares(backend, kind, dtype, record_ulp):
    for case in further_cases(dtype):
        targets, options, losses, gradients, larger_terms = _soft_call(case, kind)
        loss, grad = both(case.logits, targets, backend, **options)
        assert not np.signbit(loss).any(), f"{case.name}: negative loss or -0.0"
        record = functools.partial(record_ulp, backend, f"{kind} loss", dtype)
        _check(loss, losses, LOSS_ULP[loss.dtype.name], case.name, record)
        record = functools.partial(record_ulp, backend, f"{kind} gradient", dtype)
        _check(grad, gradients, GRAD_ULP[dtype], case.name, record, larger_terms)


@functools.cache
def _activations(case):
    return (
        oracle.as_pair([p for row in case.rows for p in row.softmax()]),
        oracle.as_pair([p for row in case.rows for p in row.log_softmax()]),
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_softmax_and_its_logarithm(backend, dtype, record_ulp):
    for case in further_cases(dtype):
        exact = _activations(case)
        got = fastce.softmax(case.logits, backend=backend)
        record = functools.partial(record_ulp, backend, "softmax", dtype)
        _check(got, exact[0], GRAD_ULP[dtype], case.name, record)
        got = fastce.log_softmax(case.logits, backend=backend)
        assert not (got > 0).any()
        limit = GRAD_ULP[dtype] if dtype in HALVES else LOSS_ULP[dtype]
        _check(
            got,
            exact[1],
            limit,
            case.name,
            functools.partial(record_ulp, backend, "log_softmax", dtype),
        )


@functools.cache
def _statistics(case):
    exact = {
        "lse": [row.lse() for row in case.rows],
        "entropy": [row.entropy() for row in case.rows],
        "max_prob": [row.softmax()[row.top] for row in case.rows],
        "brier": [row.brier(t) for row, t in zip(case.rows, case.targets.tolist(), strict=True)],
    }
    return {name: oracle.as_pair(values) for name, values in exact.items()}


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_statistics(backend, dtype, record_ulp):
    for case in further_cases(dtype):
        stats = fastce.row_stats(case.logits, case.targets, backend=backend)
        rows = np.arange(len(case.logits))
        result = stats.lse.dtype
        np.testing.assert_array_equal(stats.max_logit, case.logits.max(axis=1).astype(result))
        np.testing.assert_array_equal(
            stats.target_logit, case.logits[rows, case.targets].astype(result)
        )
        np.testing.assert_array_equal(stats.argmax, case.logits.argmax(axis=1))
        for name, exact in _statistics(case).items():
            record = functools.partial(record_ulp, backend, name, dtype)
            maximum = [row.maximum for row in case.rows] if name == "lse" else None
            _check(getattr(stats, name), exact, LOSS_ULP[result.name], case.name, record, maximum)
        np.testing.assert_array_equal(fastce.logsumexp(case.logits, backend=backend), stats.lse)


@functools.cache
def _divergences(case):
    """Of the second row from the first, and from itself a few ULP away; with the cross-entropies."""
    first = case.logits[:1]
    near = first.astype(np.float64) * (1 + 3 * np.finfo(first.dtype).eps)
    pairs = [(first, case.logits[1:]), (first, near.astype(first.dtype))]
    found = []
    for p, q in pairs:
        exact, cross = oracle.Row.of(p[0].tolist()).divergence_from(oracle.Row.of(q[0].tolist()))
        found.append((p, q, oracle.as_pair([exact]), [cross]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_of_logits(backend, dtype, record_ulp):
    """A difference of cross-entropy and entropy, but never negative."""
    for case in further_cases(dtype):
        if case.logits.shape[1] > 100 and not case.name.startswith(("ordinary", "masked", "asc")):
            continue  # the same code as at 97 classes; mpmath is slow
        for p, q, exact, cross in _divergences(case):
            got = info.kl_divergence_from_logits(p, q, base=None, backend=backend)
            assert not np.signbit(got).any(), case.name
            record = functools.partial(record_ulp, backend, "KL of logits", dtype)
            _check(got, exact, LOSS_ULP[dtype], case.name, record, cross)


@functools.cache
def _moving_divergences(dtype):
    """Of long rows, of which not any part tells how large their sums will be, exactly."""
    n = 2100
    rng = np.random.default_rng(0)
    x, noise, other = rng.standard_normal((3, n))
    y, climb, block, late = (
        x + 0.1 * noise,
        np.linspace(0, 60, n),
        np.arange(n) // 512,
        np.arange(n) >= 1100,
    )
    absent, peak, hill = np.where(late, 0, -np.inf), 40.0 * (np.arange(n) == 2000), 500.0 * late
    pairs = {
        "close": (x, x * (1 + 3 * np.finfo(dtype).eps)),
        "offset": (x, y + 5),
        "climbs": (x + 20 * climb, y + 20 * climb),
        "p climbs": (x + climb, y),
        "q climbs": (x, y + climb),
        "crossing": (x + climb, y + climb[::-1]),
        "p comes late": (x + absent, y),
        "p comes late and high": (x + absent + 1000, y),
        "p comes late and low": (x + absent - 1000, y),
        "both come late": (x + absent, y + absent),
        "peak": (x + peak, y + peak),
        "peak of p": (x + peak, y),
        "peak of q": (x, y + peak),
        "hill": (x + hill, y + hill),
        "far apart": (100 * x, 100 * other),
        "equal but for one": (x, x + 0.2 * peak),
        "shift in steps": (x, y + 3 * block),
    }
    for name, (p, q) in pairs.items():
        p, q = p.astype(dtype), q.astype(dtype)
        exact, _ = oracle.Row.of(p.tolist()).divergence_from(oracle.Row.of(q.tolist()))
        pairs[name] = p[None], q[None], oracle.as_pair([exact])
    return pairs


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_of_logits_in_long_rows(backend, dtype, record_ulp):
    """To the last digits of itself, also where it is a small difference of large numbers."""
    for name, (p, q, exact) in _moving_divergences(dtype).items():
        got = info.kl_divergence_from_logits(p, q, base=None, backend=backend)
        record = functools.partial(record_ulp, backend, "KL of long rows", dtype)
        _check(got, exact, LOSS_ULP[dtype], name, record)


@functools.cache
def _distributions(dtype, base):
    """Pairs of distributions that differ much, hardly or not at all, with their exact measures.

    The larger terms of the divergence are the cross-entropy and, as sums that differ by rounding alone
    count as equal, what the probabilities add up to.
    """
    found = []
    for n in (1, 2, 5, 17, 33, 97, 1025):
        p, q = probabilities(3, n, dtype), probabilities(3, n, dtype, seed=1)
        q[q == 0] = np.asarray(1e-3, dtype)
        near = np.where(np.arange(n) % 3, p, np.nextafter(p, np.asarray(1, dtype)))
        uniform = np.full_like(p, 1 / n)
        for name, other in (("far", q), ("near", near), ("uniform", uniform)):
            exact = [
                oracle.measures(a, b, base) for a, b in zip(p.tolist(), other.tolist(), strict=True)
            ]
            entropy, cross, divergence = zip(*exact, strict=True)
            pairs = [oracle.as_pair(values) for values in (entropy, cross, divergence)]
            found.append((f"{name}-{n}", p, other, *pairs, [max(x, 1) for x in cross]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [None, 2, 10])
def test_measures_of_distributions(backend, dtype, base, record_ulp):
    for name, p, q, *exact, cross in _distributions(dtype, base):
        options = {"base": base, "backend": backend}
        for measure, got, truth, larger_terms in (
            ("entropy of p", info.entropy(p, **options), exact[0], None),
            ("cross-entropy of p", info.cross_entropy(p, q, **options), exact[1], None),
            ("KL of p", info.kl_divergence(p, q, **options), exact[2], cross),
        ):
            record = functools.partial(record_ulp, backend, measure, dtype)
            _check(got, truth, LOSS_ULP[dtype], f"{name}, base {base}", record, larger_terms)


@functools.cache
def _information(dtype, base):
    rng = np.random.default_rng(3)
    tiny, eps = (float(getattr(np.finfo(dtype), name)) for name in ("tiny", "eps"))
    p = np.concatenate(
        [
            rng.random(500),
            1 - rng.random(200) * 2.0 ** -rng.integers(1, 40, 200),
            2.0 ** -rng.integers(0, 120, 100),
            rng.random(100) * 2.0 ** -rng.integers(1, 120, 100),
            [0.5, 0.70710678, 0.75, 1.0, 1 - eps / 2, tiny, tiny / 8],
        ]
    ).astype(dtype)
    return p, oracle.as_pair([oracle.information(x, base) for x in p.tolist()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [None, 2, 10])
def test_information(backend, dtype, base, record_ulp):
    p, exact = _information(dtype, base)
    record = functools.partial(record_ulp, backend, "information", dtype)
    _check(
        info.information(p, base=base, backend=backend), exact, LOSS_ULP[dtype], f"base {base}", record
    )


@functools.cache
def _binary(dtype, pos_weight):
    rng = np.random.default_rng(4)
    far = 700.0 if dtype == "float64" else 80.0
    x = np.concatenate(
        [rng.standard_normal(300) * s for s in (0.01, 1.0, 10.0)] + [[0, far, -far] * 20]
    )
    x = x.astype(dtype)
    t = rng.random(len(x)) * (rng.random(len(x)) < 0.5)
    t[::5], t[1::5] = 1.0, 0.0
    t = t.astype(dtype)
    loss, grad, larger_terms = zip(
        *[oracle.binary(a, b, pos_weight) for a, b in zip(x.tolist(), t.tolist(), strict=True)],
        strict=True,
    )
    return x, t, oracle.as_pair(loss), oracle.as_pair(grad), larger_terms


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("pos_weight", [None, 0.25, 7.0])
def test_binary_loss_of_logits(backend, dtype, pos_weight, record_ulp):
    x, t, losses, gradients, larger_terms = _binary(dtype, 1.0 if pos_weight is None else pos_weight)
    loss, grad = fastce.binary_cross_entropy_with_logits_with_grad(
        x, t, pos_weight=pos_weight, reduction="none", backend=backend
    )
    name = f"pos_weight {pos_weight}"
    record = functools.partial(record_ulp, backend, "binary loss", dtype)
    _check(loss, losses, LOSS_ULP[loss.dtype.name], name, record)
    record = functools.partial(record_ulp, backend, "binary gradient", dtype)
    _check(grad, gradients, GRAD_ULP[dtype], name, record, larger_terms)


@functools.cache
def _binary_of_probabilities(dtype):
    rng = np.random.default_rng(5)
    p = np.concatenate(
        [rng.random(300), 2.0 ** -rng.integers(1, 14, 100), 1 - 2.0 ** -rng.integers(1, 8, 100)]
    )
    p = np.clip(p, 1e-4, 1 - 1e-2).astype(dtype)
    t = rng.random(len(p)) * (rng.random(len(p)) < 0.5)
    t[::5], t[1::5] = 1.0, 0.0
    t = t.astype(dtype)
    loss, grad, larger_terms = zip(
        *[oracle.binary_of_probability(a, b) for a, b in zip(p.tolist(), t.tolist(), strict=True)],
        strict=True,
    )
    return p, t, oracle.as_pair(loss), oracle.as_pair(grad), larger_terms


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_binary_loss_of_probabilities(backend, dtype, record_ulp):
    p, t, losses, gradients, larger_terms = _binary_of_probabilities(dtype)
    loss, grad = fastce.binary_cross_entropy_with_grad(p, t, reduction="none", backend=backend)
    record = functools.partial(record_ulp, backend, "binary loss of p", dtype)
    _check(loss, losses, LOSS_ULP[loss.dtype.name], "probabilities", record)
    record = functools.partial(record_ulp, backend, "binary gradient of p", dtype)
    _check(grad, gradients, GRAD_ULP[dtype], "probabilities", record, larger_terms)


@pytest.mark.parametrize("n_classes", [3, 8, 10, 24, 100, 300])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_losses_that_one_term_carries(backend, dtype, n_classes, record_ulp):
    """The second likeliest class alone, at 1 to 33 %: no other error averages its own out."""
    rng = np.random.default_rng(n_classes)
    n_rows = 1_000_000 // n_classes
    x = rng.normal(0, 6, (n_rows, n_classes)).astype(dtype)
    rows, order = np.arange(n_rows), np.argsort(x, axis=1)
    target, second = order[:, -1], order[:, -2]
    x[rows, second] = x[rows, target] - rng.uniform(1.1, 4.4, n_rows).astype(dtype)
    target = x.argmax(1)
    terms = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    terms[rows, target] = 0.0
    exact = np.log1p(terms.sum(1))
    got = fastce.cross_entropy(x, target, reduction="none", backend=backend)
    errors = abs(got - exact) / np.spacing(exact.astype(np.float32))
    record_ulp(backend, "loss", dtype, errors.max(), f"one term of {n_classes}")
    assert errors.max() <= LOSS_ULP["float32"]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
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


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 23), ("float64", 52)])
@pytest.mark.parametrize("exponent", [-4, 0, 3, 9, 10, 12, 16])
@pytest.mark.parametrize("n_classes", [5, 40, 500])
def test_exact_shifts_at_any_size(backend, dtype, bits, exponent, n_classes):
    """From 0 in the middle, where kernels may take a shorter way, to below 0, where they may not."""
    rng = np.random.default_rng(13)
    top, grid = 2.0**exponent, 2.0 ** (exponent + 1 - bits)
    low = np.maximum(-1.7 * top, top - np.linspace(1, 125, 30))[:, None]
    x = np.round(rng.uniform(low, top, (30, n_classes)) / grid) * grid
    x[:, 0], x[:, 1] = top - grid, np.round(low[:, 0] / grid) * grid
    x = x.astype(dtype)
    moved = x - np.asarray(2 * top, dtype)
    assert (moved + np.asarray(2 * top, dtype) == x).all()
    y = rng.integers(0, n_classes, 30)
    loss, grad = fastce.cross_entropy_with_grad(x, y, reduction="none", backend=backend)
    moved_loss, moved_grad = fastce.cross_entropy_with_grad(moved, y, reduction="none", backend=backend)
    np.testing.assert_array_equal(moved_loss, loss)
    np.testing.assert_array_equal(moved_grad, grad)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_classes", [5, 40])
def test_an_extreme_neighbour_changes_no_bit(backend, dtype, n_classes):
    """Rows computed side by side take the shorter way only if all of them may."""
    rng = np.random.default_rng(14)
    low = np.repeat(-(2.0 ** np.arange(-3, 5)), 16) * np.tile(np.linspace(0.9, 1.1, 16), 8)
    x = rng.uniform(low[:, None], -low[:, None], (128, n_classes)).astype(dtype)
    y = rng.integers(0, n_classes, 128)
    extreme = x.copy()
    extreme[::16] = -1e6 * np.arange(n_classes)
    loss, grad = fastce.cross_entropy_with_grad(x, y, reduction="none", backend=backend)
    same_loss, same_grad = fastce.cross_entropy_with_grad(extreme, y, reduction="none", backend=backend)
    others = np.arange(128) % 16 != 0
    np.testing.assert_array_equal(same_loss[others], loss[others])
    np.testing.assert_array_equal(same_grad[others], grad[others])


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 23), ("float64", 52)])
def test_exact_shifts_of_rows_that_climb(backend, dtype, bits):
    """The reference of a row's sum may lag behind later, larger logits, by less than 8."""
    rng = np.random.default_rng(12)
    low, high = rng.uniform(-0.9, 1.05, (8, 1024)), rng.uniform(-0.9, 8.9, (8, 3072))
    low, high = (
        np.round(low * 2.0**bits) / 2.0**bits,
        np.round(high * 2.0 ** (bits - 3)) / 2.0 ** (bits - 3),
    )
    x = np.concatenate([low, high], axis=1).astype(dtype)
    moved = x - np.ones((), dtype)
    assert (moved + np.ones((), dtype) == x).all()
    y = rng.integers(0, 4096, 8)
    loss, grad = fastce.cross_entropy_with_grad(x, y, reduction="none", backend=backend)
    moved_loss, moved_grad = fastce.cross_entropy_with_grad(moved, y, reduction="none", backend=backend)
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
