"""Exact sums of floats: the same in every bit in any order, however the numbers are cut and merged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

# A sum is an integer in units of 2**-_SCALE: the square of the smallest float64 is one unit.
_SCALE = 2 * 1074

# So many numbers are added at a time: they and their rests stay in L2. With 2**12, of which each step
# takes three bits more, a sum takes 1.5 times as long.
_CHUNK_BITS = 15
_CHUNK = 2**_CHUNK_BITS

# Beyond this exponent sums of a chunk could overflow; so large numbers are added one by one.
_LARGEST_EXPONENT = 1000

# Between these the square of a float64 is a float64 and another one, its error; others are squared one
# by one.
_SMALLEST_SQUARED = 2.0**-484
_LARGEST_SQUARED = 2.0**511


_SPECIAL = ("nan", "inf", "-inf")


class ExactSums:
    """Some sums of float64 numbers, exact until they are asked for.

    Numbers are added a chunk at a time. Adding and subtracting a power of two far above them all cuts
    off their leading bits at one common place, so that these can be added without rounding; the rests,
    exact too, go through the same until they are 0. Of float32 numbers of similar size that takes two
    rounds, 4 ns a number, where `math.fsum` takes 40. (S. M. Rump, T. Ogita, S. Oishi, "Accurate
    Floating-Point Summation Part I", 2008.)
    """

    def __init__(self, n_sums: int = 1) -> None:
        self._units = [0] * n_sums
        # Numbers that no sum can hold are counted, by sum and kind.
        self._special: Counter[tuple[int, str]] = Counter()

    def add(self, values: NDArray[Any], bins: NDArray[np.intp] | None = None) -> None:
        """Add numbers to the sums that ``bins`` says, or all to the first one."""
        room = np.empty(min(len(values), _CHUNK))
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK].astype(np.float64)
            own = None if bins is None else bins[start : start + _CHUNK]
            self._add_chunk(chunk, own, room[: len(chunk)])

    def _add_chunk(
        self, rest: NDArray[np.float64], bins: NDArray[np.intp] | None, leading: NDArray[np.float64]
    ) -> None:
        largest = _largest(rest)
        if not math.isfinite(largest):
            self._add_special(rest, bins)
            np.nan_to_num(rest, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            largest = _largest(rest)
        exponent = math.frexp(largest)[1]
        if exponent > _LARGEST_EXPONENT:
            for i in np.flatnonzero(rest):
                self._units[0 if bins is None else bins[i]] += _to_units(float(rest[i]))
            return
        while rest.any():
            sigma = math.ldexp(1.0, exponent + _CHUNK_BITS + 1)
            np.add(rest, sigma, out=leading)
            np.subtract(leading, sigma, out=leading)
            np.subtract(rest, leading, out=rest)
            if bins is None:
                self._units[0] += _to_units(float(leading.sum()))
            else:
                sums = np.bincount(bins, leading, len(self._units))
                for i in np.flatnonzero(sums):
                    self._units[i] += _to_units(float(sums[i]))
            exponent -= 52 - _CHUNK_BITS  # half a unit in the last place of sigma bounds the rests

    def _add_special(self, values: NDArray[np.float64], bins: NDArray[np.intp] | None) -> None:
        for i in np.flatnonzero(~np.isfinite(values)):
            kind = "nan" if math.isnan(values[i]) else "inf" if values[i] > 0 else "-inf"
            self._special[0 if bins is None else int(bins[i]), kind] += 1

    def add_squares(self, values: NDArray[Any]) -> None:
        """Add the squares of numbers to the first sum, without rounding them."""
        wide = values.astype(np.float64)
        if values.dtype.itemsize <= 4:  # the square of a float32 is a float64
            self.add(wide * wide)
            return
        size = np.abs(wide)
        odd = np.isfinite(size) & (size > 0) & ((size < _SMALLEST_SQUARED) | (size > _LARGEST_SQUARED))
        for i in np.flatnonzero(odd):
            self._units[0] += _to_units(float(wide[i])) ** 2 >> _SCALE
        wide[odd] = 0
        squares = wide * wide
        self.add(squares)
        with np.errstate(invalid="ignore"):  # of infinite numbers, which are counted by now
            high = wide * 134217729.0  # 2**27 + 1 splits a number into halves (Dekker)
            high -= high - wide
            low = wide - high
            errors = ((high * high - squares) + 2 * high * low) + low * low
        self.add(np.where(np.isfinite(wide), errors, 0.0))

    def merge(self, other: Self) -> None:
        """Add the sums of another one."""
        self._units = [mine + others for mine, others in zip(self._units, other._units, strict=True)]
        self._special += other._special

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExactSums):
            return NotImplemented
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def values(self) -> list[float]:
        """Return the sums, each correctly rounded; NaN or infinite if such numbers were added."""
        return [self.value(i) for i in range(len(self._units))]

    def value(self, i: int = 0) -> float:
        """Return one sum, correctly rounded."""
        return self.over(1, i)

    def over(self, n: int, i: int = 0) -> float:
        """Return one sum over a whole number, correctly rounded; NaN over 0."""
        special = self._special_value(i)
        if n == 0 or math.isnan(special):
            return math.nan
        return special or _divide(self._units[i], n << _SCALE)

    def _special_value(self, i: int) -> float:
        """Return NaN, an infinity, or 0 where all numbers were finite."""
        nan, inf, minus = (self._special[i, kind] for kind in _SPECIAL) if self._special else (0, 0, 0)
        if nan or (inf and minus):
            return math.nan
        return math.inf if inf else -math.inf if minus else 0.0

    def variance_of_mean(self, squares: ExactSums, n: int) -> float:
        """Return sum((x - mean)**2) / (n - 1) / n from this sum of x and a sum of squares.

        The difference of large numbers that this is cannot cancel: both are exact.
        """
        if n < 2 or self._special_value(0):
            return math.nan
        difference = ((n * squares._units[0]) << _SCALE) - self._units[0] ** 2
        return _divide(difference, (n * n * (n - 1)) << (2 * _SCALE))

    def as_json(self) -> list[str]:
        """Return the sums as text, exact: whole numbers times a power of two, as C writes floats."""
        texts = []
        for i, units in enumerate(self._units):
            special = [self._special[i, kind] for kind in _SPECIAL]
            texts.append(" ".join([_hex(units), *(map(str, special) if any(special) else ())]))
        return texts

    @classmethod
    def from_json(cls, texts: Sequence[str]) -> Self:
        """Return what `as_json` was given."""
        sums = cls(len(texts))
        for i, text in enumerate(texts):
            number, *special = text.split()
            mantissa, _, exponent = number.partition("p")
            sums._units[i] = int(mantissa, 16) << (int(exponent) + _SCALE)
            for kind, n in zip(_SPECIAL, map(int, special), strict=False):
                if n:
                    sums._special[i, kind] = n
        return sums


def _largest(values: NDArray[np.float64]) -> float:
    """Return the largest magnitude; NaN if there is one."""
    return float(np.maximum(values.max(), -values.min()))


def _to_units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_SCALE + 1 - denominator.bit_length())


def _divide(numerator: int, denominator: int) -> float:
    try:
        return numerator / denominator  # of integers: correctly rounded
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def _hex(units: int) -> str:
    zeros = (units & -units).bit_length() - 1 if units else 0
    return f"{units >> zeros:#x}p{zeros - _SCALE:+d}"
