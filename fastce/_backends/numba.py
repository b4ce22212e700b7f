"""The kernels in Numba: the same algorithm as the C body (``_native/row_body.inc``), which explains it.

What is different, and why:

- Numba's ``math.exp`` is a scalar call (it has no vector library since 0.62), so the exponential is
  emitted as LLVM instructions by an intrinsic, 15 times faster in a loop.
- ``if v > m`` and ``max()`` do not vectorise; ``llvm.maxnum`` does.
- Vectors have 512 bits only where the function that holds the loop asks for it (`_want_512`), and as
  many lanes as the widest type in the loop allows: float32 loops keep out float64 sums and int64
  counts, which made them 1.6 times slower.
- Sums over an array vectorise only under the ``reassoc`` flag, which would also delete the
  rounding errors that the exponential and `_two_sum` compute. So functions that need strict
  arithmetic are compiled without flags, and only the loops that add up are compiled with it.
- Helpers are module-level functions: Numba never caches closures on disk.
- Arrays reach the loops as flat, contiguous views, so that each dtype compiles once whatever the
  caller's strides, and as read-only ones, whatever the caller's flags.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastce.kernels import Kernels, tile_rows

_STRICT: dict[str, Any] = {"error_model": "numpy", "cache": True, "nogil": True}
_INLINE: dict[str, Any] = {**_STRICT, "forceinline": True}
_ADDS: dict[str, Any] = {**_INLINE, "fastmath": {"reassoc", "nsz"}}

_BLOCK = 1024  # classes read at a time: 4 or 8 KiB, which stay in L1 between maximum and sum
_NARROW = 32  # rows of at most this many classes are computed with rows as lanes
_BAND = 128  # rows per band of narrow rows
_MAX_LEAD = 8.0  # how far the maximum may run ahead of the reference of a row's sum

# By bits of the dtype; derivations stand beside the same numbers in row_body.inc.
_POLY = {
    32: "0x1.6a23ccp-10 0x1.123a2p-7 0x1.5558f2p-5 0x1.555492p-3 0x1.fffffcp-2",
    64: "0x1.ad7f3d1da8c7p-26 0x1.28ad9b849a8c7p-22 0x1.71df25b44fed3p-19 0x1.a01999e264e66p-16"
    " 0x1.a01a012a0e90fp-13 0x1.6c16c18438af6p-10 0x1.1111111127d11p-7 0x1.555555555083ep-5"
    " 0x1.55555555554f9p-3 0x1p-1",
}
_LOG2E = {32: "0x1.715476p+0", 64: "0x1.71547652b82fep+0"}
_LN2_HI = {32: "0x1.63p-1", 64: "0x1.62e42feep-1"}
_LN2_LO = {32: "-0x1.bd0106p-13", 64: "0x1.a39ef35793c76p-33"}
_MANTISSA = {32: 23, 64: 52}
_BIAS = {32: 127, 64: 1023}
_SUM_SHIFT = {32: 64, 64: 512}
_SUM_FLOOR = {32: -131.0, 64: -1060.0}
_LOG1P = tuple(
    float.fromhex(c)
    for c in (
        *("0x1.2f0d58deeae08p-3", "0x1.39a0fac5a8dd7p-3", "0x1.746645ede9703p-3"),
        *("0x1.c71c51e94c1b1p-3", "0x1.2492494215c0ap-2", "0x1.999999997fb5ap-2"),
        "0x1.5555555555593p-1",
    )
)
_LOG_2_HI, _LOG_2_LO = float.fromhex(_LN2_HI[64]), float.fromhex(_LN2_LO[64])


# ---- LLVM instructions that Numba cannot say ----


def _call(builder: Any, name: str, *args: Any, fastmath: tuple[str, ...] = ()) -> Any:
    real = args[0].type
    function = builder.module.declare_intrinsic(name, [real], ir.FunctionType(real, [real] * len(args)))
    return builder.call(function, args, fastmath=fastmath)


def _emit_exp(builder: Any, bits: int, x: Any, m: Any, hi: Any, lo: Any, floor: Any, k: Any) -> Any:
    """Emit (hi + lo) * 2^k * exp(x - m), or 0 where x - m < floor; a NaN stays a NaN."""
    real, integer = x.type, ir.IntType(bits)

    def fma(a: Any, b: Any, c: Any) -> Any:  # fused where the machine can; correct either way
        return _call(builder, "llvm.fmuladd", a, b, c, fastmath=("nsz",))

    def constant(value: str | float) -> Any:
        return ir.Constant(real, float.fromhex(value) if isinstance(value, str) else value)

    magic_number = constant(1.5 * 2.0 ** _MANTISSA[bits])
    d = builder.fsub(x, m)
    x1 = builder.fadd(d, m)
    m1 = builder.fsub(x1, d)
    r = builder.fsub(builder.fsub(x, x1), builder.fsub(m, m1))
    magic = fma(d, constant(_LOG2E[bits]), magic_number)
    n = builder.fsub(magic, magic_number)
    minus_n = builder.fneg(n)
    y = builder.fadd(fma(minus_n, constant(_LN2_HI[bits]), d), fma(minus_n, constant(_LN2_LO[bits]), r))
    first, *others = _POLY[bits].split()
    poly = constant(first)
    for coefficient in others:
        poly = fma(poly, y, constant(coefficient))
    t = fma(poly, builder.fmul(y, y), y)
    exponent = builder.add(builder.bitcast(magic, integer), builder.add(k, integer(_BIAS[bits])))
    power = builder.bitcast(builder.shl(exponent, integer(_MANTISSA[bits])), real)
    p = builder.fmul(builder.fadd(hi, fma(hi, t, lo)), power)
    return builder.select(builder.fcmp_ordered("<", d, floor), constant(0.0), p)


@intrinsic
def _emit_term(typingctx: Any, x: Any, ref: Any) -> Any:
    """exp(x - ref) * 2^_SUM_SHIFT."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = signature.return_type.bitwidth
        real = args[0].type
        one, zero = ir.Constant(real, 1.0), ir.Constant(real, 0.0)
        floor = ir.Constant(real, _SUM_FLOOR[bits])
        shift = ir.IntType(bits)(_SUM_SHIFT[bits])
        return _emit_exp(builder, bits, args[0], args[1], one, zero, floor, shift)

    return x(x, x), codegen


