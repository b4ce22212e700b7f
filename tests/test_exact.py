"""Exact sums against fractions: any numbers, in any order, cut and merged in any way."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastce.scoring.exact import ExactSums

HOSTILE = {
    "none": [],
    "zeros": [0.0, -0.0, 0.0],
    "smallest": [5e-324] * 7 + [-5e-324] * 2,
    "subnormal and largest": [1.7976931348623157e308, 5e-324, -1.7976931348623157e308],
    "beyond the largest float": [1e308] * 5,
    "beyond the lowest float": [-1e308] * 5,
    "beyond and back": [1e308] * 5 + [-1e308] * 4,
    "all but cancels": [1e16, 1.0, -1e16, 1e-16, 2.0**-1000],
    "half way to even": [1.0, 2.0**-53, 2.0**-106],
    "half way, below": [1.0, 2.0**-53, -(2.0**-106)],
    "each exponent": [math.ldexp(1.1, e) * (-1) ** e for e in range(-1074, 1024)],
    "around a chunk": [0.1] * 4095 + [1e300] + [-0.1] * 3 + [1e-300],
    "around the largest exponent of a chunk": [2.0**1000, -(2.0**999), 2.0**1001, 1.0] * 3,
}


def as_float(number):
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def fraction_sum(values):
    return sum(map(Fraction, values), Fraction(0))


def sum_of(values):
    sums = ExactSums()
    sums.add(np.asarray(values))
    return sums


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_numbers(case):
    values = np.array(HOSTILE[case], np.float64)
    exact = fraction_sum(values.tolist())
    for order in (values, values[::-1], np.random.default_rng(1).permutation(values)):
        sums = sum_of(order)
        assert sums.value() == as_float(exact)
        assert sums.over(7) == as_float(exact / 7)
        assert sums == sum_of(values)
    assert math.isnan(sums.over(0))


@pytest.mark.parametrize("case", HOSTILE)
def test_squares_and_variance_of_hostile_numbers(case):
    values = np.array(HOSTILE[case], np.float64)
    squares = ExactSums()
    squares.add_squares(values)
    fractions = [Fraction(x) for x in values.tolist()]
    assert squares.value() == as_float(sum(x * x for x in fractions))
    n = len(values)
    found = sum_of(values).variance_of_mean(squares, n)
    if n < 2:
        assert math.isnan(found)
    else:
        mean = sum(fractions) / n
        assert found == as_float(sum((x - mean) ** 2 for x in fractions) / (n - 1) / n)


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ([math.inf], math.inf),
        ([-math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan], math.nan),
        ([math.nan, math.inf], math.nan),
    ],
)
def test_special_numbers(special, expected):
    values = np.array([1.5, *special, 1e308, -2.0])
    sums, squares = sum_of(values), ExactSums()
    squares.add_squares(values)
    for found in (sums, ExactSums.from_json(sums.as_json())):
        np.testing.assert_equal([found.value(), found.over(3)], [expected, expected])
    assert squares.value() == math.inf or math.isnan(expected)
    assert math.isnan(sums.variance_of_mean(squares, len(values)))
    # Numbers of the other bins are as they were.
    apart = ExactSums(2)
    apart.add(values, np.isfinite(values).astype(np.intp))
    np.testing.assert_equal(apart.value(0), expected)
    assert apart.value(1) == as_float(fraction_sum([1.5, 1e308, -2.0]))


NUMBERS = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 60),
    elements={"allow_nan": False, "allow_infinity": False},
)


@settings(deadline=None)
@given(NUMBERS, st.data())
def test_any_cut_any_order_any_bins(values, data):
    """Cut, shuffled, merged in a tree and through JSON: one value, that of fractions."""
    n_bins = data.draw(st.integers(1, 4))
    bins = np.array([data.draw(st.integers(0, n_bins - 1)) for _ in values], np.intp)
    order = np.array(data.draw(st.permutations(range(len(values)))), np.intp)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=5)))
    pieces = []
    for piece in np.split(order, cuts):
        sums = ExactSums(n_bins)
        sums.add(values[piece], bins[piece])
        pieces.append(ExactSums.from_json(json.loads(json.dumps(sums.as_json()))))
        assert pieces[-1] == sums
    while len(pieces) > 1:
        last = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        pieces[-1].merge(last)
    at_once = ExactSums(n_bins)
    at_once.add(values, bins)
    assert pieces[0] == at_once
    assert pieces[0].as_json() == at_once.as_json()
    expected = [as_float(fraction_sum(values[bins == i].tolist())) for i in range(n_bins)]
    assert at_once.values() == expected


@settings(deadline=None)
@given(NUMBERS)
def test_squares_of_any_numbers(values):
    squares = ExactSums()
    squares.add_squares(values)
    fractions = [Fraction(x) for x in values.tolist()]
    assert squares.value() == as_float(sum(x * x for x in fractions))
    n = len(fractions)
    if n > 1:
        mean = sum(fractions) / n
        expected = as_float(sum((x - mean) ** 2 for x in fractions) / (n - 1) / n)
        assert sum_of(values).variance_of_mean(squares, n) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_numbers_of_all_magnitudes(dtype):
    rng = np.random.default_rng(2)
    exponents = rng.integers(*((-149, 127) if dtype == np.float32 else (-1074, 1023)), size=20_000)
    values = np.ldexp(rng.uniform(-1, 1, 20_000), exponents).astype(dtype)
    bins = rng.integers(3, size=20_000)
    sums = ExactSums(3)
    sums.add(values, bins)
    for i in range(3):
        assert sums.value(i) == as_float(fraction_sum(values[bins == i].tolist()))
    assert sum_of(values).value() == math.fsum(values.tolist())


def test_the_callers_numbers_stay_as_they_are():
    values = np.array([1.0, math.nan, math.inf, 1e-200, 1e300])
    before = values.copy()
    sums = sum_of(values)
    sums.add_squares(values)
    np.testing.assert_array_equal(values, before)
    assert sums != sum_of(before)
