"""Information, entropy, cross-entropy and KL divergence; softmax and the statistics of rows."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.special
import scipy.stats
from cases import (
    ALL_DTYPES,
    DTYPES,
    HALVES,
    INF,
    SIZES,
    assert_near,
    assert_same_bits,
    probabilities,
    problem,
)

import fastce
from fastce import info

BASES = (None, 2, 10, 0.5)


# ---- Of probabilities ----


def test_textbook_values(backend):
    """Shannon's: a fair coin, odds of 1 to 99, one letter of 27, and a race of eight horses."""
    options = {"backend": backend}
    assert info.entropy([0.5, 0.5], **options) == 1.0
    assert info.entropy([0.01, 0.99], **options) == pytest.approx(0.0807931358959)
    assert info.entropy(np.full(27, 1 / 27), **options) == pytest.approx(math.log2(27))
    race = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64, 1 / 64, 1 / 64, 1 / 64]
    assert info.entropy(race, **options) == 2.0
    assert info.kl_divergence(race, np.full(8, 1 / 8), **options) == pytest.approx(1.0, rel=1e-15)
    assert info.cross_entropy(race, np.full(8, 1 / 8), **options) == 3.0
    assert info.information(1 / 8, **options) == 3.0
    assert info.information(1.0, **options) == 0.0
    assert info.information(0.0, **options) == INF


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_powers_of_two_are_exact_in_bits(backend, dtype):
    powers = np.arange(-120, 1)
    p = (2.0**powers).astype(dtype)
    np.testing.assert_array_equal(info.information(p, backend=backend), -powers)
    assert not np.signbit(info.information(p, backend=backend)).any()
    p = np.where(np.arange(16) == 3, np.asarray(1, dtype), np.asarray(0, dtype))
    assert not np.signbit(info.entropy(p, backend=backend))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("base", BASES)
def test_measures_are_as_in_scipy(backend, dtype, base):
    unit = 1.0 if base is None else math.log(base)
    # sums of p and q that differ by their roundings count as equal
    rounding = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 0.0)
    for n in SIZES:
        p, q = probabilities(7, n, dtype), probabilities(7, n, dtype, seed=1)
        q[1] = p[1]
        a, b = p.astype(np.float64), q.astype(np.float64)
        options = {"base": base, "backend": backend}
        with np.errstate(divide="ignore"):
            information = -np.log(a) / unit
        assert_near(info.information(p, **options), information, n, larger_term=1 / abs(unit))
        entropy = info.entropy(p, **options)
        assert entropy.dtype == ("float64" if dtype == "float64" else "float32")
        assert_near(entropy, scipy.special.entr(a).sum(axis=1) / unit, n)
        cross = (scipy.special.entr(a) + scipy.special.rel_entr(a, b)).sum(axis=1) / unit
        assert_near(info.cross_entropy(p, q, **options), cross, n, larger_term=np.abs(cross) + 1)
        divergence = info.kl_divergence(p, q, **options)
        assert_near(
            divergence,
            scipy.special.rel_entr(a, b).sum(axis=1) / unit,
            n,
            larger_term=4
            * (np.where(np.isinf(cross), 0, np.abs(cross)) + (1 + rounding / 1e-6) / abs(unit)),
        )
        assert divergence[1] == 0.0


def test_what_scipy_calls_kl_div_is_another_thing(backend):
    """It adds -p + q to each term; rel_entr is the term. stats.entropy makes the sums 1 first."""
    p, q = np.array([0.5, 0.25]), np.array([0.25, 0.125])
    assert info.kl_divergence(p, q, base=None, backend=backend) == pytest.approx(0.75 * math.log(2))
    assert scipy.special.rel_entr(p, q).sum() == pytest.approx(0.75 * math.log(2))
    assert scipy.special.kl_div(p, q).sum() == pytest.approx(0.75 * math.log(2) - 0.375)
    assert scipy.stats.entropy(p, q) == 0.0


