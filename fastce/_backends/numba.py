"""The kernels in Numba: the same algorithm as the C body (``_native/row_body.inc``), which explains it.

What is different, and why:

- Numba's vectoriser is not asked for anything. Loops run over explicit vectors of 512 bits, which LLVM
  splits where the machine's are shorter, so the order of every sum is the same on every machine. The
  type `_Vector` carries them through jitted functions; `_Value` lets the intrinsics that work on
  them read as arithmetic.
- An intrinsic costs next to nothing to compile, a jitted function 30 to 100 ms for each signature. So
  there are few jitted functions, and what is straight-line code is an intrinsic.
- A kernel is a C function of (logits, job, item, worker), compiled for one dtype when it is first
  called. The loops over items, serial and parallel, call it by its address: so they compile once.
- Arrays reach the kernels as addresses and strides: one signature, whatever the caller's layout.
- Helpers are module-level functions: Numba never caches closures on disk.
- Only gradient rows of 16 KiB to 2^18 classes side by side are stored past the caches; elsewhere that
  takes longer.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import platform
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

from fastce.kernels import Kernels, tile_rows

_OPTIONS: dict[str, Any] = {"error_model": "numpy"}  # strict arithmetic: no fastmath flags

_BLOCK = 1024  # classes read at a time: 4 or 8 KiB, which stay in L1 between maximum and sum
_NARROW = 32  # rows of at most this many classes are computed with rows as lanes
_MAX_LEAD = 8.0  # how far the maximum may run ahead of the reference of a row's sum
_PART = 2**18  # longer rows are cut into parts of so many classes, which threads share
_MAX_SCALE = 2.0**60  # above, the exponentials kept for the gradient do not reach low enough
_L1_CLASSES = 1024  # classes of short rows that are read before any is summed
_PITCH = _BLOCK + 16  # between the rows of a transposed block; an odd number of lines, for L1's sake
_STREAM_BYTES = 2**14  # gradients of shorter rows are not stored past the caches: it takes longer
_SPARE_WORDS = 2**20  # of scratch that a thread keeps from call to call
_FETCHED, _FETCHED_BYTES = 256, 2**19  # the most rows that are transposed together; and their size

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
_MIN_EXPONENT = {32: -126, 64: -1022}
_SUM_SHIFT = {32: 64, 64: 512}
_SUM_FLOOR = {32: -131.0, 64: -1060.0}
# A gradient's factor below the first is lifted by 2^second while it is applied.
_SMALL = {32: 2.0**-40, 64: 2.0**-300}
_LIFT = {32: 96, 64: 600}
# Vectors worked on as one value: LLVM splits it, and so interleaves them. On AVX-512 four take a sixth
# less time than one after the other; eight spill registers, and take as long again.
_TOGETHER = 4 if get_host_cpu_features().get("avx512f") else 2
_LOG1P = (
    "0x1.2f0d58deeae08p-3 0x1.39a0fac5a8dd7p-3 0x1.746645ede9703p-3 0x1.c71c51e94c1b1p-3"
    " 0x1.2492494215c0ap-2 0x1.999999997fb5ap-2 0x1.5555555555593p-1"
)


# ---- Vectors in Numba's type system, and intrinsics that work on them ----


class _Vector(types.Type):
    """A vector of numbers, held in registers."""

    def __init__(self, dtype: types.Type, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(f"vector({dtype}, {lanes})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, of: _Vector) -> None:
        element = manager.lookup(of.dtype).get_value_type()
        super().__init__(manager, of, ir.VectorType(element, of.lanes))


class _Value:
    """A number or vector in LLVM, under Python's operators. A scalar operand counts for every lane."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    @property
    def type(self) -> Any:
        return self.value.type

    @property
    def lanes(self) -> int:
        """The number of lanes; 0 of a scalar."""
        return self.type.count if isinstance(self.type, ir.VectorType) else 0

    @property
    def element(self) -> Any:
        return self.type.element if self.lanes else self.type

    @property
    def is_real(self) -> bool:
        return isinstance(self.element, ir.FloatType | ir.DoubleType)

    @property
    def bits(self) -> int:
        if self.is_real:
            return 32 if isinstance(self.element, ir.FloatType) else 64
        return int(self.element.width)

    def of(self, value: Any) -> _Value:
        """Return a value as an operand of this one's type."""
        if isinstance(value, str):
            value = float.fromhex(value)
        if not isinstance(value, _Value):
            values = [value] * self.lanes if self.lanes else value
            return _Value(self.builder, ir.Constant(self.type, values))
        return value.splat(self.lanes) if self.lanes and not value.lanes else value

    def splat(self, lanes: int) -> _Value:
        vector = ir.VectorType(self.type, lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, self.value, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return _Value(self.builder, self.builder.shuffle_vector(first, undefined, zeros))

    def _binary(self, other: Any, real: str, integer: str, swapped: bool = False) -> _Value:
        if isinstance(other, _Value) and other.lanes and not self.lanes:
            return other.of(self)._binary(other, real, integer, swapped)
        pair = (self.value, self.of(other).value)
        operation = getattr(self.builder, real if self.is_real else integer)
        return _Value(self.builder, operation(*(reversed(pair) if swapped else pair)))

    def __add__(self, other: Any) -> _Value:
        return self._binary(other, "fadd", "add")

    def __sub__(self, other: Any) -> _Value:
        return self._binary(other, "fsub", "sub")

    def __mul__(self, other: Any) -> _Value:
        return self._binary(other, "fmul", "mul")

    def __truediv__(self, other: Any) -> _Value:
        return self._binary(other, "fdiv", "")

    def __and__(self, other: Any) -> _Value:
        return self._binary(other, "", "and_")

    def __or__(self, other: Any) -> _Value:
        return self._binary(other, "", "or_")

    def __lshift__(self, other: Any) -> _Value:
        return self._binary(other, "", "shl")

    def __rshift__(self, other: Any) -> _Value:
        return self._binary(other, "", "lshr")

    def __neg__(self) -> _Value:
        return _Value(self.builder, self.builder.fneg(self.value))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> _Value:
        return self._binary(other, "fsub", "sub", swapped=True)

    def __rtruediv__(self, other: Any) -> _Value:
        return self._binary(other, "fdiv", "", swapped=True)

    def compare(self, operator: str, other: Any, or_nan: bool = False) -> _Value:
        """Compare; integers as signed ones. With a NaN the answer is ``or_nan``."""
        b = self.builder
        name = ("fcmp_unordered" if or_nan else "fcmp_ordered") if self.is_real else "icmp_signed"
        return _Value(b, getattr(b, name)(operator, self.value, self.of(other).value))

    def select(self, yes: Any, no: Any) -> _Value:
        """Return ``yes`` where this is true, else ``no``; one of them is a `_Value`."""
        like = yes if isinstance(yes, _Value) else no
        if self.lanes and not like.lanes:
            like = like.splat(self.lanes)
        pair = [like.of(v).value for v in (yes, no)]
        return _Value(self.builder, self.builder.select(self.value, *pair))

    def as_type(self, conversion: str, element: Any) -> _Value:
        """Apply an LLVM conversion to each lane."""
        target = ir.VectorType(element, self.lanes) if self.lanes else element
        if target == self.type:
            return self
        return _Value(self.builder, getattr(self.builder, conversion)(self.value, target))

    def as_bits(self) -> _Value:
        return self.as_type("bitcast", ir.IntType(self.bits))

    def as_real(self) -> _Value:
        """Read the bits of an integer as a float."""
        return self.as_type("bitcast", ir.FloatType() if self.bits == 32 else ir.DoubleType())

    def double(self) -> _Value:
        return self.as_type("fpext", ir.DoubleType()) if self.bits == 32 else self

    def rounded(self, bits: int) -> _Value:
        return self.as_type("fptrunc", ir.FloatType()) if bits < self.bits else self

    def call(self, name: str, *others: Any) -> _Value:
        """Call an LLVM intrinsic on values of one type."""
        values = [self.value, *(self.of(v).value for v in others)]
        letters = {"float": "f32", "double": "f64"}
        suffix = letters.get(str(self.element), f"i{self.bits}")
        function = _declare(
            self.builder,
            f"llvm.{name}.{f'v{self.lanes}' if self.lanes else ''}{suffix}",
            ir.FunctionType(self.type, [self.type] * len(values)),
        )
        return _Value(self.builder, self.builder.call(function, values))

    def shuffled(self, other: _Value, lanes: list[int]) -> _Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return _Value(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))

    def repeated(self, lanes: int) -> _Value:
        times = lanes // self.lanes
        return self if times == 1 else self.shuffled(self, [*range(self.lanes)] * times)

    def halves(self) -> tuple[_Value, _Value]:
        half = self.lanes // 2
        low, high = list(range(half)), list(range(half, 2 * half))
        return self.shuffled(self, low), self.shuffled(self, high)

    def lane(self, i: int) -> _Value:
        return _Value(self.builder, self.builder.extract_element(self.value, ir.IntType(32)(i)))


class _Pointer:
    """Memory that holds numbers of one dtype; uint16 stands for bfloat16, int16 for float16."""

    def __init__(self, builder: Any, value: Any, dtype: types.Type) -> None:
        self.builder, self.value, self.dtype = builder, value, dtype
        self.lanes = _lanes_of(dtype)
        self.memory = value.type.pointee

    def _at(self, index: Any, lanes: int) -> Any:
        index = index.value if isinstance(index, _Value) else ir.IntType(64)(index)
        at = self.builder.gep(self.value, [index])
        memory = ir.VectorType(self.memory, lanes) if lanes else self.memory
        return self.builder.bitcast(at, memory.as_pointer())

    @property
    def _align(self) -> int:
        return int(self.dtype.bitwidth) // 8

    def load(self, index: Any, lanes: int | None = None) -> _Value:
        """Load a vector or, with no lanes, a scalar, in the dtype that is computed in."""
        at = self._at(index, self.lanes if lanes is None else lanes)
        return self._widened(_Value(self.builder, self.builder.load(at, align=self._align)))

    def load_where(self, mask: _Value, index: Any, fill: float) -> _Value:
        """Load the lanes where the mask is true; the others are not read."""
        at = self._at(index, mask.lanes)
        vector = at.type.pointee
        other: Any = _half_bits(fill, self.dtype) if self.dtype in _HALVES else fill
        others = ir.Constant(vector, [other] * mask.lanes)
        operands = [at, ir.IntType(32)(self._align), mask.value, others]
        signature = ir.FunctionType(vector, [operand.type for operand in operands])
        function = _declare(self.builder, f"llvm.masked.load.{_suffix(vector)}.p0", signature)
        return self._widened(_Value(self.builder, self.builder.call(function, operands)))

    def store(self, index: Any, value: _Value, past_caches: bool = False) -> None:
        value = self._narrowed(value)
        at = self._at(index, value.lanes)
        if not past_caches:
            self.builder.store(value.value, at, align=self._align)
            return
        store = self.builder.store(value.value, at, align=value.lanes * self._align)
        one = self.builder.module.add_metadata([ir.IntType(32)(1)])
        store.set_metadata("nontemporal", one)

    def store_where(self, mask: _Value, index: Any, value: _Value) -> None:
        value = self._narrowed(value)
        at = self._at(index, value.lanes)
        operands = [value.value, at, ir.IntType(32)(self._align), mask.value]
        signature = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        name = f"llvm.masked.store.{_suffix(value.type)}.p0"
        self.builder.call(_declare(self.builder, name, signature), operands)

    def prefetch(self, index: Any, to_write: bool = False) -> None:
        at = self.builder.bitcast(self._at(index, 0), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [at.type, number, number, number])
        function = _declare(self.builder, "llvm.prefetch.p0", signature)
        self.builder.call(function, [at, number(int(to_write)), number(3), number(1)])

    def _widened(self, v: _Value) -> _Value:
        if self.dtype == types.uint16:
            return (v.as_type("zext", ir.IntType(32)) << 16).as_real()
        if self.dtype == types.int16:
            return _half_to_float(v)
        return v

    def _narrowed(self, v: _Value) -> _Value:
        if self.dtype in _HALVES:
            v = v.rounded(32)
        if self.dtype == types.uint16:  # to nearest, ties to even; no overflow into -0: see numpy.py
            bits = v.as_bits()
            rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
            return (rounded >> 16).as_type("trunc", ir.IntType(16))
        if self.dtype == types.int16:
            return _float_to_half(v)
        return v.rounded(self.dtype.bitwidth)


