"""What the Numba backend computes element by element, or of probabilities.

Binary cross-entropy, information, entropy, cross-entropy and Kullback-Leibler divergence, in the
vocabulary of ``numba.py``. Here, too, every sum has one order on every machine, for every layout and
number of threads.

Where numbers are float32, what is computed of each is float32, but products that are added up are
double: exact, and neither too large nor subnormal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numpy.typing import NDArray

from fastce._backends.numba import (
    _BIAS,
    _BLOCK,
    _CARRY,
    _DTYPES,
    _FETCHED,
    _HALVES,
    _INNER,
    _JOB_WORDS,
    _LN2_HI,
    _LN2_LO,
    _LOG1P,
    _LOG2E,
    _M,
    _MANTISSA,
    _MIN_EXPONENT,
    _NARROW,
    _OPTIONS,
    _PITCH,
    _POLY,
    _REF,
    _STATE,
    _SUM_FLOOR,
    _SUM_SHIFT,
    _TIES,
    _TOTAL,
    _add_to,
    _address,
    _address_in,
    _as_doubles,
    _at,
    _bits_of,
    _clear,
    _compiling,
    _computed,
    _doubles,
    _emits,
    _fetch,
    _fetch_lanes,
    _finite_or_zero,
    _first,
    _first_lanes,
    _float64s,
    _fma,
    _folded,
    _get,
    _lanes,
    _larger,
    _larger_of,
    _log1p,
    _Memory,
    _named,
    _Pointer,
    _pointer_like,
    _read_block,
    _reals_like,
    _run_parallel,
    _run_serially,
    _same,
    _scale_sum,
    _set,
    _several,
    _size,
    _splat,
    _splat_double,
    _store_where,
    _strides,
    _sum_lanes,
    _sum_of_terms,
    _sum_terms,
    _sum_unit,
    _total_of,
    _two_sum,
    _two_sum_of,
    _Value,
    _Vector,
    _vector,
    _vector_at,
)
from fastce.kernels import BINARY_TILE, SUMS_AGREE, log_scale, tile_rows

# By bits of the dtype. Minimax polynomials, the largest power first; relative errors of what they
# serve. log1p(e) / e for 0 <= e <= 1: 2^-27 and 2^-56.
_LOG1P_OF_DECAY = {
    32: "-0x1.b200c2p-9 0x1.4a785ep-6 -0x1.d7d5bap-5 0x1.b52e76p-4 -0x1.3a6308p-3 0x1.9353fep-3"
    " -0x1.ff2518p-3 0x1.554dd8p-2 -0x1.ffffd2p-2 0x1p+0",
    64: "0x1.a901cbd374d80p-16 -0x1.31f587f0d88c8p-12 0x1.a257ce8bc18d7p-10 -0x1.6b4b3b1c99fe9p-8"
    " 0x1.c57bbe84739a6p-7 -0x1.b6301fb6abc8cp-6 0x1.5a87e00cbbf9cp-5 -0x1.d71042b8d54d7p-5"
    " 0x1.202d9b841f571p-4 -0x1.4b01f6caee6c9p-4 0x1.712de6a47855fp-4 -0x1.98d2925ef7a63p-4"
    " 0x1.c6f6a74e7a2b9p-4 -0x1.fffa8baa818fcp-4 0x1.2491fed7a7125p-3 -0x1.55554fbe381e4p-3"
    " 0x1.99999951f899bp-3 -0x1.fffffffdd4914p-3 0x1.5555555551050p-2 -0x1.fffffffffff9fp-2 0x1p+0",
}
# (log(1 + f) - f + f^2 / 2) / f^3 for sqrt(1/2) <= 1 + f <= sqrt(2): 2^-27 of the logarithm.
_LOG_TAIL = (
    "-0x1.38d2ecp-4 0x1.055ed2p-3 -0x1.0d819ap-3 0x1.22d956p-3 -0x1.54728ep-3 0x1.99a018p-3"
    " -0x1.000226p-2 0x1.555554p-2"
)
# (atanh(s) / s - 1) / z, z = s^2 <= 1/4: 2^-27 and 2^-58.
_ATANH_TAIL = {
    32: "0x1.5a7dbep-3 0x1.d25facp-5 0x1.ddfc6cp-4 0x1.23adfep-3 0x1.99a13p-3 0x1.55554cp-2",
    64: "0x1.de11d283b39a4p-3 -0x1.74f6a2a135f52p-3 0x1.4efe6814616f0p-3 0x1.7f1c99dd5d60ap-14"
    " 0x1.da196f95504b5p-5 0x1.a1508a3a07448p-5 0x1.e37e359063667p-5 0x1.110030ad94c14p-4"
    " 0x1.3b14a59014f0fp-4 0x1.745d0e0f3bc71p-4 0x1.c71c71fef39edp-4 0x1.24924924325a4p-3"
    " 0x1.999999999a342p-3 0x1.5555555555553p-2",
}
# (exp(-d) - 1 + d) / d^2 for -2 <= d <= 1: 2^-26 and 2^-56.
_EXCESS = {
    32: "0x1.c0b19p-22 -0x1.61d8acp-19 0x1.9be934p-16 -0x1.a0b624p-13 0x1.6c2046p-10 -0x1.110facp-7"
    " 0x1.555546p-5 -0x1.555558p-3 0x1p-1",
    64: "-0x1.3d1f1622de9b3p-48 0x1.882ae9e9dacc7p-45 -0x1.aef182d6f93c7p-41 0x1.940acdb57f5e0p-37"
    " -0x1.611cbeaccd0fdp-33 0x1.1eed1d393a17ep-29 -0x1.ae646ff5f0632p-26 0x1.27e4fbc2a6817p-22"
    " -0x1.71de3a30c0c43p-19 0x1.a01a01a033a03p-16 -0x1.a01a01a04d749p-13 0x1.6c16c16c16629p-10"
    " -0x1.1111111110f09p-7 0x1.5555555555558p-5 -0x1.5555555555557p-3 0x1p-1",
}
# Exponentials of elements are multiples of 2^-lift, so that a weight may still make a tiny one count:
# of this, or with weights of elements, by bits of the dtype, of these.
_LIFT = 32
_LIFT_WEIGHTED = {32: 126, 64: 64}
_SQRT_HALF = {32: 0x3F3504F3, 64: 0x3FE6A09E667F3BCD}
_ONE = {32: 0x3F800000, 64: 0x3FF0000000000000}


# ---- Functions of vectors ----


def _polynomial(coefficients: str, x: _Value) -> _Value:
    first, *others = coefficients.split()
    value = x.of(first)
    for coefficient in others:
        value = _fma(value, x, coefficient)
    return value


def _decay(a: _Value, lift: int, floor: Any) -> _Value:
    """exp(-a) * 2^lift for a >= 0, and 0 above ``floor``; a NaN stays one."""
    bits = a.bits
    magic_number = 1.5 * 2.0 ** _MANTISSA[bits] + _BIAS[bits] + lift
    magic = _fma(a, -float.fromhex(_LOG2E[bits]), a.of(magic_number))
    n = magic - magic_number
    y = _fma(n, -float.fromhex(_LN2_LO[bits]), _fma(n, -float.fromhex(_LN2_HI[bits]), -a))
    t = _fma(_polynomial(_POLY[bits], y), y * y, y)
    power = (magic.as_bits() << _MANTISSA[bits]).as_real()
    return a.compare("<=", floor, or_nan=True).select(_fma(t, power, power), 0.0)


def _lowest(bits: int, lift: int) -> float:
    """Return the largest a for which exp(-a) * 2^lift is a normal number."""
    return (lift - 0.01 - _MIN_EXPONENT[bits]) * math.log(2.0)


def _split(v: _Value) -> tuple[_Value, _Value]:
    """Return k and x, v = 2^k x with x in [sqrt(1/2), sqrt(2)) if v > 0; else just finite numbers."""
    bits, mantissa = v.bits, _MANTISSA[v.bits]
    least = 1 << mantissa  # the smallest normal number, as an integer
    tiny = v.as_bits().compare("<", least)
    # the bits of a subnormal number count its units: as the low bits of 2^mantissa they become a number
    unit = v.of(2.0**mantissa)
    v = tiny.select((v.as_bits() | unit.as_bits()).as_real() - unit, v)
    b = v.as_bits() + (_ONE[bits] - _SQRT_HALF[bits])
    k = ((b >> mantissa) | unit.as_bits()).as_real()
    normal, subnormal = _BIAS[bits], _BIAS[bits] + _BIAS[bits] + mantissa - 1
    k = k - tiny.select(v.of(2.0**mantissa + subnormal), 2.0**mantissa + normal)
    return k, ((b & (least - 1)) + _SQRT_HALF[bits]).as_real()


def _log_of_fraction(f: _Value) -> _Value:
    """log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]."""
    square = f * f
    if f.bits == 32:
        return f + _fma(square * f, _polynomial(_LOG_TAIL, f), square * -0.5)
    # 2 atanh(q), as `numba._log1p`, which the coefficients are from
    half, q = square * 0.5, f / (f + 2.0)
    z = q * q
    return f - (half - q * (half + _polynomial(_LOG1P, z) * z))


class _Base:
    """The logarithm of 2 in two parts, of which the first has few digits, and of e, to some base."""

    def __init__(self, of_2: Any, low_of_2: Any, of_e: Any) -> None:
        self.of_2, self.low_of_2, self.of_e = of_2, low_of_2, of_e


def _base_e(bits: int) -> _Base:
    return _Base(_LN2_HI[bits], _LN2_LO[bits], 1.0)


def _joined(k: _Value, f: _Value, base: _Base) -> _Value:
    """Return the logarithm of 2^k (1 + f); exact for f = 0 and base 2."""
    return _fma(k, base.of_2, _fma(k, base.low_of_2, _log_of_fraction(f) * base.of_e))


def _log(v: _Value, base: _Base) -> _Value:
    """Return the logarithm of positive numbers; of others just a finite number."""
    k, x = _split(v)
    return _joined(k, x - 1.0, base)


# ---- What a kernel is given ----


def _job(integers: tuple[str, ...], reals: tuple[str, ...]) -> np.dtype[Any]:
    return np.dtype([(name, np.int64) for name in integers] + [(name, np.float64) for name in reals])


# Addresses, steps in elements, and numbers, one word each.
_OF_ELEMENTS = _job(
    (
        *("x", "targets", "losses", "losses_step", "weight", "weight_step", "pos_weight", "pos_step"),
        *("scale", "scale_step", "grad", "sums", "out", "n"),
    ),
    ("unit", "floor", "grad_unit", "grad_floor", "of_2", "low_of_2", "of_e"),
)
_OF_ROWS = _job(
    (
        *("x", "x_outer", "x_inner", "x_class", "y", "y_outer", "y_inner", "y_class"),
        *("inner", "first_row", "n_rows", "n_classes", "item_rows", "out"),
        *("scratch", "scratch_size", "rows"),
    ),
    ("of_2", "low_of_2", "of_e", "agree"),
)


def _field(job: _Value, of: np.dtype[Any], name: str) -> _Value:
    """Load a number of a job; it does not change, so that LLVM may load it once before a loop."""
    b = job.builder
    kind = ir.DoubleType() if of[name] == np.float64 else ir.IntType(64)
    index = (of.names or ()).index(name)
    words = b.bitcast(job.value, kind.as_pointer())
    load = b.load(b.gep(words, [ir.IntType(64)(index)]), align=8)
    load.set_metadata("invariant.load", b.module.add_metadata([]))
    return _Value(b, load)


def _array(job: _Value, name: str, dtype: types.Type) -> _Pointer:
    """Return an array of elements."""
    b = job.builder
    memory = (
        ir.IntType(16)
        if dtype in _HALVES
        else ir.FloatType()
        if dtype == types.float32
        else ir.DoubleType()
    )
    return _Pointer(b, b.inttoptr(_field(job, _OF_ELEMENTS, name).value, memory.as_pointer()), dtype)


# ---- Binary cross-entropy ----

# Noted of a row while it is read: three sums, each with its carry. Or two, how p and q differ, what
# their exponentials are relative to and, less 1, add up to; and whether the sums are to be taken.
_TERMS, _SLOPES, _SHIFT, _LOW, _FACTOR, _P_REF, _P_REST, _Q_REF, _Q_REST, _AGAIN = 0, 2, *range(4, 12)
_SUMS = 12
_STRIP = 4  # vectors whose losses are added up before they are added to a sum
_TOGETHER = 1  # of which so many are worked on as one value


class _Some:
    """Neighbouring elements of several arrays: so many, or those of a vector where a mask is true."""

    def __init__(self, first: _Value, lanes: int, mask: _Value | None) -> None:
        self.first, self.lanes, self.mask = first, lanes, mask

    def load(self, pointer: Any, step: Any = 1) -> _Value:
        """Load them; with a step of 0 all vectors are the first one."""
        if self.mask is None:
            return pointer.load(self.first * step, self.lanes)
        return pointer.load_where(self.mask, self.first * step, 0.0)

    def store(self, pointer: Any, value: _Value, step: Any = 1) -> None:
        if self.mask is None:
            pointer.store(self.first * step, value)
        else:
            pointer.store_where(self.mask, self.first * step, value)

    def count(self, found: _Value) -> _Value:
        """How many of these elements are found."""
        if self.mask is not None:
            found = found & self.mask
        bits = _Value(found.builder, found.builder.bitcast(found.value, ir.IntType(self.lanes)))
        return bits.call("ctpop").as_type("zext", ir.IntType(64))


def _or_zero(keep: _Value, value: _Value) -> _Value:
    return keep.select(value, 0.0)


def _shares(t: _Value, pos_weight: _Value | None) -> tuple[_Value, _Value]:
    """Return A and B, the weights of the losses of the classes 1 and 0."""
    return (t if pos_weight is None else t * pos_weight), 1.0 - t


def _from_logits(x: _Value, lift: int, floor: Any) -> tuple[_Value, ...]:
    """Return |x|; log1p(e) and e = exp(-|x|), times 2^lift, or 0 for |x| > floor; and 1 + e."""
    size = x.call("fabs")
    e = _decay(size, lift, floor)
    # what makes no difference to 1 + e is replaced by what is no subnormal number
    least = 2.0 ** (lift - 62)
    plain = e.compare(">", least).select(e, least) * 2.0**-lift
    return size, e * _polynomial(_LOG1P_OF_DECAY[x.bits], plain), e, plain + 1.0


def _times(share: _Value, loss: _Value) -> _Value:
    """Return the product; 0 for a share of 0 even if the loss is infinite."""
    return _or_zero(share.compare("!=", 0.0, or_nan=True), share * loss)


def _binary_plain(
    x: _Value, t: _Value, unit: _Value, floor: _Value, slope_unit: _Value | None, slope_floor: _Value
) -> tuple[_Value, _Value | None]:
    """Losses and gradients without weights, in units in which no product is below normal numbers."""
    bits = x.bits
    a, b = _shares(t, None)
    floor = floor.rounded(bits)
    size, loss, e, total = _from_logits(x, _LIFT, floor if slope_unit is None else _lowest(bits, _LIFT))
    positive = x.compare(">", 0.0)
    gap = _times(positive.select(b, a) * unit.rounded(bits), size)
    low = (unit * 2.0**-_LIFT).rounded(bits)
    if slope_unit is None:
        return _fma(loss, low, gap), None
    loss = _fma(_or_zero(size.compare("<=", floor, or_nan=True), loss), low, gap)
    e = _or_zero(size.compare("<=", slope_floor.rounded(bits), or_nan=True), e)
    near, far = positive.select(b, -a), positive.select(-a, b)
    low = (slope_unit * 2.0**-_LIFT).rounded(bits)
    return loss, _fma(far * low, e, near * slope_unit.rounded(bits)) / total


def _binary_weighted(
    x: _Value, t: _Value, pos_weight: _Value, with_grad: bool
) -> tuple[_Value, _Value | None]:
    """Losses and gradients as doubles, without weights but that of the class 1."""
    lift = _LIFT_WEIGHTED[x.bits]
    a, b = _shares(t.double(), pos_weight.double())
    size, loss, e, total = _from_logits(x, lift, _lowest(x.bits, lift))
    positive = x.compare(">", 0.0)
    gap = _times(positive.select(b, a), size.double())
    loss = _fma((a + b) * 2.0**-lift, loss.double(), gap)
    if not with_grad:
        return loss, None
    near, far = positive.select(b, -a), positive.select(-a, b)
    return loss, _fma(far * 2.0**-lift, e.double(), near) * (1.0 / total).double()


def _binary_of_probs(
    p: _Value, t: _Value, pos_weight: _Value, with_grad: bool
) -> tuple[_Value, _Value | None]:
    """Do the same for probabilities."""
    a, b = _shares(t.double(), pos_weight.double())
    base = _base_e(p.bits)
    k, rest = _split(1.0 - p)
    # 1 - p is rounded where p < 1/2; this is not
    f = k.compare("==", 0.0).select(-p, rest - 1.0)
    f = k.compare("==", -1.0).select(1.0 - (p + p), f)
    ahead, behind = -_ends(p, _log(p, base), base), -_ends(1.0 - p, _joined(k, f, base), base)
    loss = _times(a, ahead.double()) + _times(b, behind.double())
    p = p.double()
    loss = p.compare("ord", p).select(loss, p)
    if not with_grad:
        return loss, None
    slope = _or_zero(b.compare("!=", 0.0), b / (1.0 - p)) - _or_zero(a.compare("!=", 0.0), a / p)
    return loss, p.compare("ord", p).select(slope, p)


def _ends(v: _Value, log: _Value, base: _Base) -> _Value:
    """Correct the logarithm of what is no positive finite number; its sign is the base's."""
    log = v.compare("==", 0.0).select(v.of(base.of_e) * -math.inf, log)
    log = v.compare("<", 0.0).select(math.nan, log)
    return v.compare("<", math.inf).select(log, v * base.of_e)