@intrinsic
def _emit_prob(typingctx: Any, x: Any, m: Any, hi: Any, lo: Any, floor: Any, k: Any) -> Any:
    """(hi + lo) * 2^k * exp(x - m); k is an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = signature.return_type.bitwidth
        *reals, k = args
        return _emit_exp(builder, bits, *reals, k if bits == 32 else builder.sext(k, ir.IntType(64)))

    return x(x, x, x, x, x, types.int32), codegen


@intrinsic
def _larger(typingctx: Any, a: Any, b: Any) -> Any:
    """Return the larger of two numbers, passing over a NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.maxnum", *args)

    return a(a, a), codegen


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


@intrinsic
def _from_bits(typingctx: Any, i: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), codegen


@intrinsic
def _want_512(typingctx: Any) -> Any:
    """Let the calling function use 512-bit vectors, which LLVM avoids unless told."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # past llvmlite's own add(), which knows only attributes without a value
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), codegen


# ---- Scalars, in strict arithmetic ----


@njit(**_INLINE)
def _two_sum(a, b):
    s = a + b
    b1 = s - a
    return s, (a - (s - b1)) + (b - b1)


@njit(**_INLINE)
def _log1p(s):
    """log(1 + s) for s >= 0."""
    u = 1.0 + s
    lost = s - (u - 1.0) if s < 1.0 else 1.0 - (u - s)
    b = _bits(u) + np.uint64(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
    k = _from_bits((b >> np.uint64(52)) | np.uint64(0x4330000000000000)) - (2.0**52 + 1023.0)
    z1 = _from_bits((b & np.uint64(0xFFFFFFFFFFFFF)) + np.uint64(0x3FE6A09E667F3BCD))
    f = s if k == 0.0 else z1 - 1.0
    fix = 0.0 if k == 0.0 else lost / u
    half = 0.5 * f * f
    q = f / (2.0 + f)
    z = q * q
    c6, c5, c4, c3, c2, c1, c0 = _LOG1P
    tail = z * ((((((c6 * z + c5) * z + c4) * z + c3) * z + c2) * z + c1) * z + c0)
    low = q * (half + tail) + (k * _LOG_2_LO + fix)
    result = k * _LOG_2_HI + (f - (half - low))
    return result if s < np.inf else s


@njit(**_INLINE)
def _sum_unit(x):
    return 2.0**-64 if x.itemsize == 4 else 2.0**-512  # as _SUM_SHIFT


@njit(**_INLINE)
def _min_exponent(x):
    return -126 if x.itemsize == 4 else -1022


@njit(**_INLINE)
def _term(x, ref):
    return _emit_term(x, ref)


@njit(**_INLINE)
def _prob(x, m, hi, lo, floor, k):
    return _emit_prob(x, m, hi, lo, floor, k)


@njit(**_INLINE)
def _scale_sum(total, carry, a, b):
    """Return (total, carry) times exp(a - b)."""
    d, r = _two_sum(np.float64(a), -np.float64(b))
    if r != r:  # d is infinite
        r = 0.0
    if d < -700.0:
        half = math.exp(0.5 * d)
        return total * half * half * (1.0 + r), carry * half * half
    factor = math.exp(d)
    return total * factor * (1.0 + r), carry * factor


@njit(**_INLINE)
def _finish_row(m, target_logit, total, ties):
    """Return gap, gap_error and rest of a row from its maximum and sum."""
    rest = total + (ties - 1)
    gap, error = _two_sum(np.float64(m), -np.float64(target_logit))
    if not (-np.inf < m < np.inf and rest == rest):
        return np.nan, 0.0, 0.0
    return gap, error if gap < np.inf else 0.0, rest


@njit(**_INLINE)
def _split(unit, min_exponent):
    """Return mantissa, floor and k, which turn `_prob` into unit * exp(x - m)."""
    b = _bits(unit)
    exponent = np.int64((b >> np.uint64(52)) & np.uint64(0x7FF))
    mantissa = _from_bits((b & np.uint64(0x800FFFFFFFFFFFFF)) | np.uint64(0x3FE0000000000000))
    k = exponent - 1022
    # a zero or subnormal unit gives zeros
    floor = np.inf if exponent == 0 else (min_exponent - k) * math.log(2.0)
    return mantissa, floor, np.int32(k)


@njit(**_INLINE)
def _target_grad(gap, gap_error, rest, scale):
    total = 1.0 + rest
    others = total - math.exp(-gap) * (1.0 - gap_error) if gap > 0.0 else rest
    return 0.0 - scale * (others / total)


# ---- Rows of more than _NARROW classes: lanes are classes ----


@njit(**_ADDS)
def _max(x):
    _want_512()
    top = x.dtype.type(-np.inf)
    for j in range(len(x)):
        top = _larger(top, x[j])
    return top


@njit(**_ADDS)
def _count(x, value):
    _want_512()
    one, n = x.dtype.type(1), x.dtype.type(0)  # an integer would halve or quarter the vectors
    for j in range(len(x)):
        n += one if x[j] == value else x.dtype.type(0)
    return int(n)


@njit(**_ADDS)
def _plain_sum(x):
    _want_512()
    total = 0.0
    for j in range(len(x)):
        total += np.float64(x[j])
    return total


@njit(**_INLINE)
def _compensated_sum(x, errors):
    """Fold x onto itself by halves, keeping what each addition rounds away; x is overwritten."""
    _want_512()
    errors[:] = 0
    n = len(x)
    while n > 1:
        half = (n + 1) // 2
        low, high = x[:half], x[half:n]
        low_errors, high_errors = errors[:half], errors[half:n]
        for j in range(len(high)):
            low[j], error = _two_sum(low[j], high[j])
            low_errors[j] += high_errors[j] + error
        n = half
    return np.float64(x[0] + errors[0]) if n else 0.0


@njit(**_INLINE)
def _sum_terms(x, ref, m, holds_max, scratch):
    """Sum the terms below m; a NaN joins the sum."""
    _want_512()
    q = len(x) // 4
    a, b, c, d, left = x[:q], x[q : 2 * q], x[2 * q : 3 * q], x[3 * q : 4 * q], x[4 * q :]
    sums, errors = scratch[0, :q], scratch[1, :q]
    zero = x.dtype.type(0)
    for j in range(q):
        ea, eb, ec, ed = _term(a[j], ref), _term(b[j], ref), _term(c[j], ref), _term(d[j], ref)
        if holds_max:
            ea = zero if a[j] >= m else ea
            eb = zero if b[j] >= m else eb
            ec = zero if c[j] >= m else ec
            ed = zero if d[j] >= m else ed
        sums[j] = (ea + eb) + (ec + ed)
    # float32 terms have 29 bits to spare in float64
    total = _plain_sum(sums) if x.itemsize == 4 else _compensated_sum(sums, errors)
    for j in range(len(left)):
        total += np.float64(zero if left[j] >= m else _term(left[j], ref))
    return total


@njit(**_STRICT)
def _read_row(x, scratch):
    """Return the maximum, the sum of exp(x - maximum) below it, and how many classes attain it."""
    _want_512()
    unit = _sum_unit(x)
    m = x.dtype.type(-np.inf)
    ref = x.dtype.type(0)
    total, carry, ties = 0.0, 0.0, 0
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        top = _max(block)
        if top > m:
            if m > -np.inf:
                # what was the maximum becomes a term like any other
                former, former_carry = _scale_sum(ties / unit, 0.0, m, ref)
                total, error = _two_sum(total, former)
                carry += error + former_carry
                if not (top - ref <= _MAX_LEAD):
                    total, carry = _scale_sum(total, carry, ref, top)
                    ref = top
            else:
                ref = top
            m, ties = top, 0
        if top < m:
            block_sum = _sum_terms(block, ref, m, False, scratch)
        else:
            block_sum = _sum_terms(block, ref, m, True, scratch)
            ties += _count(block, m)
        total, error = _two_sum(total, block_sum)
        carry += error
    if ref != m:
        total, carry = _scale_sum(total, carry, ref, m)
    return m, (total + carry) * unit, ties


@njit(**_STRICT)
def _write_probs(x, m, unit, scratch, grad):
    """Write grad = unit * exp(x - m)."""
    _want_512()
    min_exponent = _min_exponent(x)
    if not abs(unit) < 2.0**-min_exponent:  # a result may overflow: rare, and plain
        for j in range(len(x)):
            grad[j] = math.exp(np.float64(x[j]) - np.float64(m)) * unit
        return
    mantissa, floor64, k = _split(unit, min_exponent)
    hi = x.dtype.type(mantissa)
    lo = x.dtype.type(mantissa - np.float64(hi))
    floor = x.dtype.type(floor64)
    # Through scratch, which is nobody's alias: in place (grad is x), a direct loop would be scalar.
    for start in range(0, len(x), _BLOCK):
        block, out = x[start : start + _BLOCK], grad[start : start + _BLOCK]
        for j in range(len(block)):
            scratch[j] = block[j]
        for j in range(len(block)):
            out[j] = _prob(scratch[j], m, hi, lo, floor, k)


@njit(**_STRICT)
def _rank(x, target):
    _want_512()
    pivot = x[target]
    before, after = x[:target], x[target + 1 :]
    rank = 0
    for j in range(len(before)):
        rank += before[j] >= pivot
    for j in range(len(after)):
        rank += after[j] > pivot
    return rank


# ---- Rows of at most _NARROW classes: lanes are rows ----


@njit(**_STRICT)
def _read_band(band, m, ref, totals, carries, ties):
    """Reduce a band (n_classes, n_rows) along its classes."""
    _want_512()
    for row in range(band.shape[1]):
        m[row] = -np.inf
        totals[row] = 0.0
        carries[row] = 0.0
        ties[row] = 0
    for c in range(band.shape[0]):
        x = band[c]
        for row in range(len(x)):
            m[row] = _larger(m[row], x[row])
    for row in range(len(ref)):
        ref[row] = m[row] if m[row] > -np.inf else 0
    for c in range(band.shape[0]):
        x = band[c]
        for row in range(len(x)):
            e = np.float64(_term(x[row], ref[row]))
            if x[row] >= m[row]:
                e = 0.0
            totals[row], error = _two_sum(totals[row], e)
            carries[row] += error
            ties[row] += x[row] == m[row]


@njit(**_STRICT)
def _write_band(band, m, hi, lo, floor, k):
    _want_512()
    for c in range(band.shape[0]):
        x = band[c]
        for row in range(len(x)):
            x[row] = _prob(x[row], m[row], hi[row], lo[row], floor[row], k[row])


@njit(**_STRICT)
def _narrow_rows(logits, targets, n, parts, scale, grad):
    """Fill the parts of a tile's rows and, but for its targets, their gradient."""
    x, x_first, x_step = logits
    s, s_step = scale
    g, g_first, g_step = grad
    gap, gap_error, rest = parts
    real, unit, min_exponent = x.dtype.type, _sum_unit(x), _min_exponent(x)
    for start in range(0, len(targets), _BAND):
        size = min(_BAND, len(targets) - start)
        band = np.empty((n, size), x.dtype)
        m, ref = np.empty(size, x.dtype), np.empty(size, x.dtype)
        totals, carries, ties = np.empty(size), np.empty(size), np.empty(size, np.int64)
        for i in range(size):
            at = x_first + (start + i) * x_step
            for c in range(n):
                band[c, i] = x[at + c]
        _read_band(band, m, ref, totals, carries, ties)
        for i in range(size):
            row = start + i
            t = targets[row]
            target_logit = x[x_first + row * x_step + (t if 0 <= t < n else 0)]
            gap[row], gap_error[row], rest[row] = _finish_row(
                m[i], target_logit, (totals[i] + carries[i]) * unit, ties[i]
            )
        if len(g) == 0:
            continue
        hi, lo, floor = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(size, x.dtype)
        k = np.empty(size, np.int32)
        for i in range(size):
            p = s[(start + i) * s_step] / (1.0 + rest[start + i])
            hi64, floor64, k[i] = _split(p, min_exponent)
            hi[i], floor[i] = hi64, floor64
            lo[i] = hi64 - np.float64(hi[i])
        _write_band(band, m, hi, lo, floor, k)
        for i in range(size):
            row = start + i
            at, out = x_first + row * x_step, g_first + row * g_step
            p = s[row * s_step] / (1.0 + rest[row])
            if abs(p) < 2.0**-min_exponent:
                for c in range(n):
                    g[out + c] = band[c, i]
            else:  # a result may overflow: rare, and plain
                for c in range(n):
                    g[out + c] = real(math.exp(np.float64(x[at + c]) - np.float64(m[i])) * p)