# Without an instruction for it LLVM calls a function that is not there, and ends the process.
_CONVERTS_HALVES = not (numba.config.CPU_NAME or numba.config.CPU_FEATURES) and (
    get_host_cpu_features().get("f16c", False) or platform.machine() in ("arm64", "aarch64")
)


def _half_to_float(v: _Value) -> _Value:
    if _CONVERTS_HALVES:
        return v.as_type("bitcast", ir.HalfType()).as_type("fpext", ir.FloatType())
    bits = v.as_type("zext", ir.IntType(32))
    size = (bits & 0x7FFF) << 13
    finite = (size.as_real() * 2.0**112).as_bits()
    size = size.compare("<", 0x0F800000).select(finite, size | 0x7F800000)
    return (size | ((bits & 0x8000) << 16)).as_real()


def _float_to_half(v: _Value) -> _Value:
    """Round to nearest, ties to even."""
    if _CONVERTS_HALVES:
        return v.as_type("fptrunc", ir.HalfType()).as_type("bitcast", ir.IntType(16))
    bits = v.as_bits()
    size = bits & 0x7FFFFFFF
    normal = (size + (((size >> 13) & 1) + (0xFFF - (112 << 23)))) >> 13
    # the last place of 0.5 is the smallest half
    small = (size.as_real() + 0.5).as_bits() - 0x3F000000
    half = size.compare("<", 0x38800000).select(small, normal)
    half = size.compare(">=", 0x477FF000).select(half.of(0x7C00), half)
    half = size.compare(">", 0x7F800000).select(half.of(0x7E00), half)
    return (half | ((bits >> 16) & 0x8000)).as_type("trunc", ir.IntType(16))


_HALVES = (types.uint16, types.int16)


def _half_bits(value: float, dtype: types.Type) -> int:
    if dtype == types.int16:
        return int(np.float16(value).view(np.int16))
    return int(np.float32(value).view(np.uint32) >> 16)


def _suffix(vector: Any) -> str:
    letters = {"float": "f32", "double": "f64"}
    return f"v{vector.count}{letters.get(str(vector.element), str(vector.element))}"


def _declare(builder: Any, name: str, signature: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, signature, name)


def _computed(dtype: types.Type) -> types.Type:
    return types.float64 if dtype == types.float64 else types.float32


def _lanes_of(dtype: types.Type) -> int:
    return 8 if dtype == types.float64 else 16


# Types of an intrinsic's result, from its first argument, a pointer or a vector.
def _vector(first: Any, *_: Any) -> types.Type:
    return _Vector(_computed(first.dtype), _lanes_of(first.dtype))


def _doubles(first: Any, *_: Any) -> types.Type:
    lanes = first.lanes if isinstance(first, _Vector) else _lanes_of(first.dtype)
    return _Vector(types.float64, lanes)


def _mask(first: Any, *_: Any) -> types.Type:
    return _Vector(types.boolean, _lanes_of(first.dtype))


def _same(first: types.Type, *_: Any) -> types.Type:
    return first


_none: types.Type = types.void


def _several(*results: Any) -> Callable[..., types.Type]:
    return lambda *args: types.Tuple([_result(result, args) for result in results])


def _result(result: Any, args: Any) -> types.Type:
    made: types.Type = result if isinstance(result, types.Type) else result(*args)
    return made


def _emits(result: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of a function over `_Value` and `_Pointer`; ``result`` is or makes its type."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(typingctx: Any, *args: Any) -> Any:
            returned = _result(result, args)

            def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                operands = map(_operand, [builder] * len(args), values, args)
                out = emit(*operands)
                if isinstance(out, tuple):
                    return context.make_tuple(builder, returned, [v.value for v in out])
                return context.get_dummy_value() if out is None else out.value

            return returned(*args), codegen

        typed.__name__ = emit.__name__
        parameters = list(inspect.signature(emit).parameters.values())
        context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        typed.__signature__ = inspect.Signature([context, *parameters])
        return intrinsic(typed)

    return decorate


def _operand(builder: Any, value: Any, kind: types.Type) -> Any:
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.CPointer):
        return _Pointer(builder, value, kind.dtype)
    return _Value(builder, value)


# ---- Arithmetic: of scalars and vectors alike ----


def _fma(a: _Value, b: Any, c: Any) -> _Value:
    """Return a * b + c, fused where the machine can; right either way."""
    return a.call("fmuladd", b, c)


def _two_sum(a: _Value, b: _Value) -> tuple[_Value, _Value]:
    s = a + b
    b1 = s - a
    return s, (a - (s - b1)) + (b - b1)


def _term(x: _Value, ref: _Value) -> tuple[_Value, _Value]:
    """exp(x - ref) * 2^_SUM_SHIFT, and where it counts; elsewhere it is 0 to any sum or gradient."""
    bits = x.bits
    d = x - ref
    x1 = d + ref
    r = (x - x1) - (ref - (x1 - d))
    # Adding it rounds to an integer; the low bits are then the exponent of the result, bias included.
    magic_number = 1.5 * 2.0 ** _MANTISSA[bits] + _BIAS[bits] + _SUM_SHIFT[bits]
    magic = _fma(d, _LOG2E[bits], x.of(magic_number))
    n = magic - magic_number
    y = _fma(n, -float.fromhex(_LN2_HI[bits]), d) + _fma(n, -float.fromhex(_LN2_LO[bits]), r)
    first, *others = _POLY[bits].split()
    poly = y.of(first)
    for coefficient in others:
        poly = _fma(poly, y, coefficient)
    t = _fma(poly, y * y, y)
    power = (magic.as_bits() << _MANTISSA[bits]).as_real()
    return _fma(t, power, power), d.compare(">=", _SUM_FLOOR[bits], or_nan=True)


def _log1p(s: _Value, bits: int) -> _Value:
    """log(1 + s) of doubles >= 0; good to 2^-28 where the result is rounded to 32 bits."""
    u = s + 1.0
    sqrt_half, one = 0x3FE6A09E667F3BCD, 0x3FF0000000000000
    b = u.as_bits() + (one - sqrt_half)
    # as the low bits of 2^52 an exponent becomes a double without a conversion
    k = ((b >> 52) | 0x4330000000000000).as_real() - (2.0**52 + 1023.0)
    z1 = ((b & 0xFFFFFFFFFFFFF) + sqrt_half).as_real()
    near = k.compare("==", 0.0)
    f = near.select(s, z1 - 1.0)
    half = f * f * 0.5
    first, *others = _LOG1P.split()[-4 if bits == 32 else 0 :]
    if bits == 32:  # a division of doubles takes as long as 16 products
        guess = ((f + 2.0).rounded(32).of(1.0) / (f + 2.0).rounded(32)).double()
        q = f * (guess * (2.0 - (f + 2.0) * guess))
        fix = s.of(0.0)
    else:
        q = f / (f + 2.0)
        lost = s.compare("<", 1.0).select(s - (u - 1.0), 1.0 - (u - s))
        fix = near.select(0.0, lost / u)
    z = q * q
    tail = z.of(first)
    for coefficient in others:
        tail = _fma(tail, z, coefficient)
    low = q * (half + tail * z) + (k * float.fromhex(_LN2_LO[64]) + fix)
    result = k * float.fromhex(_LN2_HI[64]) + (f - (half - low))
    return s.compare("<", math.inf).select(result, s)


def _transposed(rows: list[_Value]) -> list[_Value]:
    """Transpose as many vectors as each has lanes: swap one bit of the two indices at a time."""
    n, step = len(rows), 1
    while step < n:
        low = [j + (n - step) * bool(j & step) for j in range(n)]
        high = [j + n if j & step else j + step for j in range(n)]
        for i in range(n):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = a.shuffled(b, low), a.shuffled(b, high)
        step *= 2
    return rows


# ---- Intrinsics: memory ----


def _cast(dtype: Callable[[Any], types.Type]) -> Any:
    """Make an intrinsic that turns an address into a pointer; its type may depend on another one's."""

    def address_to_pointer(typingctx: Any, address: Any, like: Any) -> Any:
        pointer = types.CPointer(dtype(like))

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer))

        return pointer(types.int64, like), codegen

    return intrinsic(address_to_pointer)


_pointer_like = _cast(lambda like: like.dtype)
_reals_like = _cast(lambda like: _computed(like.dtype))
_float64s = _cast(lambda like: types.float64)
_int64s = _cast(lambda like: types.int64)


@_emits(_same)
def _at(pointer, offset):
    pointer.value = pointer.builder.gep(pointer.value, [offset.value])
    return pointer


@_emits(lambda pointer, *_: _computed(pointer.dtype))
def _get(pointer, i):
    return pointer.load(i, 0)


@_emits(_none)
def _set(pointer, i, value):
    pointer.store(i, value)