@_emits(_several(_doubles, _doubles, types.int64))
def _add_binary(x, losses, job, i, left, from_logits, weighted, with_grad, total, carry, bad):
    """Write losses and gradients of a strip, or of the ``left`` elements after the last strip.

    Add the losses to a sum, and count bad elements.
    """
    bits, together = _bits_of(x), _TOGETHER if left is None else 1
    mask = None if left is None else _first(x, left)
    number = functools.partial(_field, job, _OF_ELEMENTS)
    array = functools.partial(_array, job)
    unit, floor, grad_unit = number("unit"), number("floor"), number("grad_unit")
    real = _computed(x.dtype)
    summands = []
    if left is None:
        x.fetch_ahead(i, _STRIP)
        array("targets", x.dtype).fetch_ahead(i, _STRIP)
    for k in range(0, _STRIP if left is None else 1, together):
        some = _Some(i + k * x.lanes, together * x.lanes, mask)
        v, t = some.load(x), some.load(array("targets", x.dtype))
        wrong = t.compare("<", 0.0, or_nan=True) | t.compare(">", 1.0)
        if weighted is None:
            loss, slope = _binary_plain(
                v, t, unit, floor, with_grad and grad_unit, number("grad_floor")
            )
        else:
            w = some.load(array("weight", real), number("weight_step"))
            p = some.load(array("pos_weight", real), number("pos_step"))
            if from_logits is None:
                wrong = wrong | v.compare("<", 0.0) | v.compare(">", 1.0)
                loss, slope = _binary_of_probs(v, t, p, with_grad is not None)
            else:
                loss, slope = _binary_weighted(v, t, p, with_grad is not None)
            counts = w.compare("!=", 0.0, or_nan=True)
            wrong = wrong & counts
            loss = _or_zero(counts, loss * (w.double() * unit))
            if slope is not None:
                s = some.load(array("scale", real), number("scale_step"))
                counts = counts & s.compare("!=", 0.0, or_nan=True)
                slope = _or_zero(counts, slope * (s.double() * grad_unit))
        loss = loss.rounded(bits)
        some.store(losses, loss, number("losses_step"))
        if slope is not None:
            some.store(array("grad", x.dtype), slope)
        summands.append(loss.double() if mask is None else _or_zero(mask, loss.double()))
        bad = bad + some.count(wrong)
    return *_added(total, carry, summands, bits), bad