def test_divergence_is_cross_entropy_less_entropy(backend):
    for dtype, n in ((dtype, n) for dtype in DTYPES for n in SIZES):
        p, q = probabilities(20, n, dtype), probabilities(20, n, dtype, seed=1)
        q[q == 0] = 1e-3
        cross = info.cross_entropy(p, q, backend=backend)
        divergence = info.kl_divergence(p, q, backend=backend)
        entropy = info.entropy(p, backend=backend).astype(np.float64)
        assert_near(divergence, cross - entropy, n, larger_term=4 * np.abs(cross) + 2)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_divergence_from_itself_is_zero(backend, dtype):
    for n in SIZES:
        p = probabilities(9, n, dtype)
        for array in (
            info.kl_divergence(p, p.copy(), backend=backend),
            info.kl_divergence(3 * p, 3 * p, backend=backend),
        ):
            assert not array.any()
            assert not np.signbit(array).any()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_divergence_is_not_negative(backend, dtype):
    """Of distributions one rounding apart, whose sums differ by as much."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 40, 700, 2100):
        p = probabilities(40, n, "float64")
        near = p * (1 + 1e-3 * rng.standard_normal(p.shape))
        near /= near.sum(axis=1, keepdims=True)
        nearer = np.where(rng.random(p.shape) < 0.5, p, near)
        nearer /= nearer.sum(axis=1, keepdims=True)
        for q in (p, near, nearer):
            found = info.kl_divergence(p.astype(dtype), q.astype(dtype), backend=backend)
            if dtype in HALVES:  # whose roundings add up to more than the sums may differ
                continue
            assert (found >= 0).all(), n


def test_nothing_is_renormalised_or_clipped(backend):
    options = {"base": None, "backend": backend}
    assert info.entropy([0.25, 0.25], **options) == pytest.approx(0.5 * math.log(4))
    assert info.entropy([2.0], **options) == pytest.approx(-2 * math.log(2))
    assert info.cross_entropy([1.0, 1.0], [0.5, 0.25], **options) == pytest.approx(math.log(8))
    assert info.kl_divergence([0.5], [1.0], **options) == pytest.approx(-0.5 * math.log(2))
    assert info.information([2.0], **options)[0] == pytest.approx(-math.log(2))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n", [2, 40, 2100])
def test_impossible_events(backend, dtype, n):
    """0 log 0 is 0; what q holds impossible and p does not costs +inf."""
    p, q = probabilities(3, n, dtype), np.full((3, n), 1 / n, dtype)
    p[:, 0], p[:, 1], q[:, 0] = 0, 0.5, 0
    options = {"backend": backend}
    assert np.isfinite(info.entropy(p, **options)).all()
    assert np.isfinite(info.cross_entropy(p, q, **options)).all()
    assert np.isfinite(info.kl_divergence(p, q, **options)).all()
    q[1, 1] = 0
    for measure in (info.cross_entropy, info.kl_divergence):
        np.testing.assert_array_equal(measure(p, q, **options) == INF, [False, True, False])


@pytest.mark.parametrize(
    "measure", [info.cross_entropy, info.kl_divergence, info.kl_divergence_from_logits]
)
@pytest.mark.parametrize("of_p", ALL_DTYPES)
@pytest.mark.parametrize("of_q", ALL_DTYPES)
def test_two_dtypes(backend, measure, of_p, of_q):
    """Both as float64 if either is, else as float32."""
    p, q = probabilities(5, 40, of_p), probabilities(5, 40, of_q, seed=1)
    common = "float64" if "float64" in (of_p, of_q) else "float32"
    got = measure(p, q, backend=backend)
    assert_same_bits(got, measure(p.astype(common), q.astype(common), backend=backend))


def test_whole_numbers_are_probabilities(backend):
    assert info.entropy([0, 1], backend=backend) == 0.0
    assert info.kl_divergence([0, 1], [0.5, 0.5], backend=backend) == 1.0
    assert info.information(1, backend=backend) == 0.0


@hypothesis.settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    batch=st.lists(st.integers(0, 4), max_size=2),
    n=st.one_of(st.integers(1, 70), st.sampled_from([511, 1025])),
    axis=st.integers(0, 2),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    base=st.sampled_from(BASES),
)
def test_any_distributions(backend, batch, n, axis, seed, dtype, base):
    rng = np.random.default_rng(seed)
    shape = (*batch, n)
    x, y = (rng.exponential(size=shape) * (rng.random(shape) < 0.7) for _ in range(2))
    p, q = (a / np.maximum(a.sum(axis=-1, keepdims=True), 1e-30) for a in (x, y + 1e-3))
    axis %= len(shape)
    p, q = (np.moveaxis(a, -1, axis).astype(dtype) for a in (p, q))
    options = {"axis": axis, "base": base}
    for measure, arrays in (
        (info.entropy, (p,)),
        (info.cross_entropy, (p, q)),
        (info.kl_divergence, (p, q)),
        (info.entropy_from_logits, (p,)),
        (info.kl_divergence_from_logits, (p, q)),
    ):
        got = np.asarray(measure(*arrays, backend=backend, **options))
        assert got.shape == tuple(np.delete(p.shape, axis))
        wide = [a.astype(np.float64) for a in arrays]
        expected = measure(*wide, backend="numpy", **options)
        assert_near(got, expected, measure.__name__, larger_term=60.0 if len(arrays) == 2 else 0.0)
        if measure is not info.cross_entropy and (base is None or base > 1):
            assert (got >= 0).all() or (measure is info.kl_divergence and not p.sum(axis=axis).all())


# ---- Of logits ----


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("base", BASES)
def test_measures_from_logits_are_those_of_the_softmax(backend, dtype, base):
    unit = 1.0 if base is None else math.log(base)
    for n in SIZES:
        x, _ = problem(6, n, dtype)
        z, _ = problem(6, n, dtype, seed=1)
        log_p, log_q = (scipy.special.log_softmax(a.astype(np.float64), axis=1) for a in (x, z))
        p = np.exp(log_p)
        options = {"base": base, "backend": backend}
        # SciPy's logarithms lose digits next to 0
        larger_term = (1 + np.abs(p * log_q).sum(axis=1)) / abs(unit)
        entropy = -(p * log_p).sum(axis=1) / unit
        assert_near(info.entropy_from_logits(x, **options), entropy, n, larger_term=larger_term)
        divergence = (p * (log_p - log_q)).sum(axis=1) / unit
        got = info.kl_divergence_from_logits(x, z, **options)
        assert_near(got, divergence, n, larger_term=larger_term)


def test_divergence_from_logits_where_classes_are_masked(backend):
    for n in (3, 40, 2100):
        x, _ = problem(4, n)
        z, _ = problem(4, n, seed=1)
        x[1, 0] = -INF  # impossible for p alone: costs q's share
        x[2, 0] = z[2, 0] = -INF
        z[3, 0] = -INF  # impossible for q alone
        got = info.kl_divergence_from_logits(x, z, base=None, backend=backend)
        assert got[3] == INF
        log_p, log_q = (scipy.special.log_softmax(a.astype(np.float64), axis=1) for a in (x, z))
        expected = scipy.special.rel_entr(np.exp(log_p), np.exp(log_q)).sum(axis=1)
        assert_near(got, expected, n, larger_term=8.0)
        assert info.kl_divergence_from_logits(x, x, backend=backend).tolist() == [0.0] * 4


# ---- Softmax and its logarithm ----


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_activations_are_as_in_scipy(backend, dtype):
    for n in SIZES:
        x, _ = problem(6, n, dtype)
        x[2, n // 3 : n // 2] = -INF
        wide = x.astype(np.float64)
        assert_near(fastce.softmax(x, backend=backend), scipy.special.softmax(wide, axis=1), n)
        log_p = scipy.special.log_softmax(wide, axis=1)
        assert_near(fastce.log_softmax(x, backend=backend), log_p, n, larger_term=1.0)
        lse = scipy.special.logsumexp(wide, axis=1)
        assert_near(fastce.logsumexp(x, backend=backend), lse, n, larger_term=np.abs(wide.max(axis=1)))


def test_out_of_logsumexp(backend):
    x, _ = problem(10, 4)
    expected = fastce.logsumexp(x, backend=backend)
    for out in (np.empty(10, np.float32), np.empty(20, np.float32)[::2], np.empty(10)):
        assert fastce.logsumexp(x, out=out, backend=backend) is out
        np.testing.assert_array_equal(out, expected)


def test_limits_of_logsumexp(backend):
    rows = np.array([[INF, 0.0], [-INF, -INF], [INF, -INF], [INF, INF], [0.0, -INF]])
    for n in (2, 40, 2100):
        x = np.concatenate([rows, np.repeat(rows[:, :1], n - 2, axis=1)], axis=1)
        x[4, 2:] = -INF
        got = fastce.logsumexp(x, backend=backend)
        np.testing.assert_array_equal(got, [INF, -INF, INF, INF, 0.0])


# ---- Statistics of rows ----


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n_classes", SIZES)
def test_statistics_by_their_definitions(backend, dtype, n_classes):
    """With many ties, of which the first class is the largest."""
    x, y = problem(20, n_classes)
    x, y[0] = np.round(x).astype(dtype), -100
    stats = fastce.row_stats(x, y, backend=backend)
    wide, kept, t = x.astype(np.float64), slice(1, None), np.maximum(y, 0)
    p = scipy.special.softmax(wide, axis=1)
    rows = np.arange(20)
    x_t = wide[rows, t]
    before = np.arange(n_classes) < t[:, None]
    one_hot = np.arange(n_classes) == t[:, None]
    expected = {
        "loss": scipy.special.logsumexp(wide, axis=1) - x_t,
        "lse": scipy.special.logsumexp(wide, axis=1),
        "target_logit": x_t,
        "max_logit": wide.max(axis=1),
        "argmax": wide.argmax(axis=1),
        "rank": ((wide > x_t[:, None]) | ((wide == x_t[:, None]) & before)).sum(axis=1),
        "entropy": scipy.special.entr(p).sum(axis=1),
        "max_prob": p.max(axis=1),
        "brier": ((p - one_hot) ** 2).sum(axis=1),
    }
    assert set(expected) == set(stats._fields)
    for name, values in expected.items():
        got = getattr(stats, name)
        whole = name in ("argmax", "rank")
        assert got.dtype == ("int64" if whole else "float64" if dtype == "float64" else "float32")
        assert_near(got[kept], values[kept], name, larger_term=10.0)
    np.testing.assert_array_equal((stats.rank == 0)[kept], (stats.argmax == y)[kept])


@pytest.mark.parametrize("n_classes", [10, 40, 2100])
def test_statistics_do_not_depend_on_one_another(backend, n_classes):
    """Each alone has the bits it has among all, and what does not need targets the bits without."""
    x, y = problem(30, n_classes)
    everything = fastce.row_stats(x, y, backend=backend)
    assert_same_bits(everything.loss, fastce.cross_entropy(x, y, reduction="none", backend=backend))
    for name in everything._fields:
        alone = fastce.row_stats(x, y, outputs=[name], backend=backend)
        assert [key for key, array in alone._asdict().items() if array is not None] == [name]
        assert_same_bits(getattr(alone, name), getattr(everything, name), name)
    without = fastce.row_stats(x, backend=backend)
    assert [key for key, array in without._asdict().items() if array is None] == [
        "loss",
        "target_logit",
        "rank",
        "brier",
    ]
    for name, array in without._asdict().items():
        if array is not None:
            assert_same_bits(array, getattr(everything, name), name)


def test_brier_is_in_its_range(backend):
    x, y = problem(200, 10, "float64")
    x[:100] *= 100
    brier = fastce.row_stats(x, y, outputs=["brier"], backend=backend).brier
    assert (brier >= 0).all()
    assert (brier <= 2).all()
    certain = fastce.row_stats(np.array([[900.0, 0.0]] * 2), [0, 1], backend=backend)
    assert certain.brier[1] == 2.0