@_emits(types.int64)
def _size(pointer, n):
    """Return the bytes of n elements."""
    return n * (int(pointer.dtype.bitwidth) // 8)


@_emits(types.int64)
def _lanes(pointer):
    return _Value(pointer.builder, ir.IntType(64)(pointer.lanes))


@_emits(types.int64)
def _address_in(pointer, i):
    return _Value(pointer.builder, pointer.builder.ptrtoint(pointer._at(i, 0), ir.IntType(64)))


@_emits(types.float64)
def _sum_unit(pointer):
    return _Value(pointer.builder, ir.DoubleType()(2.0 ** -_SUM_SHIFT[_bits_of(pointer)]))


def _bits_of(pointer: _Pointer) -> int:
    return int(_computed(pointer.dtype).bitwidth)


@_emits(_vector)
def _vector_at(pointer, i):
    return pointer.load(i)


@_emits(_doubles)
def _doubles_at(pointer, doubles, i):
    """As many doubles as a vector of the pointer's has lanes."""
    return doubles.load(i, pointer.lanes)


@_emits(_vector)
def _reals_at(pointer, doubles, i):
    """Return the same as the dtype that is computed in; they are numbers of it."""
    return doubles.load(i, pointer.lanes).rounded(_bits_of(pointer))


@_emits(lambda pointer, *_: _Vector(types.int64, _lanes_of(pointer.dtype)))
def _int64s_at(pointer, integers, i):
    return integers.load(i, pointer.lanes)


@_emits(types.boolean)
def _is_half(pointer):
    return _Value(pointer.builder, ir.IntType(1)(int(pointer.dtype.bitwidth == 16)))


@_emits(_mask)
def _first_lanes(pointer, n):
    return _first(pointer, n)


def _first(pointer: _Pointer, n: _Value) -> _Value:
    """Return the mask of the first n lanes."""
    index = ir.Constant(ir.VectorType(ir.IntType(32), pointer.lanes), list(range(pointer.lanes)))
    few = n.as_type("trunc", ir.IntType(32))
    return _Value(pointer.builder, index).compare("<", few)


@_emits(_vector)
def _splat(pointer, value):
    """Return a vector of the dtype that is computed in, from a double that is a number of it."""
    return value.rounded(_bits_of(pointer)).splat(pointer.lanes)


@_emits(_doubles)
def _splat_double(pointer, value):
    return value.splat(pointer.lanes)


@_emits(_none)
def _store(pointer, i, value):
    pointer.store(i, value)


@_emits(_none)
def _store_where(pointer, mask, i, value):
    pointer.store_where(mask, i, value)


@_emits(_vector)
def _load_where(pointer, mask, i):
    return pointer.load_where(mask, i, 0.0)


@_emits(_none)
def _transpose_in(source, step, ahead, n_vectors, n_lanes, out, out_step):
    """Load vectors ``step`` apart, transpose, and store them ``out_step`` apart; fetch those ``ahead``.

    Only the first n_lanes of the first n_vectors are read; every lane of every vector is written.
    """
    mask, last = _first(source, n_lanes), n_vectors - 1
    rows = []
    for i in range(source.lanes):
        index = last.compare("<", i).select(last, last.of(i))  # a missing vector repeats the last
        rows.append(source.load_where(mask, index * step, 0.0))
        source.prefetch(index * step + ahead)
    for i, column in enumerate(_transposed(rows)):
        out.store(out_step * i, column)


@_emits(_none)
def _transpose_out(source, source_step, out, step, ahead, n_vectors, n_lanes):
    """Do the reverse: only the first n_lanes of the first n_vectors are written."""
    columns = [source.load(source_step * i) for i in range(source.lanes)]
    for i, row in enumerate(_transposed(columns)):
        lanes = n_vectors.compare(">", i).select(n_lanes, n_lanes.of(0))
        out.prefetch(step * i + ahead, to_write=True)
        out.store_where(_first(out, lanes), step * i, row)


def _zips(n: int) -> Any:
    """Make the steps that take apart, and join, as many rows of n classes as a vector has lanes."""

    @_emits(_none)
    def unzip(source, out):
        rows = source.load(0, n * source.lanes)
        source.prefetch(_BLOCK)
        for c in range(n):
            out.store(c * source.lanes, rows.shuffled(rows, list(range(c, n * source.lanes, n))))

    @_emits(_none)
    def zip_(source, out):
        classes = source.load(0, n * source.lanes)
        lanes = [c * source.lanes + r for r in range(source.lanes) for c in range(n)]
        out.store(0, classes.shuffled(classes, lanes))

    return unzip, zip_


(_unzip2, _zip2), (_unzip4, _zip4) = map(_zips, (2, 4))


# ---- Intrinsics: the steps of a pass over classes ----


def _larger(a: _Value, b: _Value) -> _Value:
    """Pass over a NaN in ``a``: the sum finds it."""
    return a.compare(">", b).select(a, b)


@_emits(_same)
def _larger_of(a, b):
    return _larger(a, b)


@_emits(_vector)
def _larger_strip(x, i, top):
    """Return the largest of ``top`` and eight vectors from i on, lane by lane."""
    strip = x.load(i, 8 * x.lanes)
    while strip.lanes > x.lanes:
        strip = _larger(*strip.halves())
    return _larger(strip, top)


@_emits(_vector)
def _larger_one(x, i, top):
    return _larger(x.load(i), top)


@_emits(_vector)
def _larger_end(x, i, left, top):
    return _larger(x.load_where(_first(x, left), i, -math.inf), top)


@_emits(types.float64)
def _largest_lane(top):
    while top.lanes > 1:
        top = _larger(*top.halves())
    return top.lane(0).double()


def _terms(count: int) -> Any:
    """Make the step that reads ``count`` vectors and adds their exponentials."""

    @_emits(_several(_vector, _vector))
    def terms(x, i, ref, m, e, ties):
        """Sum exp(x - ref) over the classes below m, and count in ``ties`` those equal to m.

        The exponentials are stored in e, if it is given: all of them. Without m all classes count.
        """
        together = min(count, _TOGETHER)
        sums, tied = [], []
        for k in range(0, count, together):
            at = i + k * x.lanes
            v = x.load(at, together * x.lanes)
            for line in range(together):
                x.prefetch(at + (_BLOCK + line * x.lanes))  # where the reader will be next
                if e:  # in a gradient that is not in the caches
                    e.prefetch(at + (_BLOCK + line * x.lanes), to_write=True)
            term, counted = _counted_term(v, ref, m, e and (lambda t, at=at: e.store(at, t)))
            sums.append(term)
            tied.append(counted)
        return _folded(sums, x.lanes), ties if m is None else ties + _folded(tied, x.lanes)

    return terms


def _folded(values: list[_Value], lanes: int) -> _Value:
    """Add vectors, first half to second half, until one of so many lanes is left."""
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    value = values[0]
    while value.lanes > lanes:
        low, high = value.halves()
        value = low + high
    return value


def _counted_term(v: _Value, ref: _Value, m: _Value | None, store: Any) -> tuple[_Value, _Value]:
    term, counts = _term(v, ref.repeated(v.lanes))
    if store:
        store(counts.select(term, 0.0))
    if m is None:
        return counts.select(term, 0.0), v
    m = m.repeated(v.lanes)
    tied = v.compare(">=", m).select(v.of(1.0), 0.0)
    return (counts & v.compare("<", m, or_nan=True)).select(term, 0.0), tied


_terms4, _terms2, _terms1 = map(_terms, (4, 2, 1))


@_emits(_several(_vector, _vector))
def _terms_end(x, i, left, ref, m, e, ties):
    """Do the same with the last classes of a row, fewer than a vector holds."""
    mask = _first(x, left)
    v = x.load_where(mask, i, -math.inf)
    # a lane without a class may equal a maximum of -inf, and is no tie
    m = m and mask.select(m, math.inf)
    term, tied = _counted_term(v, ref, m, e and (lambda t: e.store_where(mask, i, t)))
    return term, ties if m is None else ties + tied


@_emits(_same)
def _plus(a, b):
    return a + b


@_emits(_several(_same, _same))
def _add(total, carry, part):
    """Add to a sum of doubles, where float32 has 29 bits to spare; float64 carries its errors."""
    if part.bits == 32:
        return total + part.double(), carry
    total, error = _two_sum(total, part)
    return total, carry + error


@_emits(_several(_same, _same))
def _add_exactly(total, carry, part):
    total, error = _two_sum(total, part)
    return total, carry + error


@_emits(_several(types.float64, types.float64))
def _sum_lanes(total, carry):
    while total.lanes > 1:
        low, high = carry.halves()
        total, error = _two_sum(*total.halves())
        carry = low + high + error
    return total.lane(0), carry.lane(0)


@_emits(types.float64)
def _count_lanes(ties):
    while ties.lanes > 1:
        low, high = ties.halves()
        ties = low + high
    return ties.lane(0).double()


@_emits(_several(types.float64, types.float64))
def _two_sum_of(a, b):
    return _two_sum(a, b)


@_emits(_same)
def _total_of(total, carry, ties):
    """Return the sum over all classes but one maximum, from sums of terms, and the ties."""
    unit = 2.0 ** -_SUM_SHIFT[ties.bits]
    return (total + carry) * unit + (ties.double() - 1.0)


@_emits(lambda x, m, *_: types.Tuple([m] * 3))
def _parts_of_loss(x, m, target_logit, rest):
    """gap, gap_error and rest of rows, all doubles; gap is NaN in a row that is not finite."""
    if _bits_of(x) == 32:
        gap, error = m - target_logit, m.of(0.0)  # 29 bits to spare
    else:
        gap, error = _two_sum(m, -target_logit)
    finite = m.compare(">", -math.inf) & m.compare("<", math.inf) & rest.compare("ord", rest)
    gap = finite.select(gap, math.nan)
    return gap, gap.compare("<", math.inf).select(error, 0.0), finite.select(rest, 0.0)


@_emits(lambda x, gap, *_: gap)
def _loss(x, gap, error, rest):
    return gap + (error + _log1p(rest, _bits_of(x)))


# ---- Intrinsics: the gradient ----


def _factor(bits: int, scale: _Value, rest: _Value, drop: _Value, again: _Value, error: _Value) -> Any:
    """Return hi, lo, down and least: a term e becomes e * (hi + lo) * down, or 0 if it is below least.

    The product is scale / (1 + rest) * drop * again * (1 + error) / 2^_SUM_SHIFT. Where it is small, it
    is lifted, and ``down`` takes that back: neither it nor any product of it that counts is then less
    than a normal number.
    """
    total = rest + 1.0
    unit = scale / total
    shift, lift = _SUM_SHIFT[bits], _LIFT[bits]
    size = (unit * drop * again).call("fabs")
    small = size.compare("<", _SMALL[bits])
    down = small.select(size.of(2.0**-lift), 1.0)
    up = small.select(size.of(2.0 ** (lift - shift)), 2.0**-shift)
    hi = unit * up * drop * again
    if bits == 32:
        lo = hi.of(0.0)
    else:
        # what the sum and the quotient rounded away, relative to the quotient
        lost = rest.compare("<", 1.0).select(rest - (total - 1.0), 1.0 - (total - rest))
        lo = hi * (((-unit).call("fma", total, scale) / unit - lost) / total + error)
        lo = unit.compare("==", 0.0).select(0.0, lo)
    hi, lo, down = (v.rounded(bits) for v in (hi, lo, down))
    tiny = small.select(hi.of(2.0 ** (_MIN_EXPONENT[bits] + lift)), 2.0 ** _MIN_EXPONENT[bits])
    return hi, lo, down, tiny / hi.call("fabs")


def _minus_others(gap: _Value, e: _Value, rest: _Value, scale: _Value, bits: int) -> _Value:
    """Minus the sum of the others; e is exp of the target's logit minus the maximum."""
    total = rest + 1.0
    # Where the target is not the maximum, the maximum's 1 stays: total - e cannot cancel.
    others = gap.compare(">", 0.0).select(total - e, rest)
    # `_factor` divides scale by total anyway; in double it is not exact enough where others == total
    share = scale / total * others if bits == 32 else scale * (others / total)
    return 0.0 - share  # 0 - 0 is not -0


def _gradient(e: _Value, factor: tuple[_Value, ...]) -> _Value:
    hi, lo, down, least = factor
    # before the product, which would cost 100 cycles if it were subnormal; a NaN stays one
    e = e.compare(">=", least, or_nan=True).select(e, 0.0)
    p = e * hi if e.bits == 32 else _fma(e, hi, e * lo)
    return p * down


def _real_of(pointer: Any, *_: Any) -> types.Type:
    return _computed(pointer.dtype)


@_emits(_several(_real_of, _real_of, _real_of, _real_of))
def _row_factor(e, scale, rest, drop, again, error):
    return _factor(_bits_of(e), scale, rest, drop, again, error)


def _scales(count: int, past_caches: bool = False) -> Any:
    """Make the step that turns ``count`` vectors of exponentials into gradients."""

    @_emits(_none)
    def scale_strip(e, i, hi, lo, down, least, g):
        exps = [e.load(i + k * e.lanes) for k in range(count)]
        for k, v in enumerate(exps):
            g.store(i + k * e.lanes, _gradient(v, (hi, lo, down, least)), past_caches)

    return scale_strip


_scale4, _scale1, _scale4_past_caches = _scales(4), _scales(1), _scales(4, past_caches=True)


@_emits(_none)
def _scale_some(e, i, n, hi, lo, down, least, g):
    mask = _first(e, n)
    g.store_where(mask, i, _gradient(e.load_where(mask, i, 0.0), (hi, lo, down, least)))


@_emits(lambda kept, g, direct: types.CPointer(_computed(kept.dtype)))
def _terms_place(kept, g, direct):
    """Where a row's exponentials go: into its gradient, if that may hold them."""
    if g.dtype == kept.dtype:
        kept.value = kept.builder.select(direct.value, g.value, kept.value)
    return kept


@_emits(types.float64)
def _target_gradient(gap, e, rest, scale):
    """Minus the sum of the others; e is exp of the target's logit minus the maximum."""
    return _minus_others(gap, e, rest, scale, 64)


@_emits(types.int64)
def _to_next_line(pointer):
    """How many elements lie between here and the next multiple of 64 bytes."""
    b = pointer.builder
    address = _Value(b, b.ptrtoint(pointer.value, ir.IntType(64)))
    size = int(pointer.dtype.bitwidth) // 8
    return ((0 - address) & 63) >> (size.bit_length() - 1)


@_emits(_none)
def _fence(pointer):
    """Order stores past the caches before what follows."""
    pointer.builder.fence("seq_cst")


# ---- Intrinsics: ranks ----


def _counts(operator: str) -> Any:
    @_emits(_doubles)
    def count(x, i, pivot, counts):
        return x.load(i).compare(operator, pivot).select(counts + 1.0, counts)

    @_emits(_doubles)
    def count_end(x, i, left, pivot, counts):
        v = x.load_where(_first(x, left), i, math.nan)
        return v.compare(operator, pivot).select(counts + 1.0, counts)

    return count, count_end


(_count_ahead, _count_ahead_end), (_count_tied, _count_tied_end) = map(_counts, (">", ">="))


# ---- Intrinsics: rows as lanes ----


def _integers(x: Any, *_: Any) -> types.Type:
    return _Vector(types.int64 if _lanes_of(x.dtype) == 8 else types.int32, _lanes_of(x.dtype))


@_emits(_several(_mask, _integers, types.int64))
def _read_targets(x, targets, i, count, n):
    """Which of ``count`` rows are kept, their targets, -1 in the others, and how many are ignored."""
    mask = _first(x, count)
    t = targets.load_where(mask, i, -1)
    kept = t.compare(">=", 0) & t.compare("<", n)
    bits = _Value(x.builder, x.builder.bitcast(kept.value, ir.IntType(x.lanes)))
    n_kept = bits.call("ctpop").as_type("zext", ir.IntType(64))
    return kept, kept.select(t.as_type("trunc", ir.IntType(_bits_of(x))), -1), count - n_kept


@_emits(_same)
def _where_class(current, target, c, value):
    """``value`` in the lanes whose target is class c, else what they hold."""
    return _is_class(target, c).select(value, current)


def _is_class(target: _Value, c: _Value, operator: str = "==") -> _Value:
    return target.compare(operator, c.as_type("trunc", target.element))


@_emits(_same)
def _finite_or_zero(m):
    return m.compare(">", -math.inf).select(m, 0.0)


@_emits(_doubles)
def _as_doubles(v):
    return v.double()


@_emits(_same)
def _keep(v, kept):
    return kept.select(v, 0.0)


@_emits(_none)
def _narrow_gradient(work, c, kept, target, target_gradient, hi, lo, down, least):
    """Replace the exponentials of class c by gradients."""
    at = c * work.lanes
    p = _gradient(work.load(at), (hi, lo, down, least))
    p = _is_class(target, c).select(target_gradient, p)
    work.store(at, kept.select(p, 0.0))


@_emits(_several(_vector, _vector, _vector, _vector, _vector))
def _lane_factors(x, gap, target_term, rest, scale):
    """Return the rows' factors and their targets' gradients; NaN in rows that are not finite."""
    bits = _bits_of(x)
    finite = gap.compare("ord", gap)
    scale = finite.select(scale, math.nan)
    factor = _factor(bits, scale, rest, scale.of(1.0), scale.of(1.0), scale.of(0.0))
    e = target_term.double() * 2.0 ** -_SUM_SHIFT[bits]
    return *factor, _minus_others(gap, e, rest, scale, bits).rounded(bits)


@_emits(_same)
def _rank_lanes(ranks, x, target_logit, target, c):
    """Count class c where it is ahead of the target."""
    before = _is_class(target, c, ">") & x.compare("==", target_logit)
    ahead = x.compare(">", target_logit) | before
    return ahead.select(ranks + 1, ranks)


@_emits(_none)
def _store_ranks(pointer, i, n, ranks, gap, kept, like):
    good = kept & gap.compare("ord", gap)
    pointer.store_where(_first(like, n), i, good.select(ranks, -1))


@_emits(lambda x: _Vector(types.int64, _lanes_of(x.dtype)))
def _no_ranks(x):
    return _Value(x.builder, ir.Constant(ir.VectorType(ir.IntType(64), x.lanes), [0] * x.lanes))


@_emits(types.boolean)
def _any_at_least(v, limit):
    """Whether |v| >= limit, or is NaN, in some lane."""
    mask = v.call("fabs").compare(">=", limit, or_nan=True).as_type("zext", ir.IntType(32))
    while mask.lanes > 1:
        low, high = mask.halves()
        mask = low | high
    return mask.lane(0).compare("!=", 0)


# ---- What a kernel is given ----

# Addresses, strides in elements, and numbers; one 64-bit integer each.
_JOB = (
    *("x", "x_outer", "x_inner", "x_class", "inner", "first_row", "n_rows", "n_classes"),
    *("targets", "losses", "tile_sums", "tile_rows", "item_rows", "ranks"),
    *("scale", "scale_step", "grad", "g_outer", "g_inner", "g_class", "stream"),
    # scratch: so many words for each worker; states: of the parts of long rows
    *("scratch", "scratch_size", "states", "n_parts"),
)
# A row while it is read: its maximum; what its terms are relative to, within _MAX_LEAD below it; the
# sum of the terms and its carry; how many classes equal the maximum; how many are ahead of the target.
_M, _REF, _TOTAL, _CARRY, _TIES, _AHEAD, _STATE = 0, 1, 2, 3, 4, 5, 8
# The start of a worker's scratch, in doubles: states of a group of rows; gap, gap_error, rest and
# target's logit of each; then what the kernel needs.
_TALL = 256
_PARTS = _TALL * _STATE
_WORK = _PARTS + 4 * _TALL


# ---- Reading rows ----


@njit(**_OPTIONS)
def _largest(x, n):
    """Return the largest of n classes in each lane."""
    lanes = _lanes(x)
    top = _splat(x, -np.inf)
    whole = n - n % lanes
    strips = whole - whole % (8 * lanes)
    for i in range(0, strips, 8 * lanes):
        top = _larger_strip(x, i, top)
    for i in range(strips, whole, lanes):
        top = _larger_one(x, i, top)
    if whole < n:
        top = _larger_end(x, whole, n - whole, top)
    return top


@njit(**_OPTIONS)
def _sum_terms(x, n, ref, m, e):
    """Return sums, carries and ties of n classes in each lane; store the terms in e if it is given."""
    lanes = _lanes(x)
    total, carry = _splat_double(x, 0.0), _splat_double(x, 0.0)
    ties, part = _splat(x, 0.0), _splat(x, 0.0)
    end = n - n % lanes
    if end < n:
        part, ties = _terms_end(x, end, n - end, ref, m, e, ties)
    if end & lanes:
        end -= lanes
        terms, ties = _terms1(x, end, ref, m, e, ties)
        part = _plus(part, terms)
    if end & (2 * lanes):
        end -= 2 * lanes
        terms, ties = _terms2(x, end, ref, m, e, ties)
        part = _plus(part, terms)
    total, carry = _add(total, carry, part)
    for i in range(0, end, 4 * lanes):
        part, ties = _terms4(x, i, ref, m, e, ties)
        total, carry = _add(total, carry, part)
    return total, carry, ties


@njit(**_OPTIONS)
def _drop(ref, m):
    """Return a, b and c with exp(ref - m) = a * b * (1 + c); a and b are normal if it matters."""
    if ref == m:
        return 1.0, 1.0, 0.0
    d, error = _two_sum_of(ref, -m)
    if d < -700.0:
        half = math.exp(0.5 * d)
        return half, half, error if error == error else 0.0  # d may be -inf
    return math.exp(d), 1.0, error


@njit(**_OPTIONS)
def _scale_sum(total, carry, a, b):
    """Return (total, carry) times exp(a - b)."""
    drop, again, error = _drop(a, b)
    return total * drop * again * (1.0 + error), carry * drop * again


@njit(**_OPTIONS)
def _raise_maximum(state, top, unit):
    """Let the maximum so far rise to ``top``."""
    m, ref = state[_M], state[_REF]
    if m > -np.inf:
        # what was the maximum becomes a term like any other
        former, former_carry = _scale_sum(state[_TIES] / unit, 0.0, m, ref)
        state[_TOTAL], error = _two_sum_of(state[_TOTAL], former)
        state[_CARRY] += error + former_carry
        if not top - ref <= _MAX_LEAD:
            state[_TOTAL], state[_CARRY] = _scale_sum(state[_TOTAL], state[_CARRY], ref, top)
            state[_REF] = top
    else:
        state[_REF] = top
    state[_M] = top
    state[_TIES] = 0.0


@njit(**_OPTIONS)
def _read_block(x, n, state, e):
    """Add n classes to a row's state; return what the terms stored in e are relative to."""
    top = _largest_lane(_largest(x, n))
    if top > state[_M]:
        _raise_maximum(state, top, _sum_unit(x))
    m, ref = state[_M], state[_REF]
    if top < m:  # so in most blocks of a long row
        totals, carries, ties = _sum_terms(x, n, _splat(x, ref), None, e)
    else:
        totals, carries, ties = _sum_terms(x, n, _splat(x, ref), _splat(x, m), e)
    total, carry = _sum_lanes(totals, carries)
    state[_TOTAL], error = _two_sum_of(state[_TOTAL], total)
    state[_CARRY] += error + carry
    state[_TIES] += _count_lanes(ties)
    return ref if m > -np.inf else -np.inf  # a block of -inf: its terms are 0, whatever the factor


@njit(**_OPTIONS)
def _count(x, n, pivot, tied):
    """How many of n classes are larger than the pivot or, if ``tied``, equal to it."""
    lanes = _lanes(x)
    whole = n - n % lanes
    counts, p = _splat_double(x, 0.0), _splat(x, pivot)
    if tied:
        for i in range(0, whole, lanes):
            counts = _count_tied(x, i, p, counts)
        if whole < n:
            counts = _count_tied_end(x, whole, n - whole, p, counts)
    else:
        for i in range(0, whole, lanes):
            counts = _count_ahead(x, i, p, counts)
        if whole < n:
            counts = _count_ahead_end(x, whole, n - whole, p, counts)
    return _count_lanes(counts)


@njit(**_OPTIONS)
def _count_before(x, n, target, pivot):
    """How many of n classes come before the target, which is one of them, or before or after them."""
    before = min(max(target, 0), n)
    return _count(x, before, pivot, True) + _count(_at(x, before), n - before, pivot, False)


@njit(**_OPTIONS)
def _clear(state):
    state[_M] = -np.inf
    for i in range(_REF, _STATE):
        state[i] = 0.0


@njit(**_OPTIONS)
def _finish_row(x, state, target_logit, parts, r):
    """Make a row's state final, and note gap, gap_error and rest; return whether it is finite."""
    m = state[_M]
    total, carry = state[_TOTAL], state[_CARRY]
    if state[_REF] != m:
        total, carry = _scale_sum(total, carry, state[_REF], m)
    rest = (total + carry) * _sum_unit(x) + (state[_TIES] - 1.0)
    gap, error, rest = _parts_of_loss(x, m, target_logit, rest)
    parts[r], parts[_TALL + r], parts[2 * _TALL + r] = gap, error, rest
    parts[3 * _TALL + r] = target_logit
    return gap == gap


@njit(**_OPTIONS)
def _ignore_row(parts, r):
    parts[r] = parts[_TALL + r] = parts[2 * _TALL + r] = 0.0


@njit(**_OPTIONS)
def _store_losses(x, parts, losses, first, count):
    lanes = _lanes(x)
    for r in range(0, count, lanes):
        gap, error = _doubles_at(x, parts, r), _doubles_at(x, parts, _TALL + r)
        loss = _loss(x, gap, error, _doubles_at(x, parts, 2 * _TALL + r))
        _store_where(losses, _first_lanes(x, count - r), first + r, loss)


@njit(**_OPTIONS)
def _tile_sum(losses, first, n):
    """Return the compensated sum of n losses."""
    lanes = _lanes(losses)
    total, carry = _splat_double(losses, 0.0), _splat_double(losses, 0.0)
    for i in range(0, n, lanes):
        part = _as_doubles(_load_where(losses, _first_lanes(losses, n - i), first + i))
        total, carry = _add_exactly(total, carry, part)
    s, c = _sum_lanes(total, carry)
    return s + c if s < np.inf else s  # inf has no rounding error to add; NaN stays


@njit(**_OPTIONS)
def _sum_tiles(x, job, first, last):
    """Sum the losses of the tiles from row ``first`` to ``last``."""
    losses, sums = _reals_like(job.losses, x), _float64s(job.tile_sums, x)
    for start in range(first, last, job.tile_rows):
        n = min(job.tile_rows, last - start)
        sums[start // job.tile_rows] = _tile_sum(losses, start, n)


# ---- Writing gradients ----


@njit(**_OPTIONS)
def _scale_row(e, n, hi, lo, down, least, g, stream):
    """Write the exponentials in e, times a factor, to g."""
    lanes = _lanes(e)
    i = 0
    if stream:
        i = min(n, _to_next_line(g))  # stores past the caches must be aligned
        for j in range(0, i, lanes):
            _scale_some(e, j, i - j, hi, lo, down, least, g)
        while i + 4 * lanes <= n:
            _scale4_past_caches(e, i, hi, lo, down, least, g)
            i += 4 * lanes
    while i + 4 * lanes <= n:
        _scale4(e, i, hi, lo, down, least, g)
        i += 4 * lanes
    while i + lanes <= n:
        _scale1(e, i, hi, lo, down, least, g)
        i += lanes
    if i < n:
        _scale_some(e, i, n - i, hi, lo, down, least, g)


@njit(**_OPTIONS)
def _write_block(e, n, drop, again, error, rest, scale, g, stream):
    """Write the exponentials in e, times scale / (1 + rest) * drop * again * (1 + error), to g."""
    hi, lo, down, least = _row_factor(e, scale, rest, drop, again, error)
    _scale_row(e, n, hi, lo, down, least, g, stream)


@njit(**_OPTIONS)
def _write_plain(x, step, n, m, rest, scale, g):
    """Write the same from logits ``step`` apart, in doubles: for scales so large that they are rare."""
    unit = scale / (1.0 + rest)
    for j in range(n):
        d, r = _two_sum_of(np.float64(_get(x, j * step)), -m)
        e = math.exp(d)
        if r == r:
            e += e * r
        _set(g, j, e * unit)


@njit(**_OPTIONS)
def _fill(g, n, value):
    for j in range(n):
        _set(g, j, value)


@njit(**_OPTIONS)
def _is_large(scale):
    return not abs(scale) < _MAX_SCALE


@njit(**_OPTIONS)
def _set_target(g, gap, e, rest, scale):
    if _is_large(scale):
        e = math.exp(-gap)
    _set(g, 0, _target_gradient(gap, e, rest, scale))


# ---- Rows that are finished together, one in each lane ----


@njit(**_OPTIONS)
def _finish_lanes(x, job, row, count, kept, m, target_logit, totals, carries, ties, ranks):
    """Store losses and ranks of count rows; return gap and rest."""
    rest = _total_of(totals, carries, ties)
    gap, error, rest = _parts_of_loss(x, _as_doubles(m), _as_doubles(target_logit), rest)
    loss = _keep(_loss(x, gap, error, rest), kept)
    _store_where(_reals_like(job.losses, x), _first_lanes(x, count), row, loss)
    if job.ranks != 0:
        _store_ranks(_int64s(job.ranks, x), row, count, ranks, gap, kept, x)
    return gap, rest


@njit(**_OPTIONS)
def _scale_lanes(x, job, row, count, saved):
    """Return the upstream gradients of count rows; ``saved`` is room for them."""
    scales = _at(_float64s(job.scale, x), row * job.scale_step)
    if job.scale_step == 0:
        return _splat_double(x, scales[0])
    for r in range(_lanes(x)):
        saved[r] = scales[min(r, count - 1) * job.scale_step]
    return _doubles_at(x, saved, 0)


# ---- Kernels for rows of one block: lanes are classes, then rows ----

_GROUP = 16
# What is noted of each row of a group, _GROUP numbers each: addresses of its logits, exponentials and
# gradient; its rank; maximum, target's logit and term; its sum, carry and ties; the gradient's factor.
_X_AT, _E_AT, _G_AT, _RANK, _MAXIMUM, _LOGIT, _TERM, _SUM, _ERROR, _TIED = range(0, 160, _GROUP)
_FACTOR = 160  # hi, lo, down, least, the target's own gradient: reals
_SLOTS = 160 + 5 * _GROUP


@njit(**_OPTIONS)
def _read_rows(x, n, job, row, count, slots, places, with_grad):
    """Read count rows of n classes: the maxima of some, then their sums while they are in L1."""
    targets = _at(_int64s(job.targets, x), row)
    step = max(1, _L1_CLASSES // n)
    for start in range(0, count, step):
        stop = min(start + step, count)
        for r in range(start, stop):
            slots[_MAXIMUM + r] = slots[_SUM + r] = slots[_ERROR + r] = 0.0
            slots[_TIED + r] = 1.0
            if 0 <= targets[r] < n:
                at = _pointer_like(places[_X_AT + r], x)
                slots[_MAXIMUM + r] = _largest_lane(_largest(at, n))
                if job.ranks != 0:
                    places[_RANK + r] = np.int64(_count_before(at, n, targets[r], slots[_LOGIT + r]))
        for r in range(start, stop):
            if 0 <= targets[r] < n:
                at, m = _pointer_like(places[_X_AT + r], x), slots[_MAXIMUM + r]
                ref = _splat(x, m if m > -np.inf else 0.0)
                if with_grad is None:
                    totals, carries, ties = _sum_terms(at, n, ref, _splat(x, m), None)
                else:
                    e = _reals_like(places[_E_AT + r], x)
                    totals, carries, ties = _sum_terms(at, n, ref, _splat(x, m), e)
                slots[_SUM + r], slots[_ERROR + r] = _sum_lanes(totals, carries)
                slots[_TIED + r] = _count_lanes(ties)


@njit(**_OPTIONS)
def _finish_rows(x, job, row, count, slots, places):
    kept, _, ignored = _read_targets(x, _int64s(job.targets, x), row, count, job.n_classes)
    m, logit = _reals_at(x, slots, _MAXIMUM), _reals_at(x, slots, _LOGIT)
    total, carry = _doubles_at(x, slots, _SUM), _doubles_at(x, slots, _ERROR)
    ties, ranks = _reals_at(x, slots, _TIED), _int64s_at(x, places, _RANK)
    gap, rest = _finish_lanes(x, job, row, count, kept, m, logit, total, carry, ties, ranks)
    return gap, rest, ignored


@njit(**_OPTIONS)
def _factor_rows(x, job, row, count, gap, rest, slots, places):
    """Note the factors of count rows' gradients; return scales."""
    targets = _at(_int64s(job.targets, x), row)
    for r in range(count):
        slots[_TERM + r] = 0.0
        if 0 <= targets[r] < job.n_classes:
            slots[_TERM + r] = np.float64(_get(_reals_like(places[_E_AT + r], x), targets[r]))
    scale = _scale_lanes(x, job, row, count, _at(slots, _SUM))
    hi, lo, down, least, own = _lane_factors(x, gap, _reals_at(x, slots, _TERM), rest, scale)
    factors = _reals_like(_address_in(slots, _FACTOR), x)
    _store(factors, 0, hi)
    _store(factors, _GROUP, lo)
    _store(factors, 2 * _GROUP, down)
    _store(factors, 3 * _GROUP, least)
    _store(factors, 4 * _GROUP, own)
    _store(slots, _SUM, gap)
    _store(slots, _ERROR, rest)


@njit(**_OPTIONS)
def _write_rows(x, step, g, n, job, row, count, slots, places):
    """Write the gradients of count rows, from their exponentials; logits are ``step`` apart."""
    targets, scales = _at(_int64s(job.targets, x), row), _float64s(job.scale, x)
    factors = _reals_like(_address_in(slots, _FACTOR), x)
    for r in range(count):
        out = _pointer_like(places[_G_AT + r], g)
        if not 0 <= targets[r] < n:
            _fill(out, n, 0.0)
            continue
        scale, gap, rest = scales[(row + r) * job.scale_step], slots[_SUM + r], slots[_ERROR + r]
        if _is_large(scale) and gap == gap:
            logits = _pointer_like(places[_X_AT + r], x)
            _write_plain(logits, step, n, slots[_MAXIMUM + r], rest, scale, out)
            _set_target(_at(out, targets[r]), gap, 0.0, rest, scale)
        else:
            hi, lo = _get(factors, r), _get(factors, _GROUP + r)
            down, least = _get(factors, 2 * _GROUP + r), _get(factors, 3 * _GROUP + r)
            _scale_row(_reals_like(places[_E_AT + r], x), n, hi, lo, down, least, out, False)
            _set(out, targets[r], _get(factors, 4 * _GROUP + r))


@njit(**_OPTIONS)
def _middle_rows(x_type, job, item, worker, with_grad):
    """Rows of unit stride."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, n = _pointer_like(job.x, x_type), job.n_classes
    scratch = job.scratch + 8 * worker * job.scratch_size
    slots, places = _float64s(scratch, x), _int64s(scratch, x)
    targets, scales = _int64s(job.targets, x), _float64s(job.scale, x)
    outer, inner = divmod(job.first_row + first, job.inner)
    ignored = 0
    for row in range(first, last, _lanes(x)):
        count = min(_lanes(x), last - row)
        for r in range(count):
            at = job.x + _size(x, outer * job.x_outer + inner * job.x_inner)
            places[_X_AT + r] = at
            target = targets[row + r]
            slots[_LOGIT + r] = 0.0
            if 0 <= target < n:
                slots[_LOGIT + r] = np.float64(_get(_pointer_like(at, x), target))
            if with_grad is not None:
                g_at = job.grad + _size(x, outer * job.g_outer + inner * job.g_inner)
                places[_G_AT + r] = g_at
                # the gradient's memory, unless it is of another dtype, or the logits are needed again
                spare = _is_half(x) or _is_large(scales[(row + r) * job.scale_step])
                places[_E_AT + r] = scratch + 8 * (_SLOTS + r * _PITCH) if spare else g_at
            inner += 1
            if inner == job.inner:
                outer, inner = outer + 1, 0
        _read_rows(x, n, job, row, count, slots, places, with_grad)
        gap, rest, n_ignored = _finish_rows(x, job, row, count, slots, places)
        ignored += n_ignored
        if with_grad is not None:
            _factor_rows(x, job, row, count, gap, rest, slots, places)
            _write_rows(x, 1, x, n, job, row, count, slots, places)
    _sum_tiles(x, job, first, last)
    return ignored


@njit(**_OPTIONS)
def _middle_strided_rows(x_type, job, item, worker, with_grad):
    """Rows of any stride, which are transposed into scratch, and their gradients back."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    n, row, ignored = job.n_classes, first, 0
    scratch = job.scratch + 8 * worker * job.scratch_size
    slots, places = _float64s(scratch, x_type), _int64s(scratch, x_type)
    block = _reals_like(scratch + 8 * _SLOTS, x_type)
    lanes = _lanes(x_type)
    pitch = ((n + lanes - 1) // lanes | 1) * lanes  # an odd number of lines, for L1's sake
    most = max(lanes, min(_FETCHED, _FETCHED_BYTES // _size(block, pitch) // lanes * lanes))
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        fetched = min(most, last - row, job.inner - inner)
        at = job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner)
        _fetch(_pointer_like(at, x_type), job.x_inner, job.x_class, fetched, n, block, pitch)
        for start in range(0, fetched, lanes):
            count = min(lanes, fetched - start)
            targets = _at(_int64s(job.targets, x_type), row + start)
            for r in range(count):
                places[_X_AT + r] = places[_E_AT + r] = places[_G_AT + r] = (
                    scratch + 8 * _SLOTS + _size(block, (start + r) * pitch)
                )
                slots[_LOGIT + r] = 0.0
                if 0 <= targets[r] < n:
                    slots[_LOGIT + r] = np.float64(_get(block, (start + r) * pitch + targets[r]))
            _read_rows(block, n, job, row + start, count, slots, places, with_grad)
            gap, rest, n_ignored = _finish_rows(block, job, row + start, count, slots, places)
            ignored += n_ignored
            if with_grad is not None:
                _factor_rows(block, job, row + start, count, gap, rest, slots, places)
                for r in range(count):  # where a large scale needs the logits again
                    places[_X_AT + r] = at + _size(x_type, (start + r) * job.x_inner)
                x = _pointer_like(at, x_type)
                _write_rows(x, job.x_class, block, n, job, row + start, count, slots, places)
        if with_grad is not None:
            g_at = job.grad + _size(x_type, outer * job.g_outer + inner * job.g_inner)
            g = _pointer_like(g_at, x_type)
            _deliver(block, pitch, g, job.g_inner, job.g_class, fetched, n)
        row += fetched
    _sum_tiles(x_type, job, first, last)
    return ignored


# ---- Kernels for rows of unit stride: lanes are classes ----


@njit(**_OPTIONS)
def _read_row(x, n, state, target, target_logit, refs, e, step, ranked):
    """Read n classes of a row. Terms go to e, if given: each block's to the same place if step is 0."""
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        block = _at(x, start)
        if ranked:  # before e takes the place of the logits
            state[_AHEAD] += _count_before(block, size, target - start, target_logit)
        if e is None:
            _read_block(block, size, state, None)
        else:
            refs[start // _BLOCK] = _read_block(block, size, state, _at(e, start * step))


@njit(**_OPTIONS)
def _write_row(n, m, target, gap, rest, scale, refs, e, g, stream):
    """Turn a row's exponentials in e into its gradient."""
    target_term, start = 0.0, 0
    unit = _sum_unit(e)
    while start < n:
        # blocks of one reference, as most are, need one factor
        ref, end = refs[start // _BLOCK], start + _BLOCK
        while end < n and refs[end // _BLOCK] == ref:
            end += _BLOCK
        size = min(end, n) - start
        drop, again, error = _drop(ref, m)
        if start <= target < start + size:
            target_term = np.float64(_get(e, target)) * unit * drop * again
        _write_block(_at(e, start), size, drop, again, error, rest, scale, _at(g, start), stream)
        start = end
    _set_target(_at(g, target), gap, target_term, rest, scale)


@njit(**_OPTIONS)
def _direct_rows(x_type, job, item, worker, with_grad):
    """Compute the rows of a tile, one after the other."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, grad, n = _pointer_like(job.x, x_type), _pointer_like(job.grad, x_type), job.n_classes
    targets, ranks = _int64s(job.targets, x), _int64s(job.ranks, x)
    scales = _float64s(job.scale, x)
    state = _float64s(job.scratch + 8 * worker * job.scratch_size, x)
    parts, refs = _at(state, _PARTS), _at(state, _WORK)
    kept_terms = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + _PART // _BLOCK), x)
    stream = job.stream != 0
    outer, inner = divmod(job.first_row + first, job.inner)
    lanes, ignored, ranked = _lanes(x), 0, job.ranks != 0
    for row in range(first, last):
        r = (row - first) % lanes
        at = _at(x, outer * job.x_outer + inner * job.x_inner)
        target = targets[row]
        if 0 <= target < n:
            target_logit = np.float64(_get(at, target))
            _clear(state)
            if with_grad is None:
                _read_row(at, n, state, target, target_logit, refs, None, 1, ranked)
                finite = _finish_row(x, state, target_logit, parts, r)
            else:
                g = _at(grad, outer * job.g_outer + inner * job.g_inner)
                scale = scales[row * job.scale_step]
                large = _is_large(scale)
                e = _terms_place(kept_terms, g, not stream and not large)
                _read_row(at, n, state, target, target_logit, refs, e, 0 if large else 1, ranked)
                finite = _finish_row(x, state, target_logit, parts, r)
                m, gap, rest = state[_M], parts[r], parts[2 * _TALL + r]
                if not finite:
                    _fill(g, n, np.nan)
                elif large:
                    _write_plain(at, 1, n, m, rest, scale, g)
                    _set_target(_at(g, target), gap, 0.0, rest, scale)
                else:
                    _write_row(n, m, target, gap, rest, scale, refs, e, g, stream)
            if ranked:
                ranks[row] = np.int64(state[_AHEAD]) if finite else -1
        else:
            ignored += 1
            _ignore_row(parts, r)
            if ranked:
                ranks[row] = -1
            if with_grad is not None:
                _fill(_at(grad, outer * job.g_outer + inner * job.g_inner), n, 0.0)
        if r == lanes - 1 or row == last - 1:
            _store_losses(x, parts, _reals_like(job.losses, x), row - r, r + 1)
        inner += 1
        if inner == job.inner:
            outer, inner = outer + 1, 0
    _sum_tiles(x, job, first, last)
    if stream:
        _fence(x)
    return ignored


# ---- Kernels for any strides: a group of rows is transposed into scratch block by block ----


@njit(**_OPTIONS)
def _fetch(x, row_step, class_step, count, n, out, pitch):
    """Copy n classes of count rows to rows of unit stride, ``pitch`` apart."""
    lanes = _lanes(x)
    if class_step == 1:
        for r in range(count):
            for j in range(0, n, lanes):
                at = r * row_step + j
                _store(out, r * pitch + j, _load_where(x, _first_lanes(x, n - j), at))
    elif row_step == 1:
        for j in range(0, n, lanes):
            some = min(lanes, n - j)
            for r in range(0, count, lanes):
                source, target = _at(x, j * class_step + r), _at(out, r * pitch + j)
                _transpose_in(source, class_step, lanes, some, min(lanes, count - r), target, pitch)
    else:
        for j in range(n):
            for r in range(count):
                _set(out, r * pitch + j, _get(x, r * row_step + j * class_step))


@njit(**_OPTIONS)
def _deliver(source, pitch, g, row_step, class_step, count, n):
    """Copy the other way."""
    lanes = _lanes(g)
    if class_step == 1:
        for r in range(count):
            for j in range(0, n, lanes):
                mask = _first_lanes(g, n - j)
                _store_where(g, mask, r * row_step + j, _vector_at(source, r * pitch + j))
    elif row_step == 1:
        for j in range(0, n, lanes):
            some = min(lanes, n - j)
            for r in range(0, count, lanes):
                block, target = _at(source, r * pitch + j), _at(g, j * class_step + r)
                _transpose_out(block, pitch, target, class_step, lanes, some, min(lanes, count - r))
    else:
        for j in range(n):
            for r in range(count):
                _set(g, r * row_step + j * class_step, _get(source, r * pitch + j))


@njit(**_OPTIONS)
def _read_group(x, job, count, n, first_class, targets, states, parts, refs, block):
    """Read n classes of count rows; note what the terms of each block are relative to."""
    n_blocks = (n + _BLOCK - 1) // _BLOCK
    for b in range(n_blocks):
        start = b * _BLOCK
        size = min(_BLOCK, n - start)
        at = _at(x, start * job.x_class)
        _fetch(at, job.x_inner, job.x_class, count, size, block, _PITCH)
        for r in range(count):
            target = targets[r]
            if 0 <= target < job.n_classes:
                row, state = _at(block, r * _PITCH), _at(states, r * _STATE)
                refs[r * n_blocks + b] = _read_block(row, size, state, None)
                if job.ranks != 0:
                    place = target - first_class - start
                    state[_AHEAD] += _count_before(row, size, place, parts[3 * _TALL + r])


@njit(**_OPTIONS)
def _write_group(x, job, row, count, n, first_class, states, parts, refs, block, g):
    """Write n classes of the gradient of count rows, from terms computed as they were when read.

    To keep them costs more than to compute them again: 64 rows of them leave the caches.
    """
    targets, scales = _at(_int64s(job.targets, x), row), _float64s(job.scale, x)
    n_blocks = (n + _BLOCK - 1) // _BLOCK
    unit = _sum_unit(block)
    for b in range(n_blocks):
        start = b * _BLOCK
        size = min(_BLOCK, n - start)
        _fetch(_at(x, start * job.x_class), job.x_inner, job.x_class, count, size, block, _PITCH)
        for r in range(count):
            e = _at(block, r * _PITCH)
            target, scale, ref = targets[r], scales[(row + r) * job.scale_step], refs[r * n_blocks + b]
            m, gap, rest = states[r * _STATE + _M], parts[r], parts[2 * _TALL + r]
            place, target_term = target - first_class - start, 0.0
            if not 0 <= target < job.n_classes:
                _fill(e, size, 0.0)
                continue
            if gap != gap:
                _fill(e, size, np.nan)
                continue
            if _is_large(scale):
                logits = _at(x, start * job.x_class + r * job.x_inner)
                _write_plain(logits, job.x_class, size, m, rest, scale, e)
            else:
                _sum_terms(e, size, _splat(e, ref if ref > -np.inf else 0.0), None, e)
                drop, again, error = _drop(ref, m)
                if 0 <= place < size:
                    target_term = np.float64(_get(e, place)) * unit * drop * again
                _write_block(e, size, drop, again, error, rest, scale, e, False)
            if 0 <= place < size:
                _set_target(_at(e, place), gap, target_term, rest, scale)
        at = _at(g, start * job.g_class)
        _deliver(block, _PITCH, at, job.g_inner, job.g_class, count, size)


@njit(**_OPTIONS)
def _start_group(x, job, row, count, states, parts):
    """Clear the states of rows and note their targets' logits; return how many are ignored."""
    targets = _at(_int64s(job.targets, x), row)
    ignored = 0
    for r in range(count):
        _clear(_at(states, r * _STATE))
        target = targets[r]
        if 0 <= target < job.n_classes:
            logit = np.float64(_get(x, r * job.x_inner + target * job.x_class))
            parts[3 * _TALL + r] = logit
        else:
            ignored += 1
    return ignored


@njit(**_OPTIONS)
def _finish_group(x, job, row, count, states, parts):
    """Losses and ranks of rows that have been read."""
    targets, ranks = _at(_int64s(job.targets, x), row), _int64s(job.ranks, x)
    for r in range(count):
        state, rank = _at(states, r * _STATE), -1
        if 0 <= targets[r] < job.n_classes:
            if _finish_row(x, state, parts[3 * _TALL + r], parts, r):
                rank = np.int64(state[_AHEAD])
        else:
            _ignore_row(parts, r)
        if job.ranks != 0:
            ranks[row + r] = rank
    _store_losses(x, parts, _reals_like(job.losses, x), row, count)


@njit(**_OPTIONS)
def _strided_rows(x_type, job, item, worker, with_grad):
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, grad, n = _pointer_like(job.x, x_type), _pointer_like(job.grad, x_type), job.n_classes
    states = _float64s(job.scratch + 8 * worker * job.scratch_size, x)
    parts, refs = _at(states, _PARTS), _at(states, _WORK)
    n_refs = _TALL * ((n + _BLOCK - 1) // _BLOCK)
    block = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + n_refs), x)
    ignored, row = 0, first
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = _rows_of(x_type, job, row, last)
        at = _at(x, outer * job.x_outer + inner * job.x_inner)
        targets = _at(_int64s(job.targets, x), row)
        ignored += _start_group(at, job, row, count, states, parts)
        _read_group(at, job, count, n, 0, targets, states, parts, refs, block)
        _finish_group(at, job, row, count, states, parts)
        if with_grad is not None:
            g = _at(grad, outer * job.g_outer + inner * job.g_inner)
            _write_group(at, job, row, count, n, 0, states, parts, refs, block, g)
        row += count
    _sum_tiles(x, job, first, last)
    return ignored


# ---- Kernels for very long rows: a work item is a part of a row, so that threads share it ----


@njit(**_OPTIONS)
def _rows_of(x, job, first, last):
    """How many rows from ``first`` on are a group: one step apart, and a block of them in 1 MiB."""
    most = min(_TALL, 1024 // _size(x, 1))
    return min(most, last - first, job.inner - (job.first_row + first) % job.inner)


@njit(**_OPTIONS)
def _groups_in(x, job, item):
    """Part of the rows, and the first row, of an item: a tile's worth of rows in one part."""
    item, part = divmod(item, job.n_parts)
    return part, item * job.item_rows, min((item + 1) * job.item_rows, job.n_rows)


@njit(**_OPTIONS)
def _read_part(x_type, job, item, worker):
    part, row, last = _groups_in(x_type, job, item)
    first_class = part * _PART
    n = min(_PART, job.n_classes - first_class)
    scratch = _float64s(job.scratch + 8 * worker * job.scratch_size, x_type)
    parts, states, refs = _at(scratch, _PARTS), _float64s(job.states, x_type), _at(scratch, _WORK)
    n_refs = _TALL * (_PART // _BLOCK)
    block = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + n_refs), x_type)
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = 1 if job.x_class == 1 else _rows_of(x_type, job, row, last)
        x = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        targets = _at(_int64s(job.targets, x), row)
        _start_group(x, job, row, count, scratch, parts)
        at = _at(x, first_class * job.x_class)
        if job.x_class == 1:
            target = targets[0]
            if 0 <= target < job.n_classes:
                place, logit = target - first_class, parts[3 * _TALL]
                _read_row(at, n, scratch, place, logit, refs, None, 1, job.ranks != 0)
        else:
            _read_group(at, job, count, n, first_class, targets, scratch, parts, refs, block)
        for r in range(count):
            for i in range(_STATE):
                states[((row + r) * job.n_parts + part) * _STATE + i] = scratch[r * _STATE + i]
        row += count
    return 0


@njit(**_OPTIONS)
def _merge(state, other, unit):
    """Add the state of a later part of a row."""
    if other[_M] > state[_M]:
        _raise_maximum(state, other[_M], unit)
    total, carry = other[_TOTAL], other[_CARRY]
    if other[_M] == state[_M]:
        state[_TIES] += other[_TIES]
    elif other[_M] > -np.inf:
        former, error = _scale_sum(other[_TIES] / unit, 0.0, other[_M], other[_REF])
        total, rounded = _two_sum_of(total, former)
        carry += rounded + error
    if other[_M] > -np.inf:
        total, carry = _scale_sum(total, carry, other[_REF], state[_REF])
    state[_TOTAL], error = _two_sum_of(state[_TOTAL], total)
    state[_CARRY] += error + carry
    state[_AHEAD] += other[_AHEAD]


@njit(**_OPTIONS)
def _merge_parts(x_type, job, item, worker):
    """Merge the states of each row's parts, in order, into the first, and finish the rows."""
    scratch = _float64s(job.scratch + 8 * worker * job.scratch_size, x_type)
    parts, unit, ignored = _at(scratch, _PARTS), _sum_unit(x_type), 0
    for row in range(job.n_rows):
        outer, inner = divmod(job.first_row + row, job.inner)
        x = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        merged = _at(_float64s(job.states, x), row * job.n_parts * _STATE)
        for part in range(1, job.n_parts):
            _merge(merged, _at(merged, part * _STATE), unit)
        ignored += _start_group(x, job, row, 1, scratch, parts)
        for i in range(_STATE):
            scratch[i] = merged[i]
        _finish_group(x, job, row, 1, scratch, parts)
        # what the gradient needs
        for i in range(4):
            merged[_TOTAL + i] = parts[i * _TALL]
    _sum_tiles(x_type, job, 0, job.n_rows)
    return ignored


@njit(**_OPTIONS)
def _write_part(x_type, job, item, worker):
    part, row, last = _groups_in(x_type, job, item)
    first_class = part * _PART
    n = min(_PART, job.n_classes - first_class)
    scratch = _float64s(job.scratch + 8 * worker * job.scratch_size, x_type)
    parts, states, refs = _at(scratch, _PARTS), _float64s(job.states, x_type), _at(scratch, _WORK)
    n_refs = _TALL * (_PART // _BLOCK)
    block = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + n_refs), x_type)
    n_blocks = (n + _BLOCK - 1) // _BLOCK
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = _rows_of(x_type, job, row, last)
        x_at = outer * job.x_outer + inner * job.x_inner + first_class * job.x_class
        g_at = outer * job.g_outer + inner * job.g_inner + first_class * job.g_class
        x = _pointer_like(job.x + _size(x_type, x_at), x_type)
        g = _pointer_like(job.grad + _size(x_type, g_at), x_type)
        for r in range(count):
            merged = _at(states, (row + r) * job.n_parts * _STATE)
            scratch[r * _STATE + _M] = merged[_M]
            for i in range(4):
                parts[i * _TALL + r] = merged[_TOTAL + i]
            for b in range(n_blocks):
                refs[r * n_blocks + b] = merged[_M]
        _write_group(x, job, row, count, n, first_class, scratch, parts, refs, block, g)
        row += count
    return 0


# ---- Kernels for narrow rows: lanes are rows ----


@njit(**_OPTIONS)
def _fetch_lanes(x, row_step, class_step, count, n, work):
    """Copy count rows to ``work``, one vector for each class."""
    lanes = _lanes(x)
    if row_step == 1:
        mask = _first_lanes(x, count)
        for c in range(n):
            _store(work, c * lanes, _load_where(x, mask, c * class_step))
    elif class_step == 1 and row_step == n == 2 and count == lanes:
        _unzip2(x, work)  # at 2 classes half the time of a transposition
    elif class_step == 1 and row_step == n == 4 and count == lanes:
        _unzip4(x, work)
    elif class_step == 1:
        for c in range(0, n, lanes):
            some = min(lanes, n - c)
            _transpose_in(
                _at(x, c), row_step, lanes * row_step, count, some, _at(work, c * lanes), lanes
            )
    else:
        for c in range(n):
            for r in range(lanes):
                _set(work, c * lanes + r, _get(x, min(r, count - 1) * row_step + c * class_step))


@njit(**_OPTIONS)
def _deliver_lanes(work, g, row_step, class_step, count, n):
    """Copy the other way."""
    lanes = _lanes(g)
    if row_step == 1:
        mask = _first_lanes(g, count)
        for c in range(n):
            _store_where(g, mask, c * class_step, _vector_at(work, c * lanes))
    elif class_step == 1 and row_step == n == 2 and count == lanes:
        _zip2(work, g)
    elif class_step == 1 and row_step == n == 4 and count == lanes:
        _zip4(work, g)
    elif class_step == 1:
        for c in range(0, n, lanes):
            some = min(lanes, n - c)
            _transpose_out(
                _at(work, c * lanes), lanes, _at(g, c), row_step, lanes * row_step, count, some
            )
    else:
        for c in range(n):
            for r in range(count):
                _set(g, r * row_step + c * class_step, _get(work, c * lanes + r))


@njit(**_OPTIONS)
def _rank_rows(x, n, work, target_logit, target):
    ranks = _no_ranks(x)
    for c in range(n):
        ranks = _rank_lanes(ranks, _vector_at(work, c * _lanes(x)), target_logit, target, c)
    return ranks


@njit(**_OPTIONS)
def _narrow_rows(x_type, job, item, worker, with_grad):
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, grad, n = _pointer_like(job.x, x_type), _pointer_like(job.grad, x_type), job.n_classes
    targets = _int64s(job.targets, x)
    saved = _float64s(job.scratch + 8 * worker * job.scratch_size, x)  # rows' numbers, one by one
    work = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK), x)
    lanes, ignored, row = _lanes(x), 0, first
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = min(lanes, last - row, job.inner - inner)
        at = _at(x, outer * job.x_outer + inner * job.x_inner)
        _fetch_lanes(at, job.x_inner, job.x_class, count, n, work)
        kept, target, n_ignored = _read_targets(x, targets, row, count, n)
        ignored += n_ignored
        m, target_logit = _splat(x, -np.inf), _splat(x, 0.0)
        for c in range(n):
            v = _vector_at(work, c * lanes)
            m = _larger_of(v, m)
            target_logit = _where_class(target_logit, target, c, v)
        row_ranks = _no_ranks(x)
        if job.ranks != 0:
            row_ranks = _rank_rows(x, n, work, target_logit, target)
        ref = _finite_or_zero(m)
        if with_grad is None:
            totals, carries, ties = _sum_terms(work, n * lanes, ref, m, None)
        else:
            totals, carries, ties = _sum_terms(work, n * lanes, ref, m, work)
        gap, rest = _finish_lanes(
            x, job, row, count, kept, m, target_logit, totals, carries, ties, row_ranks
        )
        if with_grad is not None:
            scale = _scale_lanes(x, job, row, count, saved)
            target_term = _splat(x, 0.0)
            for c in range(n):
                v = _vector_at(work, c * lanes)
                target_term = _where_class(target_term, target, c, v)
            hi, lo, down, least, own = _lane_factors(x, gap, target_term, rest, scale)
            for c in range(n):
                _narrow_gradient(work, c, kept, target, own, hi, lo, down, least)
            if _any_at_least(scale, _MAX_SCALE):
                _store(saved, 0, scale)
                _store(saved, lanes, _as_doubles(m))
                _store(saved, 2 * lanes, gap)
                _store(saved, 3 * lanes, rest)
                _plain_lanes(x, job, at, count, n, saved, _at(targets, row), work)
            g = _at(grad, outer * job.g_outer + inner * job.g_inner)
            _deliver_lanes(work, g, job.g_inner, job.g_class, count, n)
        row += count
    _sum_tiles(x, job, first, last)
    return ignored


@njit(**_OPTIONS)
def _plain_lanes(x_type, job, x, count, n, saved, targets, work):
    """Compute the gradient of rows with a large scale from their logits."""
    lanes = _lanes(x)
    for r in range(count):
        scale, m, gap, rest = saved[r], saved[lanes + r], saved[2 * lanes + r], saved[3 * lanes + r]
        if _is_large(scale) and 0 <= targets[r] < n and gap == gap:
            unit = scale / (1.0 + rest)
            for c in range(n):
                d = np.float64(_get(x, r * job.x_inner + c * job.x_class)) - m
                _set(work, c * lanes + r, math.exp(d) * unit)
            own = _target_gradient(gap, math.exp(-gap), rest, scale)
            _set(work, targets[r] * lanes + r, own)


# ---- The kernels, by name ----


def _narrow(x, job, item, worker):
    return _narrow_rows(x, numba.carray(job, 1)[0], item, worker, None)


def _narrow_grad(x, job, item, worker):
    return _narrow_rows(x, numba.carray(job, 1)[0], item, worker, True)


def _middle(x, job, item, worker):
    return _middle_rows(x, numba.carray(job, 1)[0], item, worker, None)


def _middle_grad(x, job, item, worker):
    return _middle_rows(x, numba.carray(job, 1)[0], item, worker, True)


def _middle_strided(x, job, item, worker):
    return _middle_strided_rows(x, numba.carray(job, 1)[0], item, worker, None)


def _middle_strided_grad(x, job, item, worker):
    return _middle_strided_rows(x, numba.carray(job, 1)[0], item, worker, True)


def _direct(x, job, item, worker):
    return _direct_rows(x, numba.carray(job, 1)[0], item, worker, None)


def _direct_grad(x, job, item, worker):
    return _direct_rows(x, numba.carray(job, 1)[0], item, worker, True)


def _strided(x, job, item, worker):
    return _strided_rows(x, numba.carray(job, 1)[0], item, worker, None)


def _strided_grad(x, job, item, worker):
    return _strided_rows(x, numba.carray(job, 1)[0], item, worker, True)


def _long_read(x, job, item, worker):
    return _read_part(x, numba.carray(job, 1)[0], item, worker)


def _long_merge(x, job, item, worker):
    return _merge_parts(x, numba.carray(job, 1)[0], item, worker)


def _long_grad(x, job, item, worker):
    return _write_part(x, numba.carray(job, 1)[0], item, worker)


_DTYPES = {
    np.dtype(np.float32): types.float32,
    np.dtype(np.float64): types.float64,
    np.dtype(np.float16): types.int16,
    np.dtype(np.uint16): types.uint16,
}
_compiling = threading.Lock()


@functools.cache
def _address_of(kernel: Callable[..., None], dtype: np.dtype[Any]) -> int:
    """Compile a kernel for a dtype, or load it from the disk, and return its address."""
    job = types.CPointer(numba.from_dtype(np.dtype([(name, np.int64) for name in _JOB])))
    signature = types.int64(types.CPointer(_DTYPES[dtype]), job, types.int64, types.int64)
    with _compiling:
        address: int = numba.cfunc(signature, cache=True, **_OPTIONS)(kernel).address
        return address


# ---- Items of work, one after the other or spread over threads ----


@intrinsic
def _call(typingctx: Any, kernel: Any, job: Any, item: Any, worker: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        function = ir.FunctionType(number, [number] * 4)
        address, *others = args
        return builder.call(builder.inttoptr(address, function.as_pointer()), [number(0), *others])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _take(typingctx: Any, counter: Any) -> Any:
    """Return the number at an address and add one to it, as one step for all threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), codegen


@njit(cache=True, nogil=True, **_OPTIONS)
def _run_serially(kernel, job, n_items):
    """Run the items one after the other; return how many rows were ignored."""
    ignored = 0
    for item in range(n_items):
        ignored += _call(kernel, job, item, 0)
    return ignored


@njit(cache=True, nogil=True, parallel=True, **_OPTIONS)
def _run_in_parallel(kernel, job, n_items, counter, n_workers):
    """Do the same, each worker taking the next item when it has done one."""
    ignored = 0
    for worker in prange(n_workers):
        n, item = 0, _take(counter)
        while item < n_items:
            n += _call(kernel, job, item, worker)
            item = _take(counter)
        ignored += n
    return ignored


# ---- The backend ----


def load(isa: str | None) -> Kernels:
    """Return the kernels; LLVM compiles them for the processor at hand."""
    return NumbaKernels()


class NumbaKernels(Kernels):
    """`fastce.kernels.Kernels` in Numba."""

    def max_threads(self) -> int:
        """Return Numba's limit for the calling thread."""
        return int(numba.get_num_threads())

    def rows(
        self,
        logits: NDArray[Any],
        first_row: int,
        targets: NDArray[np.int64],
        losses: NDArray[Any],
        tile_sums: NDArray[np.float64],
        *,
        ranks: NDArray[np.int64] | None,
        scale: NDArray[np.float64] | None,
        grad: NDArray[Any] | None,
        stream: bool,
        num_threads: int,
    ) -> int:
        """See `fastce.kernels.Kernels.rows`."""
        n_rows = len(targets)
        if n_rows == 0:
            return 0
        if scale is None or grad is None:
            scale = grad = None
        _, inner, n_classes = logits.shape
        x_strides = _strides(logits)
        g_strides = x_strides if grad is None else _strides(grad)
        plan = _plan(n_classes, x_strides[2] == g_strides[2] == 1, grad is not None)
        n_parts = -(-n_classes // _PART)
        n_items = -(-n_rows // plan.item_rows) * n_parts
        n_states = n_rows * n_parts * _STATE if n_parts > 1 else 0  # a multiple of 8, as all sizes here
        workers = max(1, min(num_threads, n_items))
        with _Memory(_JOB_WORDS + n_states + workers * plan.scratch_size) as memory:
            states = memory.address + 8 * _JOB_WORDS
            memory.words[: len(_JOB)] = (
                *(_address(logits), *x_strides, inner, first_row, n_rows, n_classes),
                *(_address(targets), _address(losses), _address(tile_sums)),
                *(tile_rows(n_classes), plan.item_rows, 0 if ranks is None else _address(ranks)),
                *((0, 0) if scale is None else (_address(scale), scale.strides[0] // 8)),
                *(0 if grad is None else _address(grad), *g_strides),
                stream and n_classes * logits.itemsize >= _STREAM_BYTES,
                *(states + 8 * n_states, plan.scratch_size, states, n_parts),
            )
            ignored = 0
            for kernel in plan.kernels:
                function = _address_of(kernel, logits.dtype)
                if workers == 1 or kernel is _long_merge:
                    items = 1 if kernel is _long_merge else n_items
                    ignored += _run_serially(function, memory.address, items)
                else:
                    ignored += _run_parallel(function, memory, n_items, workers)
            return ignored

    def kl_from_logits(
        self,
        p_logits: NDArray[Any],
        q_logits: NDArray[Any],
        first_row: int,
        out: NDArray[Any],
        *,
        num_threads: int,
    ) -> None:
        """See `fastce.kernels.Kernels.kl_from_logits`."""
        _elements().kl_from_logits(p_logits, q_logits, first_row, out, num_threads=num_threads)

    def distributions(
        self,
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
        run = _elements().distributions
        return int(run(measure, p, q, first_row, out, base=base, num_threads=num_threads))

    def information(
        self, p: NDArray[Any], out: NDArray[Any], *, base: float | None, num_threads: int
    ) -> int:
        """See `fastce.kernels.Kernels.information`."""
        return int(_elements().information(p, out, base=base, num_threads=num_threads))

    def binary(self, x: NDArray[Any], targets: NDArray[Any], *args: Any, **options: Any) -> int:
        """See `fastce.kernels.Kernels.binary`."""
        return int(_elements().binary(x, targets, *args, **options))


def _elements() -> Any:
    """Return the kernels that work element by element, which a call for rows does not need."""
    from fastce._backends import numba_elements

    return numba_elements


class _Plan(NamedTuple):
    """How rows of some width and layout are computed."""

    kernels: tuple[Callable[..., None], ...]  # one after the other
    item_rows: int  # rows in an item of work
    scratch_size: int  # words of each worker


@functools.lru_cache(maxsize=256)
def _plan(n_classes: int, direct: bool, with_grad: bool) -> _Plan:
    """Choose kernels; ``direct`` says that the classes of a row lie side by side."""
    item_rows, kept = tile_rows(n_classes), 0
    if n_classes <= _NARROW:
        kernels = (_narrow_grad if with_grad else _narrow,)
        work = _WORK + _NARROW * _GROUP
    elif n_classes <= _BLOCK:
        if direct:
            kernels = (_middle_grad if with_grad else _middle,)
        else:
            kernels = (_middle_strided_grad if with_grad else _middle_strided,)
        work = _SLOTS + max(_GROUP * _PITCH, 0 if direct else _FETCHED_BYTES // 8)
    elif n_classes > _PART:
        kernels = (_long_read, _long_merge) + ((_long_grad,) if with_grad else ())
        item_rows = 1 if direct else _TALL
        work = _WORK + _TALL * (_PART // _BLOCK + _PITCH)
    elif direct:
        kernels = (_direct_grad if with_grad else _direct,)
        work = _WORK + _PART // _BLOCK
        kept = n_classes
    else:
        kernels = (_strided_grad if with_grad else _strided,)
        work = _WORK + _TALL * (-(-n_classes // _BLOCK) + _PITCH)
    if not direct:  # rows in the lanes of a vector
        item_rows *= -(-_FETCHED // item_rows)
    work += kept if with_grad else 0
    return _Plan(kernels, item_rows, -(-work // 8) * 8)


def _strides(array: NDArray[Any]) -> tuple[int, int, int]:
    """In elements; that of one class says nothing, and is 1."""
    size = array.itemsize
    outer, inner, step = array.strides
    return outer // size, inner // size, step // size if array.shape[2] > 1 else 1


_capsule_address = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_address.restype = ctypes.c_void_p
_capsule_address.argtypes = [ctypes.py_object, ctypes.c_char_p]
_six_words = ctypes.c_size_t * 6


def _address(array: NDArray[Any]) -> int:
    """Return where the first element lies: half the time of ``array.ctypes.data``.

    NumPy's array interface as a C structure: its sixth word is the address.
    """
    interface = array.__array_struct__
    return int(_six_words.from_address(_capsule_address(interface, None) or 0)[5])


# The job, and then the counter of items.
_JOB_WORDS = 32
_spare = threading.local()


class _Memory:
    """So many words, aligned to 64 bytes; kept for the thread's next call, unless they are many."""

    def __init__(self, size: int) -> None:
        self.size = size
        block = getattr(_spare, "block", None)
        _spare.block = None  # so that a signal handler's call does not take it too
        if block is None or len(block[0]) < size:
            words = np.empty(size + 8, np.int64)
            shift = -_address(words) // 8 % 8
            block = words[shift : shift + size], _address(words) + 8 * shift
        self.words, self.address = block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if len(self.words) <= _SPARE_WORDS:
            _spare.block = self.words, self.address


_lock = threading.Lock()


def _run_parallel(kernel: int, memory: _Memory, n_items: int, workers: int) -> int:
    """Run with a number of threads of the calling thread's own, not the process's."""
    counter = _JOB_WORDS - 1
    memory.words[counter] = 0
    before = numba.get_num_threads()
    numba.set_num_threads(min(workers, numba.config.NUMBA_NUM_THREADS))
    try:
        with _one_at_a_time():
            at = memory.address + 8 * counter
            return int(_run_in_parallel(kernel, memory.address, n_items, at, workers))
    finally:
        numba.set_num_threads(before)


def _one_at_a_time() -> AbstractContextManager[Any]:
    """Return the lock that Numba's workqueue layer needs: two callers at once abort the process."""
    try:
        return _lock if numba.threading_layer() == "workqueue" else nullcontext()
    except ValueError:  # no layer has been chosen yet: this call chooses
        return _lock