def _added(total: _Value, carry: _Value, summands: list[_Value], bits: int) -> tuple[_Value, _Value]:
    """Add vectors of doubles to a compensated sum of one vector.

    Those that were float32 are added up first, first half to second half: with 29 bits to spare, that
    loses something only beside what is 2^29 times larger, and then no more than the rounding of the
    pair's sum.
    """
    lanes = total.lanes
    parts = [_Value(v.builder, v.value) for v in summands]
    while parts[0].lanes > lanes:
        parts = [half for part in parts for half in part.halves()]
    while bits == 32 and len(parts) > 1:
        half = len(parts) // 2
        parts = [a + b for a, b in zip(parts[:half], parts[half:], strict=True)]
    for part in parts:
        total, error = _two_sum(total, part)
        carry = carry + error
    return total, carry


@njit(**_INNER)
def _binary_tile(x_type, job, item, worker, from_logits, weighted, with_grad):
    first = item * BINARY_TILE
    end = min(first + BINARY_TILE, job.n)
    x, losses = _pointer_like(job.x, x_type), _reals_like(job.losses, x_type)
    if job.losses_step == 0:
        losses = _reals_like(job.losses + 8 * _SINK_WORDS * worker, x_type)
    lanes = _lanes(x)
    total, carry, bad = _splat_double(x, 0.0), _splat_double(x, 0.0), 0
    strips = end - (end - first) % (_STRIP * lanes)
    for i in range(first, strips, _STRIP * lanes):
        total, carry, bad = _add_binary(
            x, losses, job, i, None, from_logits, weighted, with_grad, total, carry, bad
        )
    for i in range(strips, end, lanes):
        total, carry, bad = _add_binary(
            x, losses, job, i, end - i, from_logits, weighted, with_grad, total, carry, bad
        )
    s, c = _sum_lanes(total, carry)
    s, c = _two_sum_of(s, c if abs(s) < np.inf else 0.0)
    sums = _float64s(job.sums, x_type)
    sums[2 * item] = s
    sums[2 * item + 1] = c if abs(s) < np.inf else 0.0
    return bad


# ---- Information, and measures of rows ----


def _base_of(job: _Value, of: np.dtype[Any], bits: int) -> _Base:
    return _Base(*(_field(job, of, name).rounded(bits) for name in ("of_2", "low_of_2", "of_e")))


@_emits(types.int64)
def _write_information(p, out, job, i, left):
    """Write -log p of a vector, or of the ``left`` elements after the last one; count bad elements."""
    some = _Some(i, p.lanes, None if left is None else _first(p, left))
    v = some.load(p)
    base = _base_of(job, _OF_ELEMENTS, _bits_of(p))
    log = _ends(v, _log(v, base), base)
    some.store(out, 0.0 - log)  # not -0
    return some.count(v.compare("<", 0.0, or_nan=True))


@njit(**_INNER)
def _information_tile(x_type, job, item):
    first = item * BINARY_TILE
    end = min(first + BINARY_TILE, job.n)
    p, out = _pointer_like(job.x, x_type), _reals_like(job.out, x_type)
    bad, lanes = 0, _lanes(p)
    whole = end - (end - first) % lanes
    for i in range(first, whole, lanes):
        bad += _write_information(p, out, job, i, None)
    if whole < end:
        bad += _write_information(p, out, job, whole, end - whole)
    return bad


def _add_term(
    total: _Value, carry: _Value, x: _Value, y: _Value | float = 1.0
) -> tuple[_Value, _Value]:
    """Add x * y to a sum of as many lanes or fewer; that of float32's products, exact, has no carry."""
    factors = y.parts(total.lanes) if isinstance(y, _Value) else itertools.repeat(y)
    for a, b in zip(x.parts(total.lanes), factors, strict=False):
        if x.bits == 32:
            total = _fma(a.double(), b.double() if isinstance(b, _Value) else b, total)
        else:
            total, error = _two_sum(total, a * b)
            carry = carry + error
    return total, carry