# ---- Tiles ----


@njit(**_STRICT)
def _tile(start, size, logits, targets, n, losses, ranks, scale, grad):
    """Compute the tile of rows from ``start`` on, and return the sum of its losses.

    Rows are (flat array, offset of the first, step between two); ranks and the gradient's array
    are empty where they are not wanted.
    """
    _want_512()
    x, x_first, x_step = logits[0], logits[1] + start * logits[2], logits[2]
    g, g_first, g_step = grad[0], grad[1] + start * grad[2], grad[2]
    s, s_step = scale[0][start * scale[1] :], scale[1]
    targets, losses = targets[start : start + size], losses[start : start + size]
    ranks = ranks[start : start + size]
    gap, gap_error, rest = np.empty(len(targets)), np.empty(len(targets)), np.empty(len(targets))
    scratch, sums = np.empty(_BLOCK, x.dtype), np.empty((2, _BLOCK // 4), x.dtype)
    if n <= _NARROW:
        parts = (gap, gap_error, rest)
        _narrow_rows((x, x_first, x_step), targets, n, parts, (s, s_step), (g, g_first, g_step))
    for i in range(len(targets)):
        t = targets[i]
        kept = 0 <= t < n
        at, out = x_first + i * x_step, g_first + i * g_step
        row = x[at : at + n]
        if not kept:
            gap[i], gap_error[i], rest[i] = 0.0, 0.0, 0.0
        elif n > _NARROW:
            target_logit = row[t]
            m, total, ties = _read_row(row, sums)
            gap[i], gap_error[i], rest[i] = _finish_row(m, target_logit, total, ties)
            if len(g):
                _write_probs(row, m, s[i * s_step] / (1.0 + rest[i]), scratch, g[out : out + n])
        finite = gap[i] == gap[i]
        if len(ranks):
            ranks[i] = _rank(row, t) if kept and finite else -1
        if len(g) == 0:
            continue
        if not kept:
            g[out : out + n] = 0
        elif finite:
            g[out + t] = _target_grad(gap[i], gap_error[i], rest[i], s[i * s_step])
        else:
            g[out : out + n] = np.nan
    for i in range(len(losses)):
        losses[i] = gap[i] + (gap_error[i] + _log1p(rest[i]))
    total, carry = 0.0, 0.0
    for i in range(len(losses)):
        total, error = _two_sum(total, np.float64(losses[i]))
        carry += error
    return total + carry if total < np.inf else total


@njit(parallel=True, **_STRICT)
def _tiles_in_parallel(tile_sums, size, logits, targets, n, losses, ranks, scale, grad):
    for tile in prange(len(tile_sums)):
        tile_sums[tile] = _tile(tile * size, size, logits, targets, n, losses, ranks, scale, grad)


# ---- The backend ----


def load(isa: str | None) -> Kernels:
    """Return the kernels; LLVM compiles them for the processor at hand."""
    return NumbaKernels()


class NumbaKernels:
    """`fastce.kernels.Kernels` in Numba."""

    def max_threads(self) -> int:
        """Return Numba's limit for the calling thread."""
        return int(numba.get_num_threads())

    def rows(
        self,
        logits: NDArray[Any],
        targets: NDArray[np.int64],
        losses: NDArray[Any],
        tile_sums: NDArray[np.float64],
        *,
        ranks: NDArray[np.int64] | None,
        scale: NDArray[np.float64] | None,
        grad: NDArray[Any] | None,
        num_threads: int,
    ) -> None:
        """See `fastce.kernels.Kernels.rows`."""
        if len(targets) == 0:
            return
        n_classes = logits.shape[1]
        size = tile_rows(n_classes)
        if scale is None or grad is None:
            scale, grad = np.empty(1), np.empty((0, n_classes), logits.dtype)
        s, _, s_step = _flat(scale[:, None], writeable=False)
        args = (
            size,
            _flat(logits, writeable=False),
            _flat(targets[:, None], writeable=False)[0],
            n_classes,
            losses,
            np.empty(0, np.int64) if ranks is None else ranks,
            (s, s_step),
            _flat(grad, writeable=True),
        )
        if num_threads > 1:
            _run_parallel((tile_sums, *args), num_threads)
            return
        for tile in range(len(tile_sums)):
            tile_sums[tile] = _tile(tile * size, *args)


def _flat(rows: NDArray[Any], writeable: bool) -> tuple[NDArray[Any], int, int]:
    """Return the memory of rows as one contiguous array, the first row's offset, and the step."""
    n_rows, n_classes = rows.shape
    step = rows.strides[0] // rows.itemsize if n_rows > 1 else n_classes
    lowest = rows[-1:] if step < 0 else rows
    span = abs(step) * (n_rows - 1) + n_classes if n_rows else 0
    flat = np.lib.stride_tricks.as_strided(lowest, (span,), (rows.itemsize,), writeable=writeable)
    return flat, -step * (n_rows - 1) if step < 0 else 0, step


_lock = threading.Lock()


def _run_parallel(args: tuple[Any, ...], num_threads: int) -> None:
    """Run with a number of threads of the calling thread's own, not the process's."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    try:
        with _one_at_a_time():
            _tiles_in_parallel(*args)
    finally:
        numba.set_num_threads(before)


def _one_at_a_time() -> AbstractContextManager[Any]:
    """Return the lock that Numba's workqueue layer needs: two callers at once abort the process."""
    try:
        return _lock if numba.threading_layer() == "workqueue" else nullcontext()
    except ValueError:  # no layer has been chosen yet: this call chooses
        return _lock