def _kl_term(p: _Value, q: _Value) -> _Value:
    """P log(p/q) - p + q as a double; a number or +inf if p and q are not negative.

    With s = (p - q) / (p + q), log(p/q) is 2 atanh(s) = 2 s (1 + z A(z)), z = s^2, and the whole
    (p - q) (s + (s + z) s A). So to a ratio of 3; beyond, where log(p/q) is no longer nearly 1 - q/p,
    it is p (log(p/q) - 1) + q, the logarithm from numbers without their exponents.
    """
    bits, mantissa = p.bits, _MANTISSA[p.bits]
    (i, x), (j, y) = _split(p), _split(q)
    more = p - q  # exact where it matters, and like all sums no slower for subnormal numbers
    near = more.compare("<=", q + q) & more.compare(">=", -(p + p))
    k = i - j
    power = (((1.5 * 2.0**mantissa + _BIAS[bits]) - k).as_bits() << mantissa).as_real()
    y = y * near.select(power, 1.0)
    s = (x - y) / (x + y)
    z = s * s
    tail = _polynomial(_ATANH_TAIL[bits], z)
    twice = s + s
    log = _fma(k, _LN2_HI[bits], twice + _fma(twice * z, tail, k * float.fromhex(_LN2_LO[bits])))
    log = q.compare(">", 0.0).select(log, math.inf)
    factor = near.select(_fma(_fma(s, s, s) * tail, s, s), log - 1.0).double()
    p, q = p.double(), q.double()
    return _fma(near.select(p - q, p), factor, near.select(0.0, q))


def _class_additions(count: int) -> Any:
    """Make the step that adds ``count`` vectors, or ``left`` classes, to a measure's sums."""

    @_emits(_several(*[_doubles] * 6))
    def add(p, q, kl, job, i, left, total, carry, p_total, p_carry, q_total, q_carry):
        """Add to the sums of a measure, and for the divergence of p and of q.

        Without q it is the entropy, without ``kl`` the cross-entropy. Invalid numbers make the sum NaN.
        """
        some = _Some(i, count * p.lanes, None if left is None else _first(p, left))
        for pointer in (p, q) if count > 1 else ():
            if pointer:
                pointer.fetch_ahead(i, count)
        base = _base_of(job, _OF_ROWS, _bits_of(p))
        a = some.load(p)
        valid = a.compare(">=", 0.0)
        if q is None:
            # 0 times the logarithm of 0, which is finite here, is 0
            total, carry = _add_term(total, carry, a, -valid.select(_log(a, base), math.nan))
            return total, carry, p_total, p_carry, q_total, q_carry
        b = some.load(q)
        valid = valid & b.compare(">=", 0.0)
        if kl is None:
            log = a.compare(">", 0.0).select(_ends(b, _log(b, base), base), 0.0)
            total, carry = _add_term(total, carry, a, -valid.select(log, math.nan))
            return total, carry, p_total, p_carry, q_total, q_carry
        for term in valid.select(_kl_term(a, b), math.nan).parts(total.lanes):
            total, carry = (total + term, carry) if a.bits == 32 else _add_term(total, carry, term)
        p_total, p_carry = _add_term(p_total, p_carry, a)
        q_total, q_carry = _add_term(q_total, q_carry, b)
        return total, carry, p_total, p_carry, q_total, q_carry

    return add


_add_classes, _add_classes4 = map(_class_additions, (1, 4))


@_emits(_same)
def _measure_of(total, carry, p_total, p_carry, q_total, q_carry, kl, job):
    total = total + _where_finite(total, carry)
    if kl is None:
        return total
    p, q = p_total + p_carry, q_total + q_carry
    excess = (p_total - q_total) + (p_carry - q_carry)
    agree, of_e = _field(job, _OF_ROWS, "agree"), _field(job, _OF_ROWS, "of_e")
    same = excess.call("fabs").compare("<=", p.compare(">", q).select(p, q) * agree)
    return (total + same.select(0.0, excess)) * of_e


def _where_finite(total: _Value, carry: _Value) -> _Value:
    return total.call("fabs").compare("<", math.inf).select(carry, 0.0)


@_emits(types.int64)
def _count_nans(v, n):
    """How many of the first n lanes are NaN."""
    return _Some(n, v.lanes, _first(v, n)).count(v.compare("uno", v))


@njit(**_INNER)
def _is_invalid(p, p_step, q, q_step, n):
    for j in range(n):
        if not (_get(p, j * p_step) >= 0.0 and _get(q, j * q_step) >= 0.0):
            return 1
    return 0


@njit(**_INNER)
def _add_lanes(sums, i, total, carry):
    s, c = _sum_lanes(total, carry)
    sums[i], error = _two_sum_of(sums[i], s)
    sums[i + 1] += c + error


@njit(**_INNER)
def _sum_classes(p, q, kl, n, job, sums):
    """Add n classes to a row's sums."""
    lanes = _lanes(p)
    zero = _splat_double(p, 0.0)
    t, c, p_t, p_c, q_t, q_c = zero, zero, zero, zero, zero, zero
    whole = n - n % lanes
    strips = whole - whole % (4 * lanes)
    for i in range(0, strips, 4 * lanes):
        t, c, p_t, p_c, q_t, q_c = _add_classes4(p, q, kl, job, i, None, t, c, p_t, p_c, q_t, q_c)
    for i in range(strips, whole, lanes):
        t, c, p_t, p_c, q_t, q_c = _add_classes(p, q, kl, job, i, None, t, c, p_t, p_c, q_t, q_c)
    if whole < n:
        t, c, p_t, p_c, q_t, q_c = _add_classes(
            p, q, kl, job, whole, n - whole, t, c, p_t, p_c, q_t, q_c
        )
    _add_lanes(sums, 0, t, c)
    if kl is not None:
        _add_lanes(sums, 2, p_t, p_c)
        _add_lanes(sums, 4, q_t, q_c)


@njit(**_INNER)
def _classes(x, direct, start, row_step, class_step, count, n, block):
    """Return where n classes of rows lie side by side, rows _PITCH apart: in ``block``, or here."""
    if direct:  # and one row
        return _at(x, start)
    _fetch(_at(x, start * class_step), row_step, class_step, count, n, block, _PITCH)
    return block


@njit(**_INNER)
def _measure_rows(x_type, job, item, worker, with_q, kl):
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    n, row, bad, direct = job.n_classes, first, 0, job.rows == 1
    out = _reals_like(job.out, x_type)
    scratch = job.scratch + 8 * worker * job.scratch_size
    sums = _float64s(scratch, x_type)
    p_block = _pointer_like(scratch + 8 * job.rows * _SUMS, x_type)
    q_block = _at(p_block, job.rows * _PITCH)
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = min(job.rows, last - row, job.inner - inner)
        p = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        q = _pointer_like(job.y + _size(x_type, outer * job.y_outer + inner * job.y_inner), x_type)
        for i in range(count * _SUMS):
            sums[i] = 0.0
        for start in range(0, n, _BLOCK):
            size = min(_BLOCK, n - start)
            a = _classes(p, direct, start, job.x_inner, job.x_class, count, size, p_block)
            if with_q is None:
                for r in range(count):
                    _sum_classes(_at(a, r * _PITCH), None, None, size, job, _at(sums, r * _SUMS))
            else:
                b = _classes(q, direct, start, job.y_inner, job.y_class, count, size, q_block)
                for r in range(count):
                    at = r * _PITCH
                    _sum_classes(_at(a, at), _at(b, at), kl, size, job, _at(sums, r * _SUMS))
        for r in range(count):
            s = _at(sums, r * _SUMS)
            value = _measure_of(s[0], s[1], s[2], s[3], s[4], s[5], kl, job)
            _set(out, row + r, value)
            if value != value:
                a, b = _at(p, r * job.x_inner), _at(q, r * job.y_inner)
                bad += _is_invalid(a, job.x_class, b, job.y_class, n)
        row += count
    return bad


@njit(**_INNER)
def _narrow_measure_rows(x_type, job, item, worker, with_q, kl):
    """Rows of few classes: lanes are rows."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    n, row, bad, lanes = job.n_classes, first, 0, _lanes(x_type)
    out = _reals_like(job.out, x_type)
    p_work = _reals_like(job.scratch + 8 * worker * job.scratch_size, x_type)
    q_work = _at(p_work, _NARROW * lanes)
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = min(lanes, last - row, job.inner - inner)
        p = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        q = _pointer_like(job.y + _size(x_type, outer * job.y_outer + inner * job.y_inner), x_type)
        _fetch_lanes(p, job.x_inner, job.x_class, count, n, p_work)
        zero = _splat_double(p, 0.0)
        t, c, p_t, p_c, q_t, q_c = zero, zero, zero, zero, zero, zero
        if with_q is None:
            for i in range(0, n * lanes, lanes):
                t, c, p_t, p_c, q_t, q_c = _add_classes(
                    p_work, None, None, job, i, None, t, c, p_t, p_c, q_t, q_c,
                )  # fmt: skip
        else:
            _fetch_lanes(q, job.y_inner, job.y_class, count, n, q_work)
            for i in range(0, n * lanes, lanes):
                t, c, p_t, p_c, q_t, q_c = _add_classes(
                    p_work, q_work, kl, job, i, None, t, c, p_t, p_c, q_t, q_c,
                )  # fmt: skip
        value = _measure_of(t, c, p_t, p_c, q_t, q_c, kl, job)
        _store_where(out, _first_lanes(p, count), row, value)
        if _count_nans(value, count) != 0:
            for r in range(count):
                a, b = _at(p, r * job.x_inner), _at(q, r * job.y_inner)
                bad += _is_invalid(a, job.x_class, b, job.y_class, n)
        row += count
    return bad


# ---- Kullback-Leibler divergence of softmaxes ----


class _Pair(NamedTuple):
    """What the terms of two rows are made of: d = log p - log q is x - y - (shift + low).

    p are x's exponentials as they are, and q those of y times the factor.
    """

    shift: Any
    low: Any
    factor: Any


class _Divergence(NamedTuple):
    """Sums of p (exp(-d) - 1 + d), which is q + p (d - 1), and of p d."""

    terms: Any
    terms_carry: Any
    slopes: Any
    slopes_carry: Any


@_emits(lambda x, m, *_: types.BaseTuple.from_types([m] * 3, _Pair))
def _pair_of(x, p_ref, p_rest, q_ref, q_rest):
    """Return the shift, rounded and the rest, and the factor for two rows' sums, all doubles."""
    gap, error = _two_sum(p_ref, -q_ref)
    larger = p_rest.compare(">", q_rest)
    top, least = larger.select(p_rest, q_rest), larger.select(q_rest, p_rest)
    log = _log1p((top - least) / (least + 1.0), 64)  # nearer than the difference of two logarithms
    high, more = _two_sum(gap, larger.select(log, -log))
    rounded = high.rounded(_bits_of(x)).double()
    factor = (p_rest + 1.0) / (q_rest + 1.0)
    return _Pair(rounded, (high - rounded) + (error + more), factor)


@_emits(_named(_Pair, _vector, _vector, _vector))
def _as_lanes(x, pair):
    bits = _bits_of(x)
    return _Pair(*(v if v.lanes else v.splat(x.lanes) for v in (v.rounded(bits) for v in pair)))


@_emits(lambda x, pair, *_: pair)
def _recentred(x, pair, again, off):
    """Correct the shift of a row whose sum of q is 1 + ``off`` times that of p."""
    bits = _bits_of(x)
    more = pair.low - off
    rounded = (pair.shift + more).rounded(bits).double()
    low = (pair.shift - rounded) + more
    return _Pair(again.select(rounded, pair.shift), again.select(low, pair.low), pair.factor)


@_emits(types.float64)
def _terms_unit(x):
    return _Value(x.builder, ir.DoubleType()(_unit_of_terms(_bits_of(x))))


@_emits(types.boolean)
def _is_near(x, low, ref):
    """Whether no exponential is small where this is the least logit."""
    return low.compare(">=", ref + _SUM_FLOOR[_bits_of(x)] / 2)


@_emits(types.boolean)
def _any(v):
    if not v.lanes:
        return v
    bits = _Value(v.builder, v.builder.bitcast(v.value, ir.IntType(v.lanes)))
    return bits.compare("!=", 0)


def _unit_of_terms(bits: int) -> float:
    """Of sums of what `_weights` makes of exponentials."""
    return 2.0 ** -_SUM_SHIFT[32] if bits == 32 else 1.0


def _weights(p: _Value) -> _Value:
    """Scale exponentials of float64 so that no product overflows; what would be subnormal becomes 0."""
    if p.bits == 32:
        return p
    least = 2.0 ** (_SUM_SHIFT[64] + _MIN_EXPONENT[64])
    return _or_zero(p.compare(">=", least), p) * 2.0 ** -_SUM_SHIFT[64]


# What counts in the terms of two rows: nothing that is rounded, and no term is so small against the sum
# that q + p (d - 1) may not cancel; not that x - y is rounded; that too.
_APART, _PLAIN, _CLOSE = range(3)


def _log_ratio(x: _Value, y: _Value, pair: _Pair, care: int, wild: bool) -> _Value:
    """Return d, in which most digits may cancel.

    If ``wild``, there may be infinite ones, but d of classes that p has not is a number.
    """
    s = x - y
    d = s - pair.shift
    if care != _CLOSE:
        return d
    y1 = x - s
    rest = ((x - (s + y1)) - (y - y1)) - pair.low
    least = rest.of(-(2.0**100))
    # a NaN, which there is beside an infinite d, becomes a number
    return _larger(d + _larger(rest, least), least) if wild else d + rest


def _divergences(count: int, care: int = _CLOSE, wild: bool = False) -> Any:
    """Make the step that adds ``count`` vectors of classes, or with ``left`` so many classes, to sums.

    e and f hold the exponentials. Unless ``wild``, no logit is far below the maximum, or infinite: then
    products of float32 may be float32. A class that p has not has the term q. One that q has not makes
    the sum inf, or NaN if p is 0.
    """

    @_emits(lambda *args: args[-1])
    def add(x, y, e, f, i, left, pair, sums):
        bits, terms, slopes = _bits_of(x), [], []
        for pointer in (x, y) if count > 1 else ():  # 0.8 of the time out of L2
            pointer.fetch_ahead(i, count)
        for k in range(count):
            some = _Some(i + k * x.lanes, x.lanes, None if left is None else _first(x, left))
            d = _log_ratio(some.load(x), some.load(y), pair, care, wild)
            p, q = _weights(some.load(e)), _weights(some.load(f))
            if care == _APART:
                slopes.append(p * d)
                terms.append(_fma(q, pair.factor, slopes[-1] - p))
                continue
            near = d.compare(">", -2.0) & d.compare("<", 1.0)
            factor = near.select(d * d * _polynomial(_EXCESS[bits], d), d - 1.0)
            q = near.select(0.0, q)
            if wild and bits == 32:
                far = _add_term(sums.terms, sums.terms_carry, q, pair.factor)
                if sums.slopes.bits == 32:  # of few classes: 0.95 of the time
                    mean = _fma(p, d, sums.slopes), sums.slopes_carry
                else:
                    mean = _add_term(sums.slopes, sums.slopes_carry, p, d)
                sums = _Divergence(*_add_term(*far, p, factor), *mean)
            else:
                terms.append(_fma(p, factor, q * pair.factor))
                slopes.append(p * d)
        if not terms:
            return sums
        return _Divergence(
            *_add_term(sums.terms, sums.terms_carry, _folded(terms, x.lanes)),
            *_add_term(sums.slopes, sums.slopes_carry, _folded(slopes, x.lanes)),
        )

    return add


_add_apart, _add_plain, _add_close = (_divergences(4, care) for care in (_APART, _PLAIN, _CLOSE))
_add_wild = _divergences(4, wild=True)
_add_one_close, _add_one_wild = _divergences(1), _divergences(1, wild=True)


def _truth_of(number: types.Type) -> types.Type:
    return _Vector(types.boolean, number.lanes) if isinstance(number, _Vector) else types.boolean


@_emits(lambda x, p_m, p_rest, *_: types.Tuple([p_rest, p_rest, _truth_of(p_rest)]))
def _divergence_of(x, p_m, p_rest, q_m, q_rest, sums):
    """Return a divergence from its sums; by what its sums differ; whether to take them again.

    Were the shift exact, terms less slopes, which is the sum of q - p, would be 0. A small error of the
    shift leaves that, and has added half its square. That is subtracted; where it is not small against
    the terms, because the rows are closer than their sums are accurate, the shift is corrected first.
    """
    unit = _unit_of_terms(_bits_of(x)) / (p_rest + 1.0)
    total = (sums.terms + _where_finite(sums.terms, sums.terms_carry)) * unit
    off = ((sums.terms - sums.slopes.double()) + (sums.terms_carry - sums.slopes_carry)) * unit
    excess = off * off * 0.5
    # else it is what large slopes have rounded
    excess = excess.compare("<", 2.0**-24).select(excess, 0.0)
    value = total - excess
    value = value.compare(">", 0.0, or_nan=True).select(value, 0.0)
    # NaN: q has not a class that p has
    value = value.compare("ord", value).select(value, math.inf)
    for m, rest in (p_m, p_rest), (q_m, q_rest):
        finite = m.compare(">", -math.inf) & m.compare("<", math.inf) & rest.compare("ord", rest)
        value = finite.select(value, math.nan)
    again = excess.compare(">", total * 0.0625) & value.compare("<", math.inf)
    return value, off, again


@_emits(lambda x, sums, *_: sums)
def _moved(x, sums, drop, by, p, q):
    """Return what a row's sums would be with a shift larger by ``by``, and exponentials times ``drop``.

    p and q are the sums of these, the latter as the larger shift would have it: exp(by) times that of
    q so far. The slopes lose by p, and the terms gain (Q - p) (exp(by) - 1) + p (exp(by) - 1 - by), Q
    being that sum so far. Where ``by`` is large nothing cancels in q - p + slopes.
    """
    unit = _unit_of_terms(_bits_of(x))
    p, q = p * (1.0 / unit), q * (1.0 / unit)
    terms, terms_carry, slopes, slopes_carry = (v * drop for v in sums)
    near = by.call("fabs").compare("<=", 1.0) & p.compare(">", 0.0)
    excess = by * by * _polynomial(_EXCESS[64], -by)
    more = (terms - slopes) + (terms_carry - slopes_carry)
    slopes, error = _two_sum(slopes, -by * p)
    slopes_carry = slopes_carry + error
    gained, error = _two_sum(terms, _fma(more, by + excess, p * excess))
    far, rest = _two_sum(q, -p)
    far, other = _two_sum(far, slopes)
    rest = rest + other + slopes_carry
    terms, terms_carry = near.select(gained, far), near.select(terms_carry + error, rest)
    return _Divergence(terms, terms_carry, slopes, slopes_carry)


@njit(**_INNER)
def _sum_divergence(x, y, e, f, n, s, care, tame):
    """Add n classes of a row to its sums; e and f hold their exponentials."""
    lanes, zero = _lanes(x), _splat_double(x, 0.0)
    pair = _as_lanes(x, _Pair(s[_SHIFT], s[_LOW], s[_FACTOR]))
    sums = _Divergence(zero, zero, zero, zero)
    whole, strips = n - n % lanes, n - n % (4 * lanes)
    if tame:
        if care == _APART:
            for i in range(0, strips, 4 * lanes):
                sums = _add_apart(x, y, e, f, i, None, pair, sums)
        elif care == _PLAIN:
            for i in range(0, strips, 4 * lanes):
                sums = _add_plain(x, y, e, f, i, None, pair, sums)
        else:
            for i in range(0, strips, 4 * lanes):
                sums = _add_close(x, y, e, f, i, None, pair, sums)
        for i in range(strips, whole, lanes):
            sums = _add_one_close(x, y, e, f, i, None, pair, sums)
        if whole < n:
            sums = _add_one_close(x, y, e, f, whole, n - whole, pair, sums)
    else:
        for i in range(0, strips, 4 * lanes):
            sums = _add_wild(x, y, e, f, i, None, pair, sums)
        for i in range(strips, whole, lanes):
            sums = _add_one_wild(x, y, e, f, i, None, pair, sums)
        if whole < n:
            sums = _add_one_wild(x, y, e, f, whole, n - whole, pair, sums)
    total, carry = _sum_of_terms(sums.terms, sums.terms_carry)
    _add_to(s, _TERMS, total, carry)
    total, carry = _sum_of_terms(sums.slopes, sums.slopes_carry)
    _add_to(s, _SLOPES, total, carry)


@njit(**_INNER)
def _rest_of(x, state):
    """Return the sum of a row's exponentials so far, relative to its reference, less 1."""
    if not state[_M] > -np.inf:
        return -1.0
    lead, _ = _scale_sum(state[_TIES], 0.0, state[_M], state[_REF])
    return (state[_TOTAL] + state[_CARRY]) * _sum_unit(x) + (lead - 1.0)


@njit(**_INNER)
def _move(x, s, p_ref, p_rest, q_ref, q_rest):
    """Let a row's shift be that of these sums, and its own sums what they then would have been."""
    pair = _pair_of(x, p_ref, p_rest, q_ref, q_rest)
    if p_rest < 0.0 or q_rest < 0.0:  # all is -inf so far: no shift, and no q
        pair = _Pair(0.0, 0.0, 0.0)
    by = (pair.shift - s[_SHIFT]) + (pair.low - s[_LOW])
    s[_SHIFT], s[_LOW], s[_FACTOR] = pair.shift, pair.low, pair.factor
    if s[_TERMS] < np.inf and (s[_P_REST] >= 0.0 or s[_Q_REST] >= 0.0):
        drop, p, q = 1.0, 0.0, 0.0
        if s[_P_REST] >= 0.0:
            drop, _ = _scale_sum(1.0, 0.0, s[_P_REF], p_ref)
            p = (s[_P_REST] + 1.0) * drop
        if s[_Q_REST] >= 0.0:
            q, _ = _scale_sum(s[_Q_REST] + 1.0, 0.0, s[_Q_REF], q_ref)
        sums = _Divergence(s[_TERMS], s[_TERMS + 1], s[_SLOPES], s[_SLOPES + 1])
        sums = _moved(x, sums, drop, by, p, q * pair.factor)
        s[_TERMS], s[_TERMS + 1], s[_SLOPES], s[_SLOPES + 1] = sums


@njit(**_INNER)
def _follow(x, s, p_state, q_state):
    """Move a row's shift if what has been read calls for another; return what care its terms need.

    It does where the error of the shift would add to the divergence.
    """
    p_ref, q_ref = p_state[_REF], q_state[_REF]
    p_rest, q_rest = _rest_of(x, p_state), _rest_of(x, q_state)
    p = p_rest + 1.0
    found, error = s[_TERMS] * _terms_unit(x), (q_rest + 1.0) * s[_FACTOR] - p
    care = _CLOSE
    # x - y rounds by no more than its own rounding where it is as large as the shift, as most are then:
    # 0.97 of the time; of divergences above 1/2 the other roundings are a few ULP at most: 0.8 to 0.9
    if s[_SHIFT] * s[_SHIFT] * p <= found:
        care = _APART if found >= 0.5 * p else _PLAIN
    known = s[_P_REST] >= 0.0 and s[_Q_REST] >= 0.0 and s[_P_REF] == p_ref and s[_Q_REF] == q_ref
    if not known or error * error > found * p * 0.0625:
        _move(x, s, p_ref, p_rest, q_ref, q_rest)
        care = _CLOSE
    s[_P_REF], s[_P_REST], s[_Q_REF], s[_Q_REST] = p_ref, p_rest, q_ref, q_rest
    return care


@njit(**_INNER)
def _finish_divergences(x, row, count, sums, p_states, q_states, out):
    """Store divergences of count rows where they are new; return whether to take some again."""
    some = False
    for r in range(count):
        s, p_m, q_m = _at(sums, r * _SUMS), p_states[r * _STATE + _M], q_states[r * _STATE + _M]
        if s[_AGAIN] != 0.0:
            found = _Divergence(s[_TERMS], s[_TERMS + 1], s[_SLOPES], s[_SLOPES + 1])
            value, off, again = _divergence_of(x, p_m, s[_P_REST], q_m, s[_Q_REST], found)
            _set(out, row + r, value)
            s[_AGAIN] = 1.0 if again else 0.0
            if again:
                pair = _recentred(x, _Pair(s[_SHIFT], s[_LOW], s[_FACTOR]), again, off)
                s[_SHIFT], s[_LOW] = pair.shift, pair.low
                for i in range(_SLOPES + 2):
                    s[i] = 0.0
                some = True
    return some


@njit(**_INNER)
def _divergence_rows(x_type, job, item, worker):
    """Rows of more classes, read once.

    The shift between two rows is known when they have been read, but the sums need one before: so it is
    that of what has been read so far, and follows that.
    """
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    n, row, direct = job.n_classes, first, job.rows == 1
    out = _reals_like(job.out, x_type)
    sums = _float64s(job.scratch + 8 * worker * job.scratch_size, x_type)
    p_states = _at(sums, job.rows * _SUMS)
    q_states = _at(p_states, job.rows * _STATE)
    e = _reals_like(_address_in(q_states, job.rows * _STATE), x_type)
    f = _at(e, _BLOCK)
    p_block = _pointer_like(_address_in(f, _BLOCK), x_type)
    q_block = _at(p_block, job.rows * _PITCH)
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = min(job.rows, last - row, job.inner - inner)
        x = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        y = _pointer_like(job.y + _size(x_type, outer * job.y_outer + inner * job.y_inner), x_type)
        for r in range(count):
            s = _at(sums, r * _SUMS)
            for i in range(_SUMS):
                s[i] = 0.0
            s[_P_REST], s[_Q_REST], s[_AGAIN] = -1.0, -1.0, 1.0
            _clear(_at(p_states, r * _STATE))
            _clear(_at(q_states, r * _STATE))
        for reading in range(2):
            for start in range(0, n, _BLOCK):
                size = min(_BLOCK, n - start)
                a = _classes(x, direct, start, job.x_inner, job.x_class, count, size, p_block)
                b = _classes(y, direct, start, job.y_inner, job.y_class, count, size, q_block)
                for r in range(count):
                    p, q, s = _at(a, r * _PITCH), _at(b, r * _PITCH), _at(sums, r * _SUMS)
                    care, tame = _CLOSE, False
                    if reading == 0:
                        p_state, q_state = _at(p_states, r * _STATE), _at(q_states, r * _STATE)
                        _, p_low = _read_block(p, size, p_state, e, None, 0, 0, 0.0, None)
                        _, q_low = _read_block(q, size, q_state, f, None, 0, 0, 0.0, None)
                        care = _follow(x, s, p_state, q_state)
                        tame = _is_near(x, p_low, p_state[_REF]) and _is_near(x, q_low, q_state[_REF])
                    elif s[_AGAIN] != 0.0:
                        _sum_terms(p, size, _splat(x, s[_P_REF]), None, e)
                        _sum_terms(q, size, _splat(x, s[_Q_REF]), None, f)
                    if s[_AGAIN] != 0.0:
                        _sum_divergence(p, q, e, f, size, s, care, tame)
            if reading == 0 and n > _BLOCK:
                for r in range(count):
                    s = _at(sums, r * _SUMS)
                    _move(x, s, s[_P_REF], s[_P_REST], s[_Q_REF], s[_Q_REST])
            if not _finish_divergences(x, row, count, sums, p_states, q_states, out):
                break
        row += count
    return 0


@njit(**_INNER)
def _read_lanes(x, work, terms, n):
    """Return the maxima of rows in lanes, and the sums of their exponentials but for one maximum's."""
    lanes = _lanes(x)
    m = _splat(x, -np.inf)
    for c in range(n):
        m = _larger_of(_vector_at(work, c * lanes), m)
    totals, carries, ties = _sum_terms(work, n * lanes, _finite_or_zero(m), m, terms)
    return _as_doubles(m), _total_of(totals, carries, ties)


@njit(**_INNER)
def _divergence_of_lanes(x, p, q, e, f, n, pair):
    zero, lanes, of = _splat_double(x, 0.0), _lanes(x), _as_lanes(x, pair)
    sums = _Divergence(zero, zero, _splat(x, 0.0), zero)
    for i in range(0, n * lanes, lanes):
        sums = _add_one_wild(p, q, e, f, i, None, of, sums)
    return sums


@njit(**_INNER)
def _narrow_divergence_rows(x_type, job, item, worker):
    """Rows of few classes: lanes are rows."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    n, row, lanes = job.n_classes, first, _lanes(x_type)
    out = _reals_like(job.out, x_type)
    p = _reals_like(job.scratch + 8 * worker * job.scratch_size, x_type)
    size = _NARROW * lanes
    q, e, f = _at(p, size), _at(p, 2 * size), _at(p, 3 * size)
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = min(lanes, last - row, job.inner - inner)
        x = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        y = _pointer_like(job.y + _size(x_type, outer * job.y_outer + inner * job.y_inner), x_type)
        _fetch_lanes(x, job.x_inner, job.x_class, count, n, p)
        _fetch_lanes(y, job.y_inner, job.y_class, count, n, q)
        p_m, p_rest = _read_lanes(x, p, e, n)
        q_m, q_rest = _read_lanes(x, q, f, n)
        pair = _pair_of(x, p_m, p_rest, q_m, q_rest)
        sums = _divergence_of_lanes(x, p, q, e, f, n, pair)
        value, off, again = _divergence_of(x, p_m, p_rest, q_m, q_rest, sums)
        if _any(again):
            pair = _recentred(x, pair, again, off)
            sums = _divergence_of_lanes(x, p, q, e, f, n, pair)
            value, _, _ = _divergence_of(x, p_m, p_rest, q_m, q_rest, sums)
        _store_where(out, _first_lanes(x, count), row, value)
        row += count
    return 0


# ---- The kernels, by name, and how they are run ----


def _binary(x, job, item, worker):
    return _binary_tile(x, numba.carray(job, 1)[0], item, worker, True, None, None)


def _binary_grad(x, job, item, worker):
    return _binary_tile(x, numba.carray(job, 1)[0], item, worker, True, None, True)


def _binary_weights(x, job, item, worker):
    return _binary_tile(x, numba.carray(job, 1)[0], item, worker, True, True, None)


def _binary_weights_grad(x, job, item, worker):
    return _binary_tile(x, numba.carray(job, 1)[0], item, worker, True, True, True)


def _binary_probs(x, job, item, worker):
    return _binary_tile(x, numba.carray(job, 1)[0], item, worker, None, True, None)


def _binary_probs_grad(x, job, item, worker):
    return _binary_tile(x, numba.carray(job, 1)[0], item, worker, None, True, True)


def _information(x, job, item, worker):
    return _information_tile(x, numba.carray(job, 1)[0], item)


def _entropy(x, job, item, worker):
    return _measure_rows(x, numba.carray(job, 1)[0], item, worker, None, None)


def _cross_entropy(x, job, item, worker):
    return _measure_rows(x, numba.carray(job, 1)[0], item, worker, True, None)


def _kl_divergence(x, job, item, worker):
    return _measure_rows(x, numba.carray(job, 1)[0], item, worker, True, True)


def _narrow_entropy(x, job, item, worker):
    return _narrow_measure_rows(x, numba.carray(job, 1)[0], item, worker, None, None)


def _narrow_cross_entropy(x, job, item, worker):
    return _narrow_measure_rows(x, numba.carray(job, 1)[0], item, worker, True, None)


def _narrow_kl_divergence(x, job, item, worker):
    return _narrow_measure_rows(x, numba.carray(job, 1)[0], item, worker, True, True)


def _divergence(x, job, item, worker):
    return _divergence_rows(x, numba.carray(job, 1)[0], item, worker)


def _narrow_divergence(x, job, item, worker):
    return _narrow_divergence_rows(x, numba.carray(job, 1)[0], item, worker)


_MEASURES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "entropy": (_entropy, _narrow_entropy),
    "cross_entropy": (_cross_entropy, _narrow_cross_entropy),
    "kl_divergence": (_kl_divergence, _narrow_kl_divergence),
}


@functools.cache
def _address_of(kernel: Callable[..., Any], job: np.dtype[Any], dtype: np.dtype[Any]) -> int:
    """Compile a kernel for a dtype, or load it from the disk, and return its address."""
    arguments = types.CPointer(_DTYPES[dtype]), types.CPointer(numba.from_dtype(job))
    signature = types.int64(*arguments, types.int64, types.int64)
    with _compiling:
        address: int = numba.cfunc(signature, cache=True, **_OPTIONS)(kernel).address
        return address


def _run(function: int, memory: _Memory, job: tuple[Any, Any], n_items: int, workers: int) -> int:
    """Run a kernel on a job, given as its integers and its reals; return the sum of what it returns."""
    integers, reals = job
    n = len(integers)
    memory.words[:n] = integers
    memory.words.view(np.float64)[n : n + len(reals)] = reals
    if workers == 1:
        return int(_run_serially(function, memory.address, n_items))
    return _run_parallel(function, memory, n_items, workers)


def _address_or_0(array: NDArray[Any] | None) -> int:
    return 0 if array is None else _address(array)


# After the job: a vector of ones for absent arrays, and for each worker room for losses nobody wants.
_ONES_WORDS = 32
_SINK_WORDS = 64


def binary(
    x: NDArray[Any],
    targets: NDArray[Any],
    losses: NDArray[Any] | None,
    sums: NDArray[np.float64],
    *,
    from_logits: bool,
    weight: NDArray[Any] | None,
    pos_weight: NDArray[Any] | None,
    unit: float,
    scale: NDArray[Any] | None,
    grad_unit: float,
    grad: NDArray[Any] | None,
    num_threads: int,
) -> int:
    """See `fastce.kernels.Kernels.binary`."""
    if len(x) == 0:
        return 0
    plain = (
        from_logits
        and (weight is None and pos_weight is None and (grad is None or scale is None))
        and (_is_moderate(unit) and (grad is None or _is_moderate(grad_unit)))
    )
    if plain:
        kernel = _binary if grad is None else _binary_grad
    elif from_logits:
        kernel = _binary_weights if grad is None else _binary_weights_grad
    else:
        kernel = _binary_probs if grad is None else _binary_probs_grad
    n_items = len(sums)
    workers = max(1, min(num_threads, n_items))
    bits = 64 if x.dtype == np.float64 else 32
    with _Memory(_JOB_WORDS + _ONES_WORDS + workers * _SINK_WORDS) as memory:
        real: type[Any] = np.float64 if bits == 64 else np.float32
        memory.words[_JOB_WORDS : _JOB_WORDS + _ONES_WORDS].view(real)[:] = 1.0
        ones = memory.address + 8 * _JOB_WORDS
        sink = ones + 8 * _ONES_WORDS
        optional: list[int] = []
        for array, other in (losses, sink), (weight, ones), (pos_weight, ones), (scale, ones):
            optional += (other, 0) if array is None else (_address(array), 1)
        integers = (_address(x), _address(targets), *optional, _address_or_0(grad), _address(sums))
        floor = _floor(unit, bits) if plain else 0.0
        grad_floor = _floor(grad_unit, bits) if plain and grad is not None else 0.0
        reals = (unit, floor, grad_unit, grad_floor, 0.0, 0.0, 0.0)
        function = _address_of(kernel, _OF_ELEMENTS, x.dtype)
        return _run(function, memory, ((*integers, 0, len(x)), reals), n_items, workers)


def _is_moderate(unit: float) -> bool:
    """Whether products with this unit stay among the normal numbers if those with 1 do."""
    return 2.0**-60 < abs(unit) < 2.0**30


def _floor(unit: float, bits: int) -> float:
    """Return the largest a for which exp(-a) * unit and exp(-a) * 2^_LIFT are normal numbers."""
    smallest = math.log(abs(unit)) - _MIN_EXPONENT[bits] * math.log(2.0)
    return min(_lowest(bits, _LIFT), smallest + 1e-5)  # which float32 may round down


def information(p: NDArray[Any], out: NDArray[Any], *, base: float | None, num_threads: int) -> int:
    """See `fastce.kernels.Kernels.information`."""
    if len(p) == 0:
        return 0
    n_items = -(-len(p) // BINARY_TILE)
    workers = max(1, min(num_threads, n_items))
    with _Memory(_JOB_WORDS) as memory:
        integers = (_address(p), *([0] * 11), _address(out), len(p))
        reals = (0.0, 0.0, 0.0, 0.0, *_parts_of_base(base, p.dtype))
        function = _address_of(_information, _OF_ELEMENTS, p.dtype)
        return _run(function, memory, (integers, reals), n_items, workers)


def _parts_of_base(base: float | None, dtype: np.dtype[Any]) -> tuple[float, float, float]:
    """Return the logarithm of 2, its digits from the 16th or 42nd on apart, and that of e."""
    of_2, of_e = log_scale(base)
    fraction, exponent = math.frexp(of_2)
    digits = 2.0 ** (41 if dtype == np.float64 else 15)
    high = math.ldexp(round(fraction * digits) / digits, exponent)
    return high, of_2 - high, of_e


def distributions(
    measure: str,
    p: NDArray[Any],
    q: NDArray[Any] | None,
    first_row: int,
    out: NDArray[Any],
    *,
    base: float | None,
    num_threads: int,
) -> int:
    """See `fastce.kernels.Kernels.distributions`."""
    wide, narrow = _MEASURES[measure]
    epsilon = 2.0**-7 if p.dtype == np.uint16 else float(np.finfo(p.dtype).eps)
    reals = (*_parts_of_base(base, p.dtype), SUMS_AGREE * epsilon)
    return _run_rows(wide, narrow, p, p if q is None else q, first_row, out, reals, num_threads)


def kl_from_logits(
    p_logits: NDArray[Any],
    q_logits: NDArray[Any],
    first_row: int,
    out: NDArray[Any],
    *,
    num_threads: int,
) -> None:
    """See `fastce.kernels.Kernels.kl_from_logits`."""
    reals = (0.0, 0.0, 0.0, 0.0)
    _run_rows(_divergence, _narrow_divergence, p_logits, q_logits, first_row, out, reals, num_threads)


def _run_rows(
    wide: Callable[..., Any],
    narrow: Callable[..., Any],
    x: NDArray[Any],
    y: NDArray[Any],
    first_row: int,
    out: NDArray[Any],
    reals: tuple[float, ...],
    num_threads: int,
) -> int:
    """Run the kernel for this number of classes on rows of two arrays."""
    n_rows = len(out)
    if n_rows == 0:
        return 0
    _, inner, n = x.shape
    x_strides, y_strides = _strides(x), _strides(y)
    item_rows = tile_rows(n)
    direct = x_strides[2] == y_strides[2] == 1
    if not direct:
        item_rows *= -(-_FETCHED // item_rows)
    rows = 1 if direct else 512 // x.itemsize
    if n <= _NARROW:
        kernel, size = narrow, 4 * _NARROW * 64
    else:
        kernel = wide
        blocks = 0 if direct else 2 * rows * _PITCH * x.itemsize
        size = 8 * rows * (_SUMS + 2 * _STATE) + 2 * _BLOCK * out.itemsize + blocks
    words = -(-size // 64) * 8
    n_items = -(-n_rows // item_rows)
    workers = max(1, min(num_threads, n_items))
    with _Memory(_JOB_WORDS + workers * words) as memory:
        scratch = memory.address + 8 * _JOB_WORDS
        integers = (
            *(_address(x), *x_strides, _address(y), *y_strides, inner, first_row, n_rows, n),
            *(item_rows, _address(out), scratch, words, rows),
        )
        function = _address_of(kernel, _OF_ROWS, x.dtype)
        return _run(function, memory, (integers, reals), n_items, workers)
