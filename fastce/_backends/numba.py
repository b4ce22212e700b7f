"""The kernels in Numba: the same algorithm as the C body (``_native/row_body.inc``), which explains it.

What is different, and why:

- Numba's vectoriser is not asked for anything. Loops run over explicit vectors of 512 bits, which LLVM
  splits where the machine's are shorter, so the order of every sum is the same on every machine. The
  type `_Vector` carries them through jitted functions; `_Value` lets the intrinsics that work on
  them read as arithmetic.
- An intrinsic costs next to nothing to compile, a jitted function 30 to 100 ms for each signature. So
  there are few jitted functions, and what is straight-line code is an intrinsic.
- A kernel is a C function of (call, job, item, worker), compiled when it is first called for one dtype
  and what is wanted of it: a gradient, soft targets, statistics. These are types, so that each
  kernel holds the code it needs and no other. The loops over items, serial and parallel, call it by its
  address: so they compile once.
- Arrays reach the kernels as addresses and strides: one signature, whatever the caller's layout.
- Helpers are module-level functions: Numba never caches closures on disk.
- Only gradient rows of 2^11 to 2^18 classes side by side are stored past the caches; elsewhere that
  takes longer.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import platform
import struct
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

from fastce.kernels import Kernels, Soft, Stats, tile_rows

_OPTIONS: dict[str, Any] = {"error_model": "numpy"}  # strict arithmetic: no fastmath flags
# Of functions that only kernels call: without the means to call them from Python, kernels compile in
# 0.77 of the time.
_INNER: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_BLOCK = 1024  # classes read at a time: 4 or 8 KiB, which stay in L1 between maximum and sum
# Rows of at most this many classes are computed with rows as lanes. From 33 classes on losses take
# 0.5 to 0.9 of the time, gradients 0.6 to 1.2; from 65 on gradients of double would take up to 1.4.
_NARROW = 64
_MAX_LEAD = 8.0  # how far the maximum may run ahead of the reference of a row's sum
_PART = 2**18  # longer rows are cut into parts of so many classes, which threads share
_MAX_SCALE = 2.0**60  # above, the exponentials kept for the gradient do not reach low enough
_L1_CLASSES = 1024  # classes of short rows that are read before any is summed
_PITCH = _BLOCK + 16  # between the rows of a transposed block; an odd number of lines, for L1's sake
# Gradients of fewer classes are not stored past the caches: it may take 1.2 times as long.
_STREAMED = 2**11
_SPARE_WORDS = 2**20  # of scratch that a thread keeps from call to call
_PAGE, _LINE = 2**12, 64  # bytes
# The most rows that are transposed together, and their bytes: half as many bytes take 1.1 times as
# long, twice as many rows too.
_FETCHED, _FETCHED_BYTES = 256, 2**20

# By bits of the dtype; derivations stand beside the same numbers in row_body.inc.
_POLY = {
    32: "0x1.6a23ccp-10 0x1.123a2p-7 0x1.5558f2p-5 0x1.555492p-3 0x1.fffffcp-2",
    64: "0x1.ad7f3d1da8c7p-26 0x1.28ad9b849a8c7p-22 0x1.71df25b44fed3p-19 0x1.a01999e264e66p-16"
    " 0x1.a01a012a0e90fp-13 0x1.6c16c18438af6p-10 0x1.1111111127d11p-7 0x1.555555555083ep-5"
    " 0x1.55555555554f9p-3 0x1p-1",
}
# On AVX-512 terms take 2^(i/16), in units of 2^-_SUM_SHIFT, from a table: shorter polynomials will do.
_SIXTEENTHS_POLY = {
    32: "0x1.55559ap-3 0x1.00022p-1",
    64: "0x1.6c14c6eb8be36p-10 0x1.11123aae74323p-7 0x1.55555558fca6dp-5 0x1.555555548f890p-3"
    " 0x1.fffffffffffb9p-2",
}
_SIXTEENTHS = {
    32: "0x1p+64 0x1.0b5586p+64 0x1.172b84p+64 0x1.2387a6p+64 0x1.306fep+64 0x1.3dea64p+64"
    " 0x1.4bfdaep+64 0x1.5ab07ep+64 0x1.6a09e6p+64 0x1.7a1148p+64 0x1.8ace54p+64 0x1.9c4918p+64"
    " 0x1.ae89fap+64 0x1.c199bep+64 0x1.d5818ep+64 0x1.ea4afap+64",
    64: "0x1p+512 0x1.0b5586cf9890fp+512 0x1.172b83c7d517bp+512 0x1.2387a6e756238p+512"
    " 0x1.306fe0a31b715p+512 0x1.3dea64c123422p+512 0x1.4bfdad5362a27p+512 0x1.5ab07dd485429p+512"
    " 0x1.6a09e667f3bcdp+512 0x1.7a11473eb0187p+512 0x1.8ace5422aa0dbp+512 0x1.9c49182a3f090p+512"
    " 0x1.ae89f995ad3adp+512 0x1.c199bdd85529cp+512 0x1.d5818dcfba487p+512 0x1.ea4afa2a490dap+512",
}
_LOG2E = {32: "0x1.715476p+0", 64: "0x1.71547652b82fep+0"}
_LN2_HI = {32: "0x1.63p-1", 64: "0x1.62e42feep-1"}
_LN2_LO = {32: "-0x1.bd0106p-13", 64: "0x1.a39ef35793c76p-33"}
# Up to here n * _LN2_HI, even of sixteenths, is a multiple of the last place of a row's reference.
_MAX_TAME = {32: 2.0**10, 64: 2.0**15}
_MANTISSA = {32: 23, 64: 52}
_BIAS = {32: 127, 64: 1023}
_MIN_EXPONENT = {32: -126, 64: -1022}
_SUM_SHIFT = {32: 64, 64: 512}
_SUM_FLOOR = {32: -131.0, 64: -1060.0}
# Exponentials are squared as multiples of 2^-_SQUARE_SHIFT, and as if none were below 2^_SQUARE_FLOOR,
# so that no square leaves the normal numbers; what that adds is below any normal result.
_SQUARE_SHIFT = {32: 44, 64: 412}
_SQUARE_FLOOR = {32: -43, 64: -400}
_LARGEST = {32: float(np.finfo(np.float32).max), 64: float(np.finfo(np.float64).max)}
# A gradient's factor below the first is lifted by 2^second while it is applied.
_SMALL = {32: 2.0**-40, 64: 2.0**-300}
_LIFT = {32: 96, 64: 600}
# Else the user has named another processor, of which nothing is assumed; or has done without AVX.
_FOR_HOST = not (numba.config.CPU_NAME or numba.config.CPU_FEATURES)
_AVX512 = _FOR_HOST and numba.config.ENABLE_AVX and get_host_cpu_features().get("avx512f", False)
_EXP_STEP = 0.0435 if _AVX512 else 0.694  # just above ln(2) / 16, or ln(2)
# Vectors worked on as one value: LLVM splits it, and so interleaves them. On AVX-512 four take a sixth
# less time than one after the other; eight spill registers, and take as long again.
_TOGETHER = 4 if _AVX512 else 2
_LOG1P = (
    "0x1.2f0d58deeae08p-3 0x1.39a0fac5a8dd7p-3 0x1.746645ede9703p-3 0x1.c71c51e94c1b1p-3"
    " 0x1.2492494215c0ap-2 0x1.999999997fb5ap-2 0x1.5555555555593p-1"
)
# log(1 + f) = f + f^2 Q(f) for -1/4 <= f <= 1/2, relative error 2^-27
_LOG1P_IN_FLOAT = (
    "-0x1.6fe654p-5 0x1.abf6b8p-4 -0x1.0d90p-3 0x1.2897b6p-3 -0x1.54f23ep-3 0x1.99685ap-3"
    " -0x1.000024p-2 0x1.5555a6p-2 -0x1p-1"
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


class _Call(types.Type):
    """The type of a kernel's first argument, which is nothing else: a dtype, and what is wanted."""

    def __init__(self, dtype: types.Type, wanted: tuple[str, ...]) -> None:
        self.dtype, self.wanted = dtype, wanted
        super().__init__(f"call({dtype}, {' '.join(wanted)})")


register_model(_Call)(models.OpaqueModel)


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

    def parts(self, lanes: int) -> list[_Value]:
        if lanes == self.lanes:
            return [self]
        return [self.shuffled(self, [*range(k, k + lanes)]) for k in range(0, self.lanes, lanes)]

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
        if past_caches and self.dtype in _HALVES:
            value = _unfolded(_joined([self._narrowed(part) for part in value.parts(self.lanes)]))
        else:
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

    def fetch_ahead(self, index: Any, count: int, to_write: bool = False) -> None:
        """Fetch four pages ahead of ``count`` vectors, a line of each page in turn.

        The hardware fetches ahead within a page, and starts anew at each: see ``in_turn`` in
        ``_native/halves.inc``. 0.63 to 0.75 of the time of long rows from memory.
        """
        b, word = self.builder, ir.IntType(64)
        size, turn = count * self.lanes * self._align, 4 * _PAGE
        address = _Value(b, b.ptrtoint(self._at(index, 0), word)) + turn
        address = address & -min(size, 4 * _LINE)
        page, line = (address & (3 * _LINE)) * (_PAGE // _LINE), (address & (turn - 4 * _LINE)) >> 2
        pointer = b.inttoptr(((address & -turn) + page + line).value, ir.IntType(8).as_pointer())
        start = _Pointer(b, pointer, types.int8)
        for i in range(size // _LINE):
            start.prefetch(i % 4 * _PAGE + i // 4 * _LINE, to_write)

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
_CONVERTS_HALVES = _FOR_HOST and (
    get_host_cpu_features().get("f16c", False) or platform.machine() in ("arm64", "aarch64")
)


def _unfolded(v: _Value) -> _Value:
    """Return the same, but not as one instruction with the store: that would not pass the caches by.

    So, and as whole lines, large gradients of halves take 0.76 of the time.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return v
    same = ir.InlineAsm(ir.FunctionType(v.type, [v.type]), "", "=v,0")
    return _Value(v.builder, v.builder.call(same, [v.value]))


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


def _named(cls: Any, *results: Any) -> Callable[..., types.Type]:
    return lambda *args: types.BaseTuple.from_types([_result(r, args) for r in results], cls)


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
                return _result_value(context, builder, returned, out)

            return returned(*args), codegen

        typed.__name__ = emit.__name__
        parameters = list(inspect.signature(emit).parameters.values())
        context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        typed.__signature__ = inspect.Signature([context, *parameters])
        return intrinsic(typed)

    return decorate


def _result_value(context: Any, builder: Any, kind: types.Type, out: Any) -> Any:
    if isinstance(out, tuple):
        values = [_result_value(context, builder, k, v) for k, v in zip(kind, out, strict=True)]
        return context.make_tuple(builder, kind, values)
    return context.get_dummy_value() if out is None else out.value


def _operand(builder: Any, value: Any, kind: types.Type) -> Any:
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.CPointer):
        return _Pointer(builder, value, kind.dtype)
    if isinstance(kind, types.BaseNamedTuple):
        values = cgutils.unpack_tuple(builder, value, len(kind))
        operands = [_operand(builder, v, k) for v, k in zip(values, kind, strict=True)]
        return kind.instance_class(*operands)
    return _Value(builder, value)


# ---- Numbers that go together; a field may be None, and then takes no instruction ----


class _Soft(NamedTuple):
    """Soft targets: class j has the share w_j * (alpha * t_j + beta).

    Class ids have no t. What is summed of them are shares of w_j, of which ``unit`` counts, and
    then the target has ``id_share`` * w_t more. Of probabilities, they are 1 and 0.
    """

    t: Any  # pointers to a row's probabilities, to the classes' weights; or None
    w: Any
    alpha: Any
    beta: Any
    unit: Any
    id_share: Any


class _Shares(NamedTuple):
    """To add to `_ShareSums`: the shares of classes, with the maximum so far, m."""

    soft: Any
    m: Any
    top: Any


class _ShareSums(NamedTuple):
    """Sums of share * (m - x) * `_gap_unit`, of the shares, and of those below ``top``; the least t."""

    linear: Any
    linear_carry: Any
    mass: Any
    mass_carry: Any
    below: Any
    below_carry: Any
    least: Any


class _Spread(NamedTuple):
    """To add to `_Sum`: the exponentials in e, times m - x."""

    e: Any
    m: Any


class _Squares(NamedTuple):
    """To add to `_Sum`: the squares of the exponentials in e."""

    e: Any


class _Sum(NamedTuple):
    total: Any
    carry: Any


class _Found(NamedTuple):
    """Statistics of rows, all double."""

    m: Any  # NaN if the row holds one
    target_logit: Any
    top: Any
    ahead: Any
    spread: Any
    squares: Any


class _Factor(NamedTuple):
    """What turns exponentials into gradients; see `_factor`."""

    hi: Any
    lo: Any
    down: Any
    least: Any


class _Own(NamedTuple):
    """What else the gradients of soft targets need, row by row.

    Shares times the scale are w * (alpha * t + beta); a t below ``least_t`` counts as 0. An exponential
    of more than ``top`` is the maximum's, whose gradient is ``own``; ``target`` is that of a class id.
    """

    alpha: Any
    beta: Any
    least_t: Any
    top: Any
    own: Any
    target: Any


class _SoftFactor(NamedTuple):
    """What turns exponentials into gradients where targets are soft."""

    factor: Any
    own: Any
    t: Any
    w: Any


class _Log(NamedTuple):
    """What turns logits into logarithms of probabilities: the row's maximum, and log of its sum."""

    m: Any
    log_total: Any


# ---- Arithmetic: of scalars and vectors alike ----


def _fma(a: _Value, b: Any, c: Any) -> _Value:
    """Return a * b + c, fused where the machine can; right either way."""
    return a.call("fmuladd", b, c)


def _two_sum(a: _Value, b: _Value) -> tuple[_Value, _Value]:
    s = a + b
    b1 = s - a
    return s, (a - (s - b1)) + (b - b1)


def _term(x: _Value, ref: _Value, tame: bool = False) -> _Value:
    """exp(x - ref) * 2^_SUM_SHIFT; 0 where no sum or gradient could show it.

    Where all are tame, see `_is_tame`, none is 0, and ref + n ln(2) is one number. Either way the
    reduced argument is (x - ref) - n * _LN2_HI rounded once: the same bits.
    """
    bits = x.bits
    d = x - ref
    if _AVX512:  # Adding it rounds to sixteenths, which are then the lowest 4 bits.
        magic_number = 1.5 * 2.0 ** (_MANTISSA[bits] - 4)
    else:  # It rounds to an integer; the low bits are then the exponent of the result, bias included.
        magic_number = 1.5 * 2.0 ** _MANTISSA[bits] + _BIAS[bits] + _SUM_SHIFT[bits]
    magic = _fma(d, _LOG2E[bits], x.of(magic_number))
    n = magic - magic_number
    if tame:
        y = x - _fma(n, _LN2_HI[bits], ref)
    else:
        x1 = d + ref
        y = _fma(n, -float.fromhex(_LN2_HI[bits]), d) + ((x - x1) - (ref - (x1 - d)))
    y = _fma(n, -float.fromhex(_LN2_LO[bits]), y)
    first, *others = (_SIXTEENTHS_POLY if _AVX512 else _POLY)[bits].split()
    poly = y.of(first)
    for coefficient in others:
        poly = _fma(poly, y, coefficient)
    seen = None if tame else d.compare(">=", _SUM_FLOOR[bits], or_nan=True)
    if _AVX512:
        lanes = 512 // bits
        where = [None] * (x.lanes // lanes) if seen is None else seen.parts(lanes)
        powers = map(_scaled, map(_sixteenth, magic.parts(lanes)), n.parts(lanes), where)
        power = _joined([*powers])
    else:
        power = (magic.as_bits() << _MANTISSA[bits]).as_real()
    e = _fma(_fma(poly, y * y, y), power, power)
    return e if seen is None else seen.select(e, 0.0)


def _sixteenth(v: _Value) -> _Value:
    """2^(i/16) * 2^_SUM_SHIFT, where the lowest 4 bits of a lane are i."""
    numbers = [*map(float.fromhex, _SIXTEENTHS[v.bits].split())]
    low, *high = (ir.Constant(v.type, numbers[i : i + v.lanes]) for i in range(0, 16, v.lanes))
    operands = [low, v.as_bits().value, *high]
    signature = ir.FunctionType(v.type, [operand.type for operand in operands])
    name = "vpermi2var.pd" if high else "permvar.sf"
    function = _declare(v.builder, f"llvm.x86.avx512.{name}.512", signature)
    return _Value(v.builder, v.builder.call(function, operands))


def _scaled(v: _Value, n: _Value, where: _Value | None) -> _Value:
    """Multiply by 2 to the power of n, rounded down; give 0 elsewhere.

    Subnormal numbers on the way to 0 cost 15 times the time, where logits are 130 apart.
    """
    lanes, current = ir.IntType(v.lanes), ir.IntType(32)(4)  # way of rounding
    mask = lanes(-1) if where is None else v.builder.bitcast(where.value, lanes)
    operands = [v.value, n.value, v.of(0.0).value, mask, current]
    signature = ir.FunctionType(v.type, [operand.type for operand in operands])
    letter = "s" if v.bits == 32 else "d"
    function = _declare(v.builder, f"llvm.x86.avx512.mask.scalef.p{letter}.512", signature)
    return _Value(v.builder, v.builder.call(function, operands))


def _joined(parts: list[_Value]) -> _Value:
    """Make one vector of as many as a power of 2."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [a.shuffled(b, [*range(2 * a.lanes)]) for a, b in pairs]
    return parts[0]


def _lost(total: _Value, s: _Value) -> _Value:
    """Return what the sum of 1 and s >= 0 rounded away."""
    return s.compare("<", 1.0).select(s - (total - 1.0), 1.0 - (total - s))


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
        fix = near.select(0.0, _lost(u, s) / u)
    z = q * q
    tail = z.of(first)
    for coefficient in others:
        tail = _fma(tail, z, coefficient)
    low = q * (half + tail * z) + (k * float.fromhex(_LN2_LO[64]) + fix)
    result = k * float.fromhex(_LN2_HI[64]) + (f - (half - low))
    return s.compare("<", math.inf).select(result, s)


def _log1p_in_float(s: _Value) -> _Value:
    """log(1 + s) of doubles >= 0, under 1 ULP of float32: half the instructions."""
    near = s.rounded(32)
    u, low = near + 1.0, (s - near.double()).rounded(32)
    # (1 + s) / 2^k = 1 + f with 3/4 <= 1 + f < 3/2: u is rounded, but f only once
    bits = u.as_bits() - 0x3F400000
    scale = (bits.of(0x3F800000) - (bits & ~0x7FFFFF)).as_real()
    k = (bits >> 23).as_type("sitofp", ir.FloatType())
    f, f_low = _fma(near, scale, scale - 1.0), low * scale
    first, *others = _LOG1P_IN_FLOAT.split()
    q = f.of(first)
    for coefficient in others:
        q = _fma(q, f, coefficient)
    tail = _fma(f * q, f, _fma(-f_low, f, f_low))  # f^2 may be subnormal, and is not formed
    return _fma(k, "0x1.62e43p-1", f + tail).double()


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
    if pointer:
        pointer.value = pointer.builder.gep(pointer.value, [offset.value])
    return pointer


def _unless(first: types.Type, made: Any) -> types.Type:
    """Return none where the first argument is None."""
    return types.none if isinstance(first, types.NoneType) else made


@_emits(lambda given, value: _unless(given, value))
def _if_given(given, value):
    """Return a value where something is given, else None."""
    return given and value


@_emits(lambda a, b, value: value if _unless(a, value) == value else _unless(b, value))
def _if_either(a, b, value):
    return (a or b) and value


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
def _fetch_ahead(source):
    """Fetch what will be read after a square of vectors, which starts here if rows are contiguous."""
    source.fetch_ahead(0, source.lanes)


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
        if ahead:
            source.prefetch(index * step + ahead)
    for i, column in enumerate(_transposed(rows)):
        out.store(out_step * i, column)


def _squares(past_caches: bool) -> Any:
    """Make the step that does the reverse."""

    @_emits(_none)
    def transpose_out(source, source_step, out, step, ahead, n_vectors, n_lanes, noted, c):
        """Write the first n_lanes of the first n_vectors, fetching lines ``ahead``.

        Or, past the caches, all of them, to addresses for whole vectors. Given what `_note_factors`
        leaves, exponentials become gradients on the way; their first class is c.
        """
        columns = [source.load(source_step * i) for i in range(source.lanes)]
        if noted:
            hi, lo, down, least, own, ids = (noted.load(k * _GROUP) for k in range(6))
            target = ids - _Value(c.builder, c.builder.sitofp(c.value, ids.element))
        for i, row in enumerate(_transposed(columns)):
            if noted:
                row = _gradient(row, (hi, lo, down, least))
                row = target.compare("==", float(i)).select(own, row)
            if past_caches:
                out.store(step * i, row, past_caches=True)
                continue
            lanes = n_vectors.compare(">", i).select(n_lanes, n_lanes.of(0))
            out.prefetch(step * i + ahead, to_write=True)
            out.store_where(_first(out, lanes), step * i, row)

    return transpose_out


_transpose_out, _transpose_out_past_caches = map(_squares, (False, True))


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


@_emits(types.float64)
def _least_lane(v):
    while v.lanes > 1:
        v = _smaller(*v.halves())
    return v.lane(0).double()


def _smaller(a: _Value, b: _Value) -> _Value:
    return a.compare("<", b).select(a, b)


def _extremes(count: int) -> Any:
    """Make the step that reads ``count`` vectors of classes."""

    @_emits(_several(_vector, _vector))
    def extremes(x, i, top, low):
        """Return the largest of them and ``top``, the smallest of them and ``low``, lane by lane."""
        larger = smaller = x.load(i, count * x.lanes)
        while larger.lanes > x.lanes:
            larger, smaller = _larger(*larger.halves()), _smaller(*smaller.halves())
        return _larger(larger, top), _smaller(smaller, low)

    return extremes


_extremes8, _extremes1 = map(_extremes, (8, 1))


@_emits(_several(_vector, _vector))
def _extremes_end(x, i, left, top, low):
    """Do the same with the last classes of a row, fewer than a vector holds."""
    mask = _first(x, left)
    v = x.load_where(mask, i, -math.inf)
    return _larger(v, top), _smaller(mask.select(v, math.inf), low)


@_emits(types.boolean)
def _is_tame(x, top, low, ref):
    """Whether ref + n ln(2) near every logit is exact in one number, and none is too low to count.

    So if neither logits nor what they are rounded to have larger exponents than ref. The largest logit
    is ``top``, the smallest ``low``; ref may be less than ``top``. False if ref <= 0.
    """
    bits = _bits_of(x)
    top, low, ref = (v.rounded(bits) for v in (top, low, ref))
    largest = (ref.as_bits() | ((1 << _MANTISSA[bits]) - 1)).as_real()  # of ref's exponent
    near = low.compare(">=", ref + _SUM_FLOOR[bits]) & ref.compare("<=", _MAX_TAME[bits])
    within = top.compare("<=", ref) | top.compare("<=", largest - _EXP_STEP)
    return near & within & low.compare(">=", _EXP_STEP - largest)


@_emits(types.float64)
def _largest_lane(top):
    while top.lanes > 1:
        top = _larger(*top.halves())
    return top.lane(0).double()


def _terms(count: int, tame: bool = False) -> Any:
    """Make the step that reads ``count`` vectors and adds their exponentials."""

    @_emits(_several(_vector, _vector))
    def terms(x, i, ref, m, e, ties):
        """Sum exp(x - ref) over the classes below m, and take their number from ``ties``.

        The exponentials are stored in e, if it is given: all of them. Without m all classes count.
        """
        together = min(count, _TOGETHER)
        sums = []
        for k in range(0, count, together):
            at = i + k * x.lanes
            v = x.load(at, together * x.lanes)
            x.fetch_ahead(at, together)
            if e:  # in a gradient that is not in the caches
                e.fetch_ahead(at, together, to_write=True)
            term = _term(v, ref.repeated(v.lanes), tame)
            if e:
                e.store(at, term)
            term, ties = _below(v, m, term, ties)
            sums.append(term)
        return _folded(sums, x.lanes), ties

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


def _below(v: _Value, m: _Value | None, term: _Value, ties: _Value) -> tuple[_Value, _Value]:
    """Return the terms of logits below m, else 0, and ``ties`` less the logits below m."""
    if m is None:
        return term, ties
    for part in v.parts(m.lanes):
        ties = part.compare("<", m, or_nan=True).select(ties - 1.0, ties)
    return v.compare("<", m.repeated(v.lanes), or_nan=True).select(term, 0.0), ties


_terms4, _terms2, _terms1 = map(_terms, (4, 2, 1))
_terms4_tame = _terms(4, tame=True)


@_emits(_several(_vector, _vector))
def _terms_end(x, i, left, ref, m, e, ties):
    """Do the same with the last classes of a row, fewer than a vector holds."""
    mask = _first(x, left)
    v = x.load_where(mask, i, -math.inf)
    # a lane without a class may equal a maximum of -inf, and is below it all the same
    m = m and mask.select(m, math.inf)
    term = _term(v, ref)
    if e:
        e.store_where(mask, i, term)
    return _below(v, m, term, ties)


@_emits(_same)
def _plus(a, b):
    return a + b


@_emits(_same)
def _times(a, b):
    return a * b


def _added(total: _Value, carry: _Value, part: _Value) -> tuple[_Value, _Value]:
    """Add to a sum of doubles, where float32 has 29 bits to spare; float64 carries its errors."""
    if part.bits == 32:
        return total + part.double(), carry
    total, error = _two_sum(total, part)
    return total, carry + error


_add = _emits(_several(_same, _same))(_added)


def _dot(a: _Value, b: _Value, lanes: int) -> _Value:
    """Add products, down to one vector of so many lanes."""
    if a.lanes == lanes:
        return a * b
    (a, c), (b, d) = a.halves(), b.halves()
    return _folded([_fma(c, d, a * b)], lanes)


def _additions(count: int) -> Any:
    """Make the step that reads ``count`` vectors of classes and adds to sums what they are to."""

    @_emits(lambda x, i, what, sums: sums)
    def add(x, i, what, sums):
        return _summed(x, i, what, sums, lambda p: p.load(i, count * p.lanes), None)

    return add


_add8, _add4, _add1 = map(_additions, (8, 4, 1))


@_emits(lambda x, i, left, what, sums: sums)
def _add_end(x, i, left, what, sums):
    """Do the same with the last classes of a row, fewer than a vector holds."""
    mask = _first(x, left)
    return _summed(x, i, what, sums, lambda p: p.load_where(mask, i, 0.0), mask)


def _summed(x: _Pointer, i: _Value, what: Any, sums: Any, load: Any, mask: _Value | None) -> Any:
    if isinstance(what, _Squares):
        e = load(what.e)
        bits = e.bits
        floor = 2.0 ** _SQUARE_FLOOR[bits]
        e = e.compare(">", floor).select(e, floor) * 2.0 ** (_SQUARE_SHIFT[bits] - _SUM_SHIFT[bits])
        return _Sum(*_added(*sums, _dot(e, e, x.lanes)))
    v = load(x)
    if isinstance(what, _Spread):
        d = what.m.repeated(v.lanes) - v
        d = d.compare("<", _LARGEST[d.bits]).select(d, _LARGEST[d.bits])  # the exponential of -inf is 0
        return _Sum(*_added(*sums, _dot(load(what.e), d, x.lanes)))
    return _summed_shares(x, i, v, what, sums, load, mask)


def _summed_shares(
    x: _Pointer, i: _Value, v: _Value, what: _Shares, sums: _ShareSums, load: Any, mask: _Value | None
) -> _ShareSums:
    soft, tiny, least = what.soft, 2.0 ** _MIN_EXPONENT[v.bits], sums.least
    t, w = (p and load(p) for p in (soft.t, soft.w))
    if t:
        soft.t.fetch_ahead(i, v.lanes // x.lanes)
    share = w or v.of(1.0)
    if t:
        for part in t.parts(x.lanes):
            least = part.compare("<", least).select(part, least)
        t = _normal(t, tiny)
        share = _fma(t, soft.alpha.rounded(v.bits), soft.beta.rounded(v.bits))
        share = share * w if w else share
    if mask:
        share = mask.select(share, 0.0)
    # a share that is 0, or not a normal number, counts for nothing, also where x is -inf
    unit = _gap_unit(soft)
    gap = _fma(v, -unit, (what.m * unit).repeated(v.lanes))
    gap = share.compare(">=", tiny, or_nan=True).select(gap, 0.0)
    linear = _added(sums.linear, sums.linear_carry, _dot(share, gap, x.lanes))
    mass = _added(sums.mass, sums.mass_carry, _folded([share], x.lanes))
    below = sums.below, sums.below_carry
    if what.top:
        share = v.compare("<", what.top.repeated(v.lanes)).select(share, 0.0)
        below = _added(*below, _folded([share], x.lanes))
    return _ShareSums(*linear, *mass, *below, least)


def _gap_unit(soft: _Soft) -> float:
    """Return what multiplies m - x, so that neither it nor sums of it overflow if the loss does not.

    Probabilities may be as small as normal numbers are, and so must be their products.
    """
    return 0.5 if soft.t else 2.0**-24


def _normal(t: _Value, least: Any) -> _Value:
    """Replace what is less by 0: products of numbers that are not normal cost 100 cycles."""
    return t.compare(">=", least, or_nan=True).select(t, 0.0)


@_emits(_several(_same, _same))
def _add_exactly(total, carry, part):
    total, error = _two_sum(total, part)
    return total, carry + error


@_emits(_several(lambda x, i, total, *_: total, lambda x, i, total, *_: total))
def _add4_exactly(x, i, total, carry):
    """Add four vectors of losses; those of floats add up exactly, unless one is 2^27 times another."""
    lanes = total.lanes
    a, b, c, d = (x.load(i + k * lanes, lanes).double() for k in range(4))
    parts = [(a + b) + (c + d)] if _bits_of(x) == 32 else [a, b, c, d]
    for part in parts:
        total, error = _two_sum(total, part)
        carry = carry + error
    return total, carry


def _summed_lanes(total: _Value, carry: _Value) -> tuple[_Value, _Value]:
    while total.lanes > 1:
        low, high = carry.halves()
        total, error = _two_sum(*total.halves())
        carry = low + high + error
    return total.lane(0), carry.lane(0)


_sum_lanes = _emits(_several(types.float64, types.float64))(_summed_lanes)


@_emits(_several(types.float64, types.float64))
def _sum_of_terms(total, carry):
    """Return the same for sums of terms, all positive: those of float32 carry nothing."""
    if total.lanes == _lanes_of(types.float32):
        total = _folded([total], 1).lane(0)
        return total, total.of(0.0)
    return _summed_lanes(total, carry)


@_emits(_same)
def _closed(total, carry):
    """Return a sum and its carry in one number; inf has none."""
    return total.compare("<", math.inf).select(total + carry, total)


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
def _loss(x, gap, error, rest, few):
    """Return losses; those of few classes, which cost more than the exponentials, by way of floats."""
    if few and _bits_of(x) == 32:
        return gap + _log1p_in_float(rest)
    return gap + (error + _log1p(rest, _bits_of(x)))


@_emits(lambda x, gap, *_: gap)
def _soft_loss(x, gap, rest, linear, mass):
    return _if_finite(gap, linear + mass * _log1p(rest, _bits_of(x)))


@_emits(lambda soft, gap, *_: types.UniTuple(_unless(soft, gap), 3))
def _mass_of(soft, gap, linear, mass, below, w):
    """Return the part of rows' losses that is linear in the logits, and two sums of their shares.

    That of all, and that of all classes but the maximum, if it has more than half of the probability; w
    are the targets' weights.
    """
    if not soft:
        return None, None, None
    share = soft.id_share * w
    own = share.compare("==", 0.0).select(0.0, share * gap)  # 0 also where gap is infinite
    linear = soft.unit * linear / _gap_unit(soft) + own
    others = soft.unit * below + gap.compare(">", 0.0).select(share, 0.0)
    return linear, soft.unit * mass + share, others


@_emits(_same)
def _weighed(loss, weight):
    """Multiply by weights; one of 0 makes inf 0, but leaves a NaN."""
    none = weight.compare("==", 0.0) & loss.compare("ord", loss)
    return none.select(0.0, loss * weight)


@_emits(types.float64)
def _rise(soft, m, former):
    """Return what m - x grows by, in its unit."""
    return m * _gap_unit(soft) - former * _gap_unit(soft)


@_emits(types.float64)
def _weight_of(soft, i):
    return soft.w.load(i, 0).double() if soft.w else soft.unit.of(1.0)


def _soft_like(soft: Any, t: types.Type, *_: Any) -> types.Type:
    if isinstance(soft, types.NoneType):
        return soft
    return types.BaseTuple.from_types([_unless(soft.types[0], t), *soft.types[1:]], _Soft)


@_emits(_soft_like)
def _soft_with(soft, t, first):
    """Return the same from class ``first`` on, whose probability, if there is one, is at t."""
    if soft and soft.w:
        soft.w.value = soft.w.builder.gep(soft.w.value, [first.value])
    return soft and soft._replace(t=soft.t and t)


@_emits(lambda soft: _unless(soft, soft) if isinstance(soft, types.NoneType) else soft.types[0])
def _probs_of(soft):
    return soft and soft.t


@_emits(lambda soft, target: target)
def _class_id(soft, target):
    """Return the target, or -1 where targets are probabilities."""
    return target.of(-1) if soft and soft.t else target


@_emits(types.int64)
def _by_targets(soft, of_probs, of_ids):
    """Return one of two numbers: what holds where targets are probabilities, or class ids."""
    return of_probs if soft and soft.t else of_ids


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
        lost = ((-unit).call("fma", total, scale) / unit - _lost(total, rest)) / total
        lo = hi * (lost + error)
        lo = unit.compare("==", 0.0).select(0.0, lo)
    hi, lo, down = (v.rounded(bits) for v in (hi, lo, down))
    tiny = small.select(hi.of(2.0 ** (_MIN_EXPONENT[bits] + lift)), 2.0 ** _MIN_EXPONENT[bits])
    return hi, lo, down, tiny / hi.call("fabs")


def _others(gap: _Value, e: _Value, rest: _Value) -> _Value:
    """Return the sum of all exponentials but the target's, e."""
    # Where the target is not the maximum, the maximum's 1 stays: the difference cannot cancel.
    return gap.compare(">", 0.0).select((rest + 1.0) - e, rest)


def _minus_others(gap: _Value, e: _Value, rest: _Value, scale: _Value, bits: int) -> _Value:
    """Minus the sum of the others' probabilities, times the scale."""
    total, others = rest + 1.0, _others(gap, e, rest)
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


def _real_like(pointer: Any, like: Any, *_: Any) -> types.Type:
    """Return what is computed in: a number or, if ``like`` is one, a vector."""
    return _vector(pointer) if isinstance(like, _Vector) else _computed(pointer.dtype)


@_emits(_named(_Factor, _real_of, _real_of, _real_of, _real_of))
def _row_factor(e, scale, rest, drop, again, error):
    return _Factor(*_factor(_bits_of(e), scale, rest, drop, again, error))


def _written(v: _Value, how: Any, load: Any) -> _Value:
    """Return what becomes of an exponential or, for `_Log`, of a logit."""
    if isinstance(how, _Factor):
        return _gradient(v, how)
    if isinstance(how, _Log):
        d, error = _two_sum(v, -v.of(how.m))
        return d + (d.compare(">", -math.inf).select(error, 0.0) - how.log_total)
    own, t, w = how.own, *(p and load(p) for p in (how.t, how.w))
    share = v.of(own.beta)
    if t:
        share = _fma(_normal(t, own.least_t), own.alpha, own.beta)
    share = share * w if w else share
    return v.compare(">", own.top).select(own.own, _gradient(v, how.factor) - share)


def _writes(count: int, past_caches: bool = False) -> Any:
    """Make the step that turns ``count`` vectors into gradients or the like."""

    @_emits(_none)
    def write_strip(e, i, how, g):
        # as many at once as fill a line of halves
        lanes = e.lanes * (2 if past_caches and g.dtype in _HALVES else 1)
        places = [i + k for k in range(0, count * e.lanes, lanes)]
        found = [_written(e.load(at, lanes), how, lambda p, at=at: p.load(at, lanes)) for at in places]
        for at, v in zip(places, found, strict=True):
            g.store(at, v, past_caches)

    return write_strip


_write4, _write1, _write4_past_caches = _writes(4), _writes(1), _writes(4, past_caches=True)


@_emits(_none)
def _write_some(e, i, n, how, g):
    mask = _first(e, n)

    def load(p: _Pointer) -> _Value:
        return p.load_where(mask, i, 0.0)

    g.store_where(mask, i, _written(load(e), how, load))


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


# A maximum with a probability of more than 1 / 1.9 is told from the others by its exponential: theirs
# sum to less than 0.9. From there to 1/2 the plain difference is as good, within twice the rounding.
_MOST_REST, _LEAST_TOP = 0.9, 0.95


@_emits(lambda x, soft, scale, *_: _unless(soft, _named(_Own, *[_real_like] * 6)(x, scale)))
def _own_parts(x, soft, scale, gap, e, rest, mass, others, w):
    """Return what the gradients of rows need; e is exp of the target's logit minus the maximum."""
    if not soft:
        return None
    bits, scale = _bits_of(x), _if_finite(gap, scale)
    total, share = rest + 1.0, soft.id_share * w
    alone = rest.compare("<", _MOST_REST)
    own = scale * (others - mass * (rest / total)) + 0.0  # not -0
    target = scale * (mass * (e / total) - (soft.unit * w + share)) + 0.0
    target = (alone & gap.compare("==", 0.0)).select(own, target)
    alpha, beta = (scale * v for v in (soft.alpha, soft.beta))
    least_t = scale.of(2.0 ** _MIN_EXPONENT[bits]) / alpha.call("fabs")
    top = alone.select(scale.of(_LEAST_TOP * 2.0 ** _SUM_SHIFT[bits]), math.inf)
    return _Own(*(v.rounded(bits) for v in (alpha, beta, least_t, top, own, target)))


@_emits(lambda own, drop, again: own)
def _own_in_block(own, drop, again):
    """Return the same where exponentials are to be multiplied by drop * again."""
    return own and own._replace(top=(own.top.double() / drop / again).rounded(own.top.bits))


@_emits(lambda soft, factors, *_: _unless(soft, _named(_Own, *[_real_of] * 6)(factors)))
def _own_in_slots(soft, factors, r, step):
    """Return the same from where it has been noted."""
    return soft and _Own(*(factors.load(r + step * i, 0) for i in range(6)))


@_emits(lambda scale, mass: scale)
def _times_mass(scale, mass):
    return scale * mass if mass else scale


def _how_type(factor: Any, own: Any, soft: Any) -> types.Type:
    if isinstance(own, types.NoneType):
        made: types.Type = factor
        return made
    return types.BaseTuple.from_types([factor, own, *soft.types[:2]], _SoftFactor)


@_emits(_how_type)
def _how(factor, own, soft):
    """Return what turns exponentials into gradients, be targets soft or not."""
    return _SoftFactor(factor, own, soft.t, soft.w) if own else factor


@_emits(types.float64)
def _share(soft, t_at, w_at):
    share = soft.beta
    if soft.t:
        share = soft.alpha * soft.t.load(t_at, 0).double() + share
    return share * soft.w.load(w_at, 0).double() if soft.w else share


@_emits(lambda x, m, *_: _named(_Log, *[_real_like] * 2)(x, m))
def _log_parts(x, m, gap, rest):
    bits = _bits_of(x)
    log_total = gap.compare("ord", gap).select(_log1p(rest, bits), math.nan)
    return _Log(m.rounded(bits), log_total.rounded(bits))


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


# ---- Intrinsics: statistics ----


def _counts(operator: str) -> Any:
    """Make the steps that count logits in 64 lanes, in one vector, and in the last lanes of a row."""

    @_emits(types.int64)
    def count_strip(x, i, pivot):
        return _size_of(x.load(i, 64).compare(operator, pivot.repeated(64)))

    @_emits(types.int64)
    def count_one(x, i, pivot):
        return _size_of(x.load(i).compare(operator, pivot))

    @_emits(types.int64)
    def count_end(x, i, left, pivot):
        return _size_of(x.load_where(_first(x, left), i, math.nan).compare(operator, pivot))

    return count_strip, count_one, count_end


_count_ahead, _count_one_ahead, _count_end_ahead = _counts(">")
_count_tied, _count_one_tied, _count_end_tied = _counts(">=")


def _lane_bits(mask: _Value) -> _Value:
    bits = _Value(mask.builder, mask.builder.bitcast(mask.value, ir.IntType(mask.lanes)))
    return bits.as_type("zext", ir.IntType(64))


def _size_of(mask: _Value) -> _Value:
    return _lane_bits(mask).call("ctpop")


@_emits(types.int64)
def _equal_lanes(x, i, value):
    """Return which of a vector's logits equal a value: one bit each."""
    return _lane_bits(x.load(i).compare("==", value))


@_emits(types.int64)
def _equal_lanes_end(x, i, left, value):
    mask = _first(x, left)
    return _lane_bits(mask & x.load_where(mask, i, 0.0).compare("==", value))


@_emits(types.int64)
def _lowest_bit(bits):
    return ((bits & (0 - bits)) - 1).call("ctpop")


@_emits(_doubles)
def _lse(x, m, gap, rest):
    """Return the logarithm of the sum of exp; in rows that are not finite the maximum, or NaN."""
    return gap.compare("ord", gap).select(m + _log1p(rest, _bits_of(x)), m)


def _if_finite(gap: _Value, value: _Value) -> _Value:
    return gap.compare("ord", gap).select(value, math.nan)


@_emits(_doubles)
def _entropy(x, gap, rest, spread):
    return _if_finite(gap, _log1p(rest, _bits_of(x)) + spread / (rest + 1.0))


@_emits(_doubles)
def _brier(x, gap, rest, squares):
    """Return the sum of the squares of the others' probabilities, and of their sum."""
    total = rest + 1.0
    e = _term(-gap, gap.of(0.0)) * 2.0 ** -_SUM_SHIFT[64]
    others = _others(gap, e, rest)
    # a quotient of sums that keep what they round away: half of the error would come from here
    square, divisor = others * others, total * total
    dividend, left = _two_sum(square, squares)
    left = left + others.call("fma", others, -square)
    more = total.call("fma", total, -divisor) + 2.0 * total * _lost(total, rest)
    quotient = dividend / divisor
    left = (-quotient).call("fma", divisor, dividend) + (left - quotient * more)
    return _if_finite(gap, quotient + left / divisor)


@_emits(_doubles)
def _max_prob(x, gap, rest):
    return _if_finite(gap, 1.0 / (rest + 1.0))


@_emits(types.float64)
def _square_unit(pointer):
    shift = _SQUARE_SHIFT[_bits_of(pointer)]
    return _Value(pointer.builder, ir.DoubleType()(2.0 ** (-2 * shift)))


@_emits(_none)
def _store_number(pointer, i, n, kept, value):
    """Store numbers of the first n lanes, NaN in rows that are not kept."""
    value = value.rounded(pointer.dtype.bitwidth)
    pointer.store_where(_first(pointer, n), i, kept.select(value, math.nan))


@_emits(_none)
def _store_id(x, pointer, i, n, kept, gap, value):
    """Store class ids or ranks, -1 in rows that are not kept or have a loss of NaN."""
    good = kept & gap.compare("ord", gap)
    ids = good.select(value, -1.0).as_type("fptosi", ir.IntType(64))
    pointer.store_where(_first(x, n), i, ids)


# ---- Intrinsics: rows as lanes ----


def _integers(x: Any, *_: Any) -> types.Type:
    return _Vector(types.int64 if _lanes_of(x.dtype) == 8 else types.int32, _lanes_of(x.dtype))


@_emits(_several(_mask, _integers, types.int64))
def _read_targets(x, targets, i, count, n):
    """Which of ``count`` rows are kept, their targets, -1 in the others, and how many are ignored."""
    mask = _first(x, count)
    t = targets.load_where(mask, i, -1)
    kept = t.compare(">=", 0) & t.compare("<", n)
    return kept, kept.select(t.as_type("trunc", ir.IntType(_bits_of(x))), -1), count - _size_of(kept)


@_emits(_several(_mask, _integers, types.int64))
def _no_targets(x, count):
    """Return the same where rows have no targets, and all are kept."""
    ids = ir.VectorType(ir.IntType(_bits_of(x)), x.lanes)
    return _first(x, count), _Value(x.builder, ids([-1] * x.lanes)), count - count


@_emits(types.int64)
def _count_bad(kept, least, mass):
    """How many of the rows that are kept have a negative probability or a NaN."""
    if not mass:
        return _Value(kept.builder, ir.IntType(64)(0))
    return _size_of(kept & (least.compare("<", 0.0) | mass.compare("uno", mass, or_nan=True)))


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


@_emits(lambda x, *_: _vector(x))
def _ids_of(x, target, kept):
    """Return targets as reals; -1 where rows are not kept."""
    bits = _bits_of(x)
    real = target.as_type("sitofp", ir.FloatType() if bits == 32 else ir.DoubleType())
    return kept.select(real, -1.0)


@_emits(_same)
def _nan_with(m, total):
    """Return the maxima, NaN in rows whose sums are."""
    return total.compare("ord", total).select(m, math.nan)


@_emits(_none)
def _narrow_gradient(work, c, kept, target, target_gradient, how):
    """Replace the exponentials of class c by gradients."""
    at = c * work.lanes
    p = _written(work.load(at), how, lambda p: p.load(at))
    p = _is_class(target, c).select(target_gradient, p)
    work.store(at, kept.select(p, 0.0))


@_emits(_named(_Factor, _vector, _vector, _vector, _vector))
def _lane_factors(x, gap, rest, scale):
    """Return the rows' factors; NaN in rows that are not finite."""
    scale = _if_finite(gap, scale)
    one = scale.of(1.0)
    return _Factor(*_factor(_bits_of(x), scale, rest, one, one, scale.of(0.0)))


@_emits(_vector)
def _target_lanes(x, own, gap, e, rest, scale):
    """Return the gradients of the rows' targets."""
    if own:
        return own.target
    bits = _bits_of(x)
    return _minus_others(gap, e, rest, _if_finite(gap, scale), bits).rounded(bits)


@_emits(_doubles)
def _term_of(x, term):
    """Return an exponential as it is."""
    return term.double() * 2.0 ** -_SUM_SHIFT[_bits_of(x)]


@_emits(_same)
def _rank_lanes(ranks, x, target_logit, target, c):
    """Count class c where it is ahead of the target."""
    before = _is_class(target, c, ">") & x.compare("==", target_logit)
    ahead = x.compare(">", target_logit) | before
    return ahead.select(ranks + 1.0, ranks)


@_emits(_same)
def _top_lanes(tops, x, m, c):
    """Note class c where it is a maximum."""
    number = _Value(c.builder, c.builder.sitofp(c.value, tops.element))
    return x.compare("==", m).select(number, tops)


@_emits(lambda stats, *fields: _unless(stats, _named(_Found, *fields)()))
def _found(stats, m, target_logit, top, ahead, spread, squares):
    """Return statistics of rows, where they are wanted."""
    return stats and _Found(m, target_logit, top, ahead, spread, squares)


@_emits(types.boolean)
def _any_at_least(v, limit):
    """Whether |v| >= limit, or is NaN, in some lane."""
    mask = v.call("fabs").compare(">=", limit, or_nan=True).as_type("zext", ir.IntType(32))
    while mask.lanes > 1:
        low, high = mask.halves()
        mask = low | high
    return mask.lane(0).compare("!=", 0)


# ---- What a kernel is given ----

# Addresses, strides in elements, and numbers; 64 bits each.
_JOB = (
    *("x", "x_outer", "x_inner", "x_class", "inner", "first_row", "n_rows", "n_classes"),
    # without targets, a softmax is wanted, in place of the gradient; `log`: its logarithm
    *("targets", "losses", "tile_sums", "tile_rows", "item_rows"),
    *("scale", "scale_step", "grad", "g_outer", "g_inner", "g_class", "stream", "log"),
    # scratch: so many words for each worker; states: of the parts of long rows
    *("scratch", "scratch_size", "states", "n_parts"),
    "has_more",  # whether the rest holds anything
)
_MORE = (
    *("row_weights", "weight_step", "id_weights"),  # id_weights: of classes, where nothing else is soft
    *("probs", "p_outer", "p_inner", "p_class", "weight"),
    *("lse", "target_logit", "max_logit", "argmax", "rank", "entropy", "max_prob", "brier"),
    *("alpha", "beta", "unit", "id_share"),  # doubles
)
_NUMBERS = 4
# A row while it is read: its maximum; what its terms are relative to, within _MAX_LEAD below it; the
# sum of the terms and its carry; how many classes equal the maximum.
_M, _REF, _TOTAL, _CARRY, _TIES, _STATE = 0, 1, 2, 3, 4, 16
# Then the sums of shares, as in `_ShareSums`; or the first class that is the maximum, how many are
# ahead of the target, the sums of terms times (m - x) and of their squares.
_LINEAR, _LINEAR_CARRY, _MASS, _MASS_CARRY, _BELOW, _BELOW_CARRY, _LEAST = range(5, 12)
_TOP, _AHEAD, _SPREAD, _SPREAD_CARRY, _SQUARES, _SQUARES_CARRY = range(5, 11)
# The start of a worker's scratch, in doubles: states of a group of rows; of each gap, gap_error, rest
# and target's logit, and what soft targets come to, or `_Found`; room for their weights; then what the
# kernel needs.
_TALL = 256
_PARTS = _TALL * _STATE
_GAP, _GAP_ERROR, _REST, _LOGIT_PART = (i * _TALL for i in range(4))
_LINEAR_PART, _MASS_PART, _OTHERS_PART, _WEIGHT_PART, _BAD_PART = (i * _TALL for i in range(4, 9))
_M_PART, _TOP_PART, _AHEAD_PART, _SPREAD_PART, _SQUARES_PART = (i * _TALL for i in range(4, 9))
_GRADIENT_PARTS = 8  # what is known of a row when its gradient is written
_SPARE = 9 * _TALL
_WORK = _PARTS + 10 * _TALL


@njit(**_INNER)
def _target(x, job, row):
    """Return a row's target; 0 if it has none, and is kept."""
    if job.targets == 0:
        return 0
    return _int64s(job.targets, x)[row]


@njit(**_INNER)
def _target_to_write(job, target, soft):
    """Return the class id whose gradient is not like the others', or -1."""
    return -1 if job.targets == 0 else _class_id(soft, target)


@njit(**_INNER)
def _lanes_kept(x, job, row, count):
    """See `_read_targets`."""
    if job.targets == 0:
        return _no_targets(x, count)
    return _read_targets(x, _int64s(job.targets, x), row, count, job.n_classes)


@njit(**_INNER)
def _id_weight(x, job, row):
    """Return the weight of a row's target, where that is all that is soft."""
    if job.has_more == 0 or job.id_weights == 0:
        return 1.0
    target = _int64s(job.targets, x)[row]
    if not 0 <= target < job.n_classes:
        return 0.0
    return np.float64(_get(_reals_like(job.id_weights, x), target))


@njit(**_INNER)
def _scale_of(x, job, row):
    """Return what multiplies a row's gradient."""
    return _float64s(job.scale, x)[row * job.scale_step] * _id_weight(x, job, row)


@njit(**_INNER)
def _scale_lanes(x, job, row, count, saved):
    """Return the same of count rows; ``saved`` is room for them."""
    if job.scale_step == 0 and job.has_more == 0:
        return _splat_double(x, _float64s(job.scale, x)[0])
    for r in range(_lanes(x)):
        saved[r] = _scale_of(x, job, row + min(r, count - 1))
    return _doubles_at(x, saved, 0)


@njit(**_INNER)
def _target_weights(x, job, row, count, soft, step, saved):
    """Return the weights of the targets of count rows; those of classes are ``step`` apart."""
    if soft is not None:
        for r in range(_lanes(x)):
            target = _target(x, job, row + min(r, count - 1))
            saved[r] = _weight_of(soft, target * step) if 0 <= target < job.n_classes else 0.0
    return _doubles_at(x, saved, 0)


# ---- Reading rows ----


@njit(**_INNER)
def _range(x, n):
    """Return the largest and the smallest of n classes in each lane, passing over NaN."""
    lanes = _lanes(x)
    top, low = _splat(x, -np.inf), _splat(x, np.inf)
    whole = n - n % lanes
    strips = whole - whole % (8 * lanes)
    for i in range(0, strips, 8 * lanes):
        top, low = _extremes8(x, i, top, low)
    for i in range(strips, whole, lanes):
        top, low = _extremes1(x, i, top, low)
    if whole < n:
        top, low = _extremes_end(x, whole, n - whole, top, low)
    return top, low


@njit(**_INNER)
def _sum_terms(x, n, ref, m, e, tame=False):
    """Return sums, carries and ties of n classes in each lane; store the terms in e if it is given."""
    lanes = _lanes(x)
    total, carry = _splat_double(x, 0.0), _splat_double(x, 0.0)
    # all, less those below m: the mask is then that of the terms, and none is negated
    ties = _splat(x, 0.0 if m is None else np.float64((n + lanes - 1) // lanes))
    end, part = n - n % lanes, _splat(x, 0.0)
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
    if tame:
        for i in range(0, end, 4 * lanes):
            part, ties = _terms4_tame(x, i, ref, m, e, ties)
            total, carry = _add(total, carry, part)
        return total, carry, ties
    for i in range(0, end, 4 * lanes):
        part, ties = _terms4(x, i, ref, m, e, ties)
        total, carry = _add(total, carry, part)
    return total, carry, ties


@njit(**_INNER)
def _add_classes(x, n, what, sums):
    """Return sums with what n classes add to each lane; see `_summed`."""
    lanes = _lanes(x)
    end = n - n % lanes
    if end < n:
        sums = _add_end(x, end, n - end, what, sums)
    while end % (4 * lanes) != 0:
        end -= lanes
        sums = _add1(x, end, what, sums)
    if end & (4 * lanes):
        end -= 4 * lanes
        sums = _add4(x, end, what, sums)
    for i in range(0, end, 8 * lanes):
        sums = _add8(x, i, what, sums)
    return sums


@njit(**_INNER)
def _sum_shares(x, n, soft, m, top):
    zero = _splat_double(x, 0.0)
    sums = _ShareSums(zero, zero, zero, zero, zero, zero, _splat(x, 0.0))
    if soft is not None:
        sums = _add_classes(x, n, _Shares(soft, _finite_or_zero(m), top), sums)
    return sums


@njit(**_INNER)
def _sum_spread(x, n, e, m):
    zero = _splat_double(x, 0.0)
    return _add_classes(x, n, _Spread(e, _finite_or_zero(m)), _Sum(zero, zero))


@njit(**_INNER)
def _sum_squares(x, n, e):
    zero = _splat_double(x, 0.0)
    return _add_classes(x, n, _Squares(e), _Sum(zero, zero))


@njit(**_INNER)
def _drop(ref, m):
    """Return a, b and c with exp(ref - m) = a * b * (1 + c); a and b are normal if it matters."""
    if ref == m:
        return 1.0, 1.0, 0.0
    d, error = _two_sum_of(ref, -m)
    if d < -700.0:
        half = math.exp(0.5 * d)
        return half, half, error if error == error else 0.0  # d may be -inf
    return math.exp(d), 1.0, error


@njit(**_INNER)
def _scale_sum(total, carry, a, b):
    """Return (total, carry) times exp(a - b)."""
    drop, again, error = _drop(a, b)
    return total * drop * again * (1.0 + error), carry * drop * again


@njit(**_INNER)
def _scale_squares(total, carry, a, b):
    total, carry = _scale_sum(total, carry, a, b)
    return _scale_sum(total, carry, a, b)


@njit(**_INNER)
def _add_to(state, i, total, carry):
    """Add a sum and its carry to those that stand at i and after it."""
    state[i], error = _two_sum_of(state[i], total)
    state[i + 1] += error + carry


@njit(**_INNER)
def _raise_maximum(state, top, unit, soft, stats):
    """Let the maximum so far rise to ``top``."""
    m, ref = state[_M], state[_REF]
    if m > -np.inf:
        # what was the maximum becomes a term like any other
        former, former_carry = _scale_sum(state[_TIES] / unit, 0.0, m, ref)
        _add_to(state, _TOTAL, former, former_carry)
        if soft is not None:
            if state[_MASS] > 0.0:
                mass = state[_MASS] + state[_MASS_CARRY]
                _add_to(state, _LINEAR, mass * _rise(soft, top, m), 0.0)
        if stats is not None:
            _add_to(state, _SPREAD, (state[_TOTAL] + state[_CARRY]) * (top - m), 0.0)
        if not top - ref <= _MAX_LEAD:
            state[_TOTAL], state[_CARRY] = _scale_sum(state[_TOTAL], state[_CARRY], ref, top)
            if stats is not None:
                total, carry = state[_SPREAD], state[_SPREAD_CARRY]
                state[_SPREAD], state[_SPREAD_CARRY] = _scale_sum(total, carry, ref, top)
                total, carry = state[_SQUARES], state[_SQUARES_CARRY]
                state[_SQUARES], state[_SQUARES_CARRY] = _scale_squares(total, carry, ref, top)
            state[_REF] = top
    else:
        state[_REF] = top
    if soft is not None:
        state[_BELOW], state[_BELOW_CARRY] = state[_MASS], state[_MASS_CARRY]
    state[_M] = top
    state[_TIES] = 0.0


@njit(**_INNER)
def _add_lanes(state, i, total, carry):
    total, carry = _sum_of_terms(total, carry)
    _add_to(state, i, total, carry)


@njit(**_INNER)
def _read_shares(x, n, state, top, soft):
    """Add the shares of n classes, of which ``top`` is the maximum, to a row's state."""
    m = _splat(x, state[_M])
    if top < state[_M]:
        sums = _sum_shares(x, n, soft, m, None)
        mass, carry = _sum_of_terms(sums.mass, sums.mass_carry)
        _add_to(state, _BELOW, mass, carry)
    else:
        sums = _sum_shares(x, n, soft, m, m)
        mass, carry = _sum_of_terms(sums.mass, sums.mass_carry)
        _add_lanes(state, _BELOW, sums.below, sums.below_carry)
    _add_to(state, _MASS, mass, carry)
    _add_lanes(state, _LINEAR, sums.linear, sums.linear_carry)
    state[_LEAST] = min(state[_LEAST], _least_lane(sums.least))


@njit(**_INNER)
def _read_block(x, n, state, e, soft, first, target, target_logit, stats):
    """Add n classes to a row's state; return what the terms stored in e are relative to, and the least.

    Statistics, for which e is needed, are those of ``stats``, the job; the block's first class is
    ``first``.
    """
    tops, lows = _range(x, n)
    top, low = _largest_lane(tops), _least_lane(lows)
    if top > state[_M]:
        _raise_maximum(state, top, _sum_unit(x), soft, stats)
        if stats is not None:
            if stats.argmax != 0:
                state[_TOP] = first + _first_equal(x, n, top)
    if soft is not None:
        _read_shares(x, n, state, top, soft)
    m, ref = state[_M], state[_REF]
    tame = _is_tame(x, top, low, ref)
    if top < m:  # so in most blocks of a long row
        totals, carries, ties = _sum_terms(x, n, _splat(x, ref), None, e, tame)
    else:
        totals, carries, ties = _sum_terms(x, n, _splat(x, ref), _splat(x, m), e, tame)
    _add_lanes(state, _TOTAL, totals, carries)
    state[_TIES] += _count_lanes(ties)
    if stats is not None:
        place = target - first
        if stats.rank != 0:
            state[_AHEAD] += _count_before(x, n, place, target_logit)
        if stats.entropy != 0:
            sums = _sum_spread(x, n, e, _splat(x, m))
            _add_lanes(state, _SPREAD, sums.total, sums.carry)
        if stats.brier != 0:
            if 0 <= place < n:
                _set(e, place, 0.0)
            sums = _sum_squares(x, n, e)
            _add_lanes(state, _SQUARES, sums.total, sums.carry)
    # a block of -inf: its terms are 0, whatever the factor
    return (ref if m > -np.inf else -np.inf), low


@njit(**_INNER)
def _first_equal(x, n, value):
    """Return the first of n classes with this logit."""
    lanes = _lanes(x)
    whole, wanted = n - n % lanes, _splat(x, value)
    for i in range(0, whole, lanes):
        found = _equal_lanes(x, i, wanted)
        if found != 0:
            return i + _lowest_bit(found)
    return whole + _lowest_bit(_equal_lanes_end(x, whole, n - whole, wanted))


@njit(**_INNER)
def _count(x, n, pivot, tied):
    """How many of n classes are larger than the pivot or, if ``tied``, equal to it."""
    lanes = _lanes(x)
    whole = n - n % lanes
    strips = whole - whole % 64
    count, p = 0, _splat(x, pivot)
    if tied:
        for i in range(0, strips, 64):
            count += _count_tied(x, i, p)
        for i in range(strips, whole, lanes):
            count += _count_one_tied(x, i, p)
        return count + _count_end_tied(x, whole, n - whole, p)
    for i in range(0, strips, 64):
        count += _count_ahead(x, i, p)
    for i in range(strips, whole, lanes):
        count += _count_one_ahead(x, i, p)
    return count + _count_end_ahead(x, whole, n - whole, p)


@njit(**_INNER)
def _count_before(x, n, target, pivot):
    """How many of n classes come before the target, which is one of them, or before or after them."""
    before = min(max(target, 0), n)
    return _count(x, before, pivot, True) + _count(_at(x, before), n - before, pivot, False)


@njit(**_INNER)
def _clear(state):
    state[_M] = -np.inf
    for i in range(_REF, _STATE):
        state[i] = 0.0


@njit(**_INNER)
def _finish_row(x, state, target, target_logit, parts, r, soft, stats):
    """Make a row's state final, and note its parts; return whether it is finite."""
    m, ref, unit = state[_M], state[_REF], _sum_unit(x)
    total, carry = state[_TOTAL], state[_CARRY]
    if ref != m and m > -np.inf:
        total, carry = _scale_sum(total, carry, ref, m)
    rest = (total + carry) * unit + (state[_TIES] - 1.0)
    if stats is not None:
        parts[_M_PART + r] = m if rest == rest else np.nan
        parts[_TOP_PART + r], parts[_AHEAD_PART + r] = state[_TOP], state[_AHEAD]
        total, carry = _scale_sum(state[_SPREAD], state[_SPREAD_CARRY], ref, m)
        parts[_SPREAD_PART + r] = (total + carry) * unit
        total, carry = _scale_squares(state[_SQUARES], state[_SQUARES_CARRY], ref, m)
        parts[_SQUARES_PART + r] = (total + carry) * _square_unit(x)
    gap, error, rest = _parts_of_loss(x, m, target_logit, rest)
    parts[_GAP + r], parts[_GAP_ERROR + r], parts[_REST + r] = gap, error, rest
    parts[_LOGIT_PART + r] = target_logit
    if soft is not None:
        linear = _closed(state[_LINEAR], state[_LINEAR_CARRY])
        mass = _closed(state[_MASS], state[_MASS_CARRY])
        below = _closed(state[_BELOW], state[_BELOW_CARRY])
        w = _weight_of(soft, target)
        linear, mass, others = _mass_of(soft, gap, linear, mass, below, w)
        parts[_LINEAR_PART + r], parts[_MASS_PART + r] = linear, mass
        parts[_OTHERS_PART + r], parts[_WEIGHT_PART + r] = others, w
        parts[_BAD_PART + r] = 1.0 if state[_LEAST] < 0.0 or mass != mass else 0.0
    return gap == gap


@njit(**_INNER)
def _own_at(x, soft, parts, r, scale):
    """Return what a row's gradient needs."""
    gap, error, w = parts[_GAP + r], parts[_GAP_ERROR + r], parts[_WEIGHT_PART + r]
    e, rest = math.exp(-gap) * (1.0 - error), parts[_REST + r]
    return _own_parts(x, soft, scale, gap, e, rest, parts[_MASS_PART + r], parts[_OTHERS_PART + r], w)


@njit(**_INNER)
def _tile_sum(losses, first, n):
    """Return the compensated sum of n losses."""
    lanes = _lanes(losses)
    total, carry = _splat_double(losses, 0.0), _splat_double(losses, 0.0)
    whole = n - n % (4 * lanes)
    for i in range(0, whole, 4 * lanes):
        total, carry = _add4_exactly(losses, first + i, total, carry)
    for i in range(whole, n, lanes):
        part = _as_doubles(_load_where(losses, _first_lanes(losses, n - i), first + i))
        total, carry = _add_exactly(total, carry, part)
    s, c = _sum_lanes(total, carry)
    return s + c if s < np.inf else s  # inf has no rounding error to add; NaN stays


@njit(**_INNER)
def _sum_tiles(x, job, first, last):
    """Sum the losses of the tiles from row ``first`` to ``last``."""
    if job.losses == 0:
        return
    losses, sums = _reals_like(job.losses, x), _float64s(job.tile_sums, x)
    for start in range(first, last, job.tile_rows):
        n = min(job.tile_rows, last - start)
        sums[start // job.tile_rows] = _tile_sum(losses, start, n)


# ---- Writing gradients, and softmaxes ----


@njit(**_INNER)
def _write_classes(e, n, how, g, stream):
    """Write to g what becomes of n exponentials, or logits, in e; see `_written`."""
    lanes = _lanes(e)
    i = 0
    if stream:
        i = min(n, _to_next_line(g))  # stores past the caches must be aligned
        for j in range(0, i, lanes):
            _write_some(e, j, i - j, how, g)
        while i + 4 * lanes <= n:
            _write4_past_caches(e, i, how, g)
            i += 4 * lanes
    while i + 4 * lanes <= n:
        _write4(e, i, how, g)
        i += 4 * lanes
    while i + lanes <= n:
        _write1(e, i, how, g)
        i += lanes
    if i < n:
        _write_some(e, i, n - i, how, g)


@njit(**_INNER)
def _write_block(e, n, drop, again, error, rest, scale, g, stream, soft, own, mass, start):
    """Write the gradient of n classes from ``start`` on: their exponentials in e times drop * again."""
    factor = _row_factor(e, _times_mass(scale, mass), rest, drop, again, error)
    here = _soft_with(soft, _at(_probs_of(soft), start), start)
    _write_classes(e, n, _how(factor, _own_in_block(own, drop, again), here), g, stream)


@njit(**_INNER)
def _write_plain(x, step, n, m, rest, scale, g, g_step, soft, w_step, own, mass):
    """Write the same from logits ``step`` apart, in doubles: for scales so large that they are rare.

    Probabilities are as far apart as gradients.
    """
    unit = scale / (1.0 + rest)
    for j in range(n):
        d, r = _two_sum_of(np.float64(_get(x, j * step)), -m)
        e = math.exp(d)
        if r == r:
            e += e * r
        if soft is None:
            _set(g, j * g_step, e * unit)
        else:
            p = mass * (e * unit) - scale * _share(soft, j * g_step, j * w_step)
            is_top = rest < _MOST_REST and e > _LEAST_TOP
            _set(g, j * g_step, np.float64(own.own) if is_top else p)


@njit(**_INNER)
def _write_log(x, n, m, gap, rest, g, stream):
    _write_classes(x, n, _log_parts(x, m, gap, rest), g, stream)


@njit(**_INNER)
def _fill(g, n, value):
    for j in range(n):
        _set(g, j, value)


@njit(**_INNER)
def _is_large(scale):
    return not abs(scale) < _MAX_SCALE


@njit(**_INNER)
def _set_target(g, target, gap, e, rest, scale, soft, own):
    """Write the gradient of a class id, if there is one: g is class 0."""
    if target >= 0:
        if soft is None:
            if _is_large(scale):
                e = math.exp(-gap)
            _set(g, target, _target_gradient(gap, e, rest, scale))
        else:
            _set(g, target, np.float64(own.target))


# ---- Rows that are finished together, one in each lane ----


@njit(**_INNER)
def _store_lanes(x, job, row, count, kept, gap, error, rest, linear, mass, found, saved, few):
    """Store losses and statistics of count rows, of few classes unless that is None."""
    if job.losses == 0:
        return
    if mass is None:
        loss = _loss(x, gap, error, rest, few)
    else:
        loss = _soft_loss(x, gap, rest, linear, mass)
    if job.has_more != 0 and (job.row_weights != 0 or job.id_weights != 0):
        weights = _float64s(job.row_weights, x)
        for r in range(_lanes(x)):
            i = row + min(r, count - 1)
            saved[r] = _id_weight(x, job, i)
            if job.row_weights != 0:
                saved[r] *= weights[i * job.weight_step]
        loss = _weighed(loss, _doubles_at(x, saved, 0))
    _store_where(_reals_like(job.losses, x), _first_lanes(x, count), row, _keep(loss, kept))
    if found is not None:
        _store_found(x, job, row, count, kept, gap, rest, found)


@njit(**_INNER)
def _store_found(x, job, row, count, kept, gap, rest, found):
    """Store the statistics that are wanted."""
    if job.lse != 0:
        _store_number(_reals_like(job.lse, x), row, count, kept, _lse(x, found.m, gap, rest))
    if job.target_logit != 0:
        _store_number(_reals_like(job.target_logit, x), row, count, kept, found.target_logit)
    if job.max_logit != 0:
        _store_number(_reals_like(job.max_logit, x), row, count, kept, found.m)
    if job.argmax != 0:
        _store_id(x, _int64s(job.argmax, x), row, count, kept, gap, found.top)
    if job.rank != 0:
        _store_id(x, _int64s(job.rank, x), row, count, kept, gap, found.ahead)
    if job.entropy != 0:
        value = _entropy(x, gap, rest, found.spread)
        _store_number(_reals_like(job.entropy, x), row, count, kept, value)
    if job.max_prob != 0:
        _store_number(_reals_like(job.max_prob, x), row, count, kept, _max_prob(x, gap, rest))
    if job.brier != 0:
        value = _brier(x, gap, rest, found.squares)
        _store_number(_reals_like(job.brier, x), row, count, kept, value)


@njit(**_INNER)
def _store_rows(x, job, parts, row, count, soft, stats):
    """Store losses and statistics of rows from their parts."""
    lanes = _lanes(x)
    for r in range(0, count, lanes):
        some = min(lanes, count - r)
        kept, _, _ = _lanes_kept(x, job, row + r, some)
        gap, error = _doubles_at(x, parts, _GAP + r), _doubles_at(x, parts, _GAP_ERROR + r)
        rest = _doubles_at(x, parts, _REST + r)
        linear = _if_given(soft, _doubles_at(x, parts, _LINEAR_PART + r))
        mass = _if_given(soft, _doubles_at(x, parts, _MASS_PART + r))
        m, logit = _doubles_at(x, parts, _M_PART + r), _doubles_at(x, parts, _LOGIT_PART + r)
        tops, ahead = _doubles_at(x, parts, _TOP_PART + r), _doubles_at(x, parts, _AHEAD_PART + r)
        spread, squares = (
            _doubles_at(x, parts, _SPREAD_PART + r),
            _doubles_at(x, parts, _SQUARES_PART + r),
        )
        found = _found(stats, m, logit, tops, ahead, spread, squares)
        saved = _at(parts, _SPARE)
        _store_lanes(x, job, row + r, some, kept, gap, error, rest, linear, mass, found, saved, None)


# ---- Kernels for rows of one block: lanes are classes, then rows ----

_GROUP = 16
# What is noted of each row of a group, _GROUP numbers each: addresses of its logits, exponentials,
# gradient and probabilities; maximum, target's logit and term; sum, carry and ties; shares, or
# statistics; the weight of the target; its gradient's factor.
_X_AT, _E_AT, _G_AT, _T_AT, _MAXIMUM, _LOGIT, _TERM, _SUM, _ERROR, _TIED = range(0, 160, _GROUP)
_LINEAR_OF, _MASS_OF, _OTHERS_OF, _LEAST_OF, _WEIGHT_OF = range(160, 240, _GROUP)
_TOP_OF, _AHEAD_OF, _SPREAD_OF, _SQUARES_OF = range(160, 224, _GROUP)
_TAME = 240  # whether a row is
_FACTOR = 256  # reals: hi, lo, down, least, and `_Own`, of which plain targets have the last
_SLOTS = _FACTOR + 10 * _GROUP
_NOTED = 6 * _GROUP  # reals that `_note_factors` leaves of a group
_FETCHED_WORK = _FETCHED_BYTES // 8 + _PITCH + _FETCHED // 8 * _NOTED


@njit(**_INNER)
def _read_rows(x, n, job, row, count, slots, places, with_grad, soft, stats):
    """Read count rows of n classes: the maxima of some, then their sums while they are in L1."""
    step = max(1, _L1_CLASSES // n)
    for start in range(0, count, step):
        stop = min(start + step, count)
        for r in range(start, stop):
            slots[_MAXIMUM + r] = slots[_SUM + r] = slots[_ERROR + r] = 0.0
            slots[_TIED + r] = 1.0
            if 0 <= _target(x, job, row + r) < n:
                at = _pointer_like(places[_X_AT + r], x)
                tops, lows = _range(at, n)
                top = _largest_lane(tops)
                slots[_MAXIMUM + r] = top
                slots[_TAME + r] = 1.0 if _is_tame(x, top, _least_lane(lows), top) else 0.0
        for r in range(start, stop):
            target = _target(x, job, row + r)
            if 0 <= target < n:
                at, m = _pointer_like(places[_X_AT + r], x), slots[_MAXIMUM + r]
                ref = _splat(x, m if m > -np.inf else 0.0)
                if soft is not None:
                    here = _soft_with(soft, _pointer_like(places[_T_AT + r], x), 0)
                    _read_row_shares(at, n, m, r, slots, here, with_grad)
                e = _if_either(with_grad, stats, _reals_like(places[_E_AT + r], x))
                tame = slots[_TAME + r] != 0.0
                totals, carries, ties = _sum_terms(at, n, ref, _splat(x, m), e, tame)
                slots[_SUM + r], slots[_ERROR + r] = _sum_of_terms(totals, carries)
                slots[_TIED + r] = _count_lanes(ties)
                if stats is not None:
                    _read_row_stats(at, n, m, r, slots, e, target, slots[_LOGIT + r], job)


@njit(**_INNER)
def _read_row_shares(x, n, m, r, slots, soft, with_grad):
    maximum = _splat(x, m)
    sums = _sum_shares(x, n, soft, maximum, _if_given(with_grad, maximum))
    total, carry = _sum_of_terms(sums.linear, sums.linear_carry)
    slots[_LINEAR_OF + r] = _closed(total, carry)
    total, carry = _sum_of_terms(sums.mass, sums.mass_carry)
    slots[_MASS_OF + r] = _closed(total, carry)
    if with_grad is not None:
        total, carry = _sum_of_terms(sums.below, sums.below_carry)
        slots[_OTHERS_OF + r] = _closed(total, carry)
    slots[_LEAST_OF + r] = _least_lane(sums.least)


@njit(**_INNER)
def _read_row_stats(x, n, m, r, slots, e, target, target_logit, job):
    if job.argmax != 0:
        slots[_TOP_OF + r] = _first_equal(x, n, m)
    if job.rank != 0:
        slots[_AHEAD_OF + r] = _count_before(x, n, target, target_logit)
    if job.entropy != 0:
        sums = _sum_spread(x, n, e, _splat(x, m))
        total, carry = _sum_of_terms(sums.total, sums.carry)
        slots[_SPREAD_OF + r] = (total + carry) * _sum_unit(x)
    if job.brier != 0:
        _set(e, target, 0.0)
        sums = _sum_squares(x, n, e)
        total, carry = _sum_of_terms(sums.total, sums.carry)
        slots[_SQUARES_OF + r] = (total + carry) * _square_unit(x)


@njit(**_INNER)
def _finish_rows(x, job, row, count, slots, soft, stats):
    """Store the losses of a group, and what is wanted with them; note gap and rest for a gradient."""
    kept, _, counted = _lanes_kept(x, job, row, count)
    m, logit = _doubles_at(x, slots, _MAXIMUM), _doubles_at(x, slots, _LOGIT)
    total, carry = _doubles_at(x, slots, _SUM), _doubles_at(x, slots, _ERROR)
    rest = _total_of(total, carry, _reals_at(x, slots, _TIED))
    tops, ahead = _doubles_at(x, slots, _TOP_OF), _doubles_at(x, slots, _AHEAD_OF)
    spread, squares = _doubles_at(x, slots, _SPREAD_OF), _doubles_at(x, slots, _SQUARES_OF)
    found = _found(stats, _nan_with(m, rest), logit, tops, ahead, spread, squares)
    gap, error, rest = _parts_of_loss(x, m, logit, rest)
    linear, mass = _doubles_at(x, slots, _LINEAR_OF), _doubles_at(x, slots, _MASS_OF)
    w = _target_weights(x, job, row, count, soft, 1, _at(slots, _WEIGHT_OF))
    below = _doubles_at(x, slots, _OTHERS_OF)
    linear, mass, others = _mass_of(soft, gap, linear, mass, below, w)
    counted = _by_targets(soft, _count_bad(kept, _doubles_at(x, slots, _LEAST_OF), mass), counted)
    if soft is not None:
        _store(slots, _MASS_OF, mass)
        _store(slots, _OTHERS_OF, others)
    saved = _at(slots, _SUM)
    _store_lanes(x, job, row, count, kept, gap, error, rest, linear, mass, found, saved, None)
    _store(slots, _SUM, gap)
    _store(slots, _ERROR, rest)
    return counted


@njit(**_INNER)
def _factor_rows(x, job, row, count, slots, places, soft):
    """Note the factors of count rows' gradients."""
    for r in range(count):
        slots[_TERM + r], target = 0.0, _target(x, job, row + r)
        if 0 <= target < job.n_classes:
            slots[_TERM + r] = np.float64(_get(_reals_like(places[_E_AT + r], x), target))
    gap, rest = _doubles_at(x, slots, _SUM), _doubles_at(x, slots, _ERROR)
    e = _term_of(x, _reals_at(x, slots, _TERM))
    scale = _scale_lanes(x, job, row, count, _at(slots, _TERM))
    factors = _reals_like(_address_in(slots, _FACTOR), x)
    if soft is None:
        factor = _lane_factors(x, gap, rest, scale)
        _store(factors, 9 * _GROUP, _target_lanes(x, None, gap, e, rest, scale))
    else:
        w, mass = _doubles_at(x, slots, _WEIGHT_OF), _doubles_at(x, slots, _MASS_OF)
        own = _own_parts(x, soft, scale, gap, e, rest, mass, _doubles_at(x, slots, _OTHERS_OF), w)
        factor = _lane_factors(x, gap, rest, _times(scale, mass))
        _store(factors, 4 * _GROUP, own.alpha)
        _store(factors, 5 * _GROUP, own.beta)
        _store(factors, 6 * _GROUP, own.least_t)
        _store(factors, 7 * _GROUP, own.top)
        _store(factors, 8 * _GROUP, own.own)
        _store(factors, 9 * _GROUP, own.target)
    _store(factors, 0, factor.hi)
    _store(factors, _GROUP, factor.lo)
    _store(factors, 2 * _GROUP, factor.down)
    _store(factors, 3 * _GROUP, factor.least)


@njit(**_INNER)
def _write_rows(x, step, g, n, job, row, count, slots, places, soft):
    """Write the gradients of count rows, from their exponentials; logits are ``step`` apart.

    The logarithm of a softmax is written from logits in g's dtype, as neighbours.
    """
    factors = _reals_like(_address_in(slots, _FACTOR), x)
    for r in range(count):
        out, target = _pointer_like(places[_G_AT + r], g), _target(x, job, row + r)
        if not 0 <= target < n:
            _fill(out, n, 0.0)
            continue
        m, gap, rest = slots[_MAXIMUM + r], slots[_SUM + r], slots[_ERROR + r]
        if job.log != 0:
            _write_log(_pointer_like(places[_X_AT + r], g), n, m, gap, rest, out, False)
            continue
        written = _target_to_write(job, target, soft)
        scale = _scale_of(x, job, row + r)
        here = _soft_with(soft, _pointer_like(places[_T_AT + r], g), 0)
        own = _own_in_slots(soft, _at(factors, 4 * _GROUP), r, _GROUP)
        mass = _if_given(soft, slots[_MASS_OF + r])
        if _is_large(scale) and gap == gap:
            logits = _pointer_like(places[_X_AT + r], x)
            _write_plain(logits, step, n, m, rest, scale, out, 1, here, 1, own, mass)
            _set_target(out, written, gap, 0.0, rest, scale, soft, own)
        else:
            hi, lo = _get(factors, r), _get(factors, _GROUP + r)
            down, least = _get(factors, 2 * _GROUP + r), _get(factors, 3 * _GROUP + r)
            factor = _Factor(hi, lo, down, least)
            how = _how(factor, own, here)
            _write_classes(_reals_like(places[_E_AT + r], x), n, how, out, False)
            if written >= 0:
                _set(out, written, _get(factors, 9 * _GROUP + r))


@njit(**_INNER)
def _has_large(x, job, row, count):
    """Whether some of count rows have a scale of which products of kept exponentials could be lost."""
    if job.scale_step == 0 and job.has_more == 0:
        return _is_large(_float64s(job.scale, x)[0])
    for r in range(row, row + count):
        if 0 <= _target(x, job, r) < job.n_classes and _is_large(_scale_of(x, job, r)):
            return True
    return False


@njit(**_INNER)
def _note_factors(x, pitch, job, row, count, slots, noted):
    """Note what turns the exponentials of count rows into gradients when they are delivered."""
    factors = _reals_like(_address_in(slots, _FACTOR), x)
    kept, ids, _ = _lanes_kept(x, job, row, count)
    for k in range(4):
        _store(noted, k * _GROUP, _vector_at(factors, k * _GROUP))
    _store(noted, 4 * _GROUP, _vector_at(factors, 9 * _GROUP))
    _store(noted, 5 * _GROUP, _ids_of(x, ids, kept))
    for r in range(count):
        if not 0 <= _target(x, job, row + r) < job.n_classes:
            _fill(_at(x, r * pitch), job.n_classes, 0.0)
            _set(noted, r, 0.0)


@njit(**_INNER)
def _middle_rows(x_type, job, item, worker, with_grad, soft, stats):
    """Rows of unit stride."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, n = _pointer_like(job.x, x_type), job.n_classes
    scratch = job.scratch + 8 * worker * job.scratch_size
    slots, places = _float64s(scratch, x), _int64s(scratch, x)
    outer, inner = divmod(job.first_row + first, job.inner)
    counted = 0
    for row in range(first, last, _lanes(x)):
        count = min(_lanes(x), last - row)
        for r in range(count):
            at = job.x + _size(x, outer * job.x_outer + inner * job.x_inner)
            places[_X_AT + r] = at
            target = _target(x, job, row + r)
            slots[_LOGIT + r] = 0.0
            if 0 <= target < n:
                slots[_LOGIT + r] = np.float64(_get(_pointer_like(at, x), target))
            places[_E_AT + r] = scratch + 8 * (_SLOTS + r * _PITCH)
            if soft is not None:
                places[_T_AT + r] = job.probs + _size(x, outer * job.p_outer + inner * job.p_inner)
            if with_grad is not None:
                g_at = job.grad + _size(x, outer * job.g_outer + inner * job.g_inner)
                places[_G_AT + r] = g_at
                # the gradient's memory, unless it is of another dtype, or the logits are needed again
                if not (_is_half(x) or job.log != 0 or _is_large(_scale_of(x, job, row + r))):
                    places[_E_AT + r] = g_at
            inner += 1
            if inner == job.inner:
                outer, inner = outer + 1, 0
        _read_rows(x, n, job, row, count, slots, places, with_grad, soft, stats)
        counted += _finish_rows(x, job, row, count, slots, soft, stats)
        if with_grad is not None:
            _factor_rows(x, job, row, count, slots, places, soft)
            _write_rows(x, 1, x, n, job, row, count, slots, places, soft)
    _sum_tiles(x, job, first, last)
    return counted


@njit(**_INNER)
def _middle_strided_rows(x_type, job, item, worker, with_grad, soft, stats):
    """Rows of any stride, which are transposed into scratch, and their gradients back."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    n, row, counted = job.n_classes, first, 0
    scratch = job.scratch + 8 * worker * job.scratch_size
    slots, places = _float64s(scratch, x_type), _int64s(scratch, x_type)
    block = _reals_like(scratch + 8 * _SLOTS, x_type)
    lanes = _lanes(x_type)
    noted = _reals_like(scratch + 8 * (_SLOTS + _FETCHED_BYTES // 8 + _PITCH), x_type)
    pitch = ((n + lanes - 1) // lanes | 1) * lanes  # an odd number of lines, for L1's sake
    size = _FETCHED_BYTES // _size(block, pitch) // _by_targets(soft, 2, 1)
    most = max(lanes, min(_FETCHED, size // lanes * lanes))
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        fetched = min(most, last - row, job.inner - inner)
        at = job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner)
        g_at = job.grad + _size(x_type, outer * job.g_outer + inner * job.g_inner)
        g = _pointer_like(g_at, x_type)
        if job.stream != 0:
            head = _aligned_rows(g, job.g_inner, job.g_class)
            fetched = min(fetched, head) if head > 0 else fetched
        _fetch(_pointer_like(at, x_type), job.x_inner, job.x_class, fetched, n, block, pitch)
        if soft is not None:
            t = _at(_probs_of(soft), outer * job.p_outer + inner * job.p_inner)
            _fetch_probs(t, job, fetched, n, _at(block, most * pitch), pitch)
        later = False  # whether gradients are computed when they are delivered
        if with_grad is not None and soft is None:
            later = job.log == 0 and job.g_inner == 1 and not _has_large(x_type, job, row, fetched)
        for start in range(0, fetched, lanes):
            count = min(lanes, fetched - start)
            for r in range(count):
                here = scratch + 8 * _SLOTS + _size(block, (start + r) * pitch)
                places[_X_AT + r] = places[_E_AT + r] = places[_G_AT + r] = here
                places[_T_AT + r] = here + _size(block, most * pitch)
                if job.log != 0 or stats is not None:  # which need the logits again
                    places[_E_AT + r] = scratch + 8 * (_SLOTS + _FETCHED_BYTES // 8)
                slots[_LOGIT + r], target = 0.0, _target(x_type, job, row + start + r)
                if 0 <= target < n:
                    slots[_LOGIT + r] = np.float64(_get(block, (start + r) * pitch + target))
            _read_rows(block, n, job, row + start, count, slots, places, with_grad, soft, stats)
            counted += _finish_rows(block, job, row + start, count, slots, soft, stats)
            if with_grad is not None:
                _factor_rows(block, job, row + start, count, slots, places, soft)
                if later:
                    here, of_group = _at(block, start * pitch), _at(noted, start // lanes * _NOTED)
                    _note_factors(here, pitch, job, row + start, count, slots, of_group)
                else:
                    if job.log == 0:
                        for r in range(count):  # where a large scale needs the logits again
                            places[_X_AT + r] = at + _size(x_type, (start + r) * job.x_inner)
                    x = _pointer_like(at, x_type)
                    _write_rows(x, job.x_class, block, n, job, row + start, count, slots, places, soft)
        if with_grad is not None:
            if later:
                _deliver_squares(block, pitch, noted, g, job.g_class, fetched, n, job.stream != 0)
            else:
                _deliver(block, pitch, g, job.g_inner, job.g_class, fetched, n, job.stream != 0)
        row += fetched
    _sum_tiles(x_type, job, first, last)
    return counted


# ---- Kernels for rows of unit stride: lanes are classes ----


@njit(**_INNER)
def _read_row(x, n, state, refs, e, step, soft, first, target, target_logit, stats):
    """Read n classes of a row. Terms go to e, if given: each block's to the same place if step is 0."""
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        block, number = _at(x, start), first + start
        here, terms = _soft_with(soft, _at(_probs_of(soft), start), start), _at(e, start * step)
        ref, _ = _read_block(block, size, state, terms, here, number, target, target_logit, stats)
        refs[start // _BLOCK] = ref


@njit(**_INNER)
def _write_row(n, m, target, gap, rest, scale, refs, e, g, stream, soft, own, mass):
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
        terms, out = _at(e, start), _at(g, start)
        _write_block(terms, size, drop, again, error, rest, scale, out, stream, soft, own, mass, start)
        start = end
    _set_target(g, target, gap, target_term, rest, scale, soft, own)


@njit(**_INNER)
def _direct_rows(x_type, job, item, worker, with_grad, soft, stats):
    """Compute the rows of a tile, one after the other."""
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, grad, n = _pointer_like(job.x, x_type), _pointer_like(job.grad, x_type), job.n_classes
    state = _float64s(job.scratch + 8 * worker * job.scratch_size, x)
    parts, refs = _at(state, _PARTS), _at(state, _WORK)
    kept_terms = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + _PART // _BLOCK), x)
    stream = job.stream != 0
    outer, inner = divmod(job.first_row + first, job.inner)
    lanes, n_ignored, n_bad = _lanes(x), 0, 0
    for row in range(first, last):
        r = (row - first) % lanes
        at = _at(x, outer * job.x_outer + inner * job.x_inner)
        target = _target(x, job, row)
        if 0 <= target < n:
            logit = np.float64(_get(at, target))
            offset = outer * job.p_outer + inner * job.p_inner
            here = _soft_with(soft, _at(_probs_of(soft), offset), 0)
            g = _at(grad, outer * job.g_outer + inner * job.g_inner)
            again = True  # whether the logits are needed again
            if with_grad is not None:
                scale = _scale_of(x, job, row)
                again = _is_large(scale) or job.log != 0
            e = _terms_place(kept_terms, g, not stream and not again)
            e, step = _if_either(with_grad, stats, e), 0 if again else 1
            _clear(state)
            _read_row(at, n, state, refs, e, step, here, 0, target, logit, stats)
            finite = _finish_row(x, state, target, logit, parts, r, soft, stats)
            if with_grad is not None:
                m, gap, rest = state[_M], parts[_GAP + r], parts[_REST + r]
                own = _own_at(x, soft, parts, r, scale)
                mass = _if_given(soft, parts[_MASS_PART + r])
                written = _target_to_write(job, target, soft)
                if not finite:
                    _fill(g, n, np.nan)
                elif job.log != 0:
                    _write_log(at, n, m, gap, rest, g, stream)
                elif again:
                    _write_plain(at, 1, n, m, rest, scale, g, 1, here, 1, own, mass)
                    _set_target(g, written, gap, 0.0, rest, scale, soft, own)
                else:
                    _write_row(n, m, written, gap, rest, scale, refs, e, g, stream, here, own, mass)
            if soft is not None and parts[_BAD_PART + r] != 0.0:
                n_bad += 1
        else:
            n_ignored += 1
            if with_grad is not None:
                _fill(_at(grad, outer * job.g_outer + inner * job.g_inner), n, 0.0)
        if r == lanes - 1 or row == last - 1:
            _store_rows(x, job, parts, row - r, r + 1, soft, stats)
        inner += 1
        if inner == job.inner:
            outer, inner = outer + 1, 0
    _sum_tiles(x, job, first, last)
    if stream:
        _fence(x)
    return _by_targets(soft, n_bad, n_ignored)


# ---- Kernels for any strides: a group of rows is transposed into scratch block by block ----


@njit(**_INNER)
def _copy(x, x_outer, x_inner, n_outer, n_inner, out, out_outer, out_inner):
    """Copy an array of two axes, best with the shorter steps in the inner one."""
    for i in range(n_outer):
        for j in range(n_inner):
            _set(out, i * out_outer + j * out_inner, _get(x, i * x_outer + j * x_inner))


@njit(**_INNER)
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
    elif abs(class_step) < abs(row_step):
        _copy(x, row_step, class_step, count, n, out, pitch, 1)
    else:
        _copy(x, class_step, row_step, n, count, out, 1, pitch)


@njit(**_INNER)
def _fetch_probs(t, job, count, n, out, pitch):
    """Do the same with probabilities, where there are any."""
    if t is not None:
        _fetch(t, job.p_inner, job.p_class, count, n, out, pitch)


@njit(**_INNER)
def _aligned_rows(g, row_step, class_step):
    """Return how many rows come before those that fill whole lines in every class; -1 if none do."""
    if _is_half(g) or row_step != 1 or class_step % _lanes(g) != 0:
        return -1
    return _to_next_line(g)


@njit(**_INNER)
def _deliver_squares(source, pitch, noted, g, class_step, count, n, stream):
    """Copy n classes of count rows, which are neighbours in memory, the other way.

    Past the caches, if asked to and lines are whole: 0.7 to 0.75 of the time. With what `_note_factors`
    left of each vector of rows, exponentials become gradients: 0.92 of the time of that in scratch.
    """
    lanes = _lanes(g)
    # fetched ahead: the next line or, if that passes the caches by, a later class's: 0.88 of the time
    ahead = lanes * class_step if stream else lanes
    head = _aligned_rows(g, 1, class_step) if stream else -1
    for j in range(0, n, lanes):
        some, r, group = min(lanes, n - j), 0, noted
        while r < count:
            block, target = _at(source, r * pitch + j), _at(g, j * class_step + r)
            rows = min(count - r, head if r == 0 and head > 0 else lanes)
            if head >= 0 and some == lanes and rows == lanes:
                _transpose_out_past_caches(
                    block, pitch, target, class_step, ahead, some, rows, group, j
                )
            else:
                _transpose_out(block, pitch, target, class_step, ahead, some, rows, group, j)
            r, group = r + rows, _at(group, _NOTED)
    if head >= 0:
        _fence(g)


@njit(**_INNER)
def _deliver(source, pitch, g, row_step, class_step, count, n, stream):
    """Copy the other way."""
    lanes = _lanes(g)
    if class_step == 1:
        for r in range(count):
            for j in range(0, n, lanes):
                mask = _first_lanes(g, n - j)
                _store_where(g, mask, r * row_step + j, _vector_at(source, r * pitch + j))
    elif row_step == 1:
        _deliver_squares(source, pitch, None, g, class_step, count, n, stream)
    elif abs(class_step) < abs(row_step):
        _copy(source, pitch, 1, count, n, g, row_step, class_step)
    else:
        _copy(source, 1, pitch, n, count, g, class_step, row_step)


@njit(**_INNER)
def _second(x, block):
    """Return the half of a group's scratch that rows' probabilities, or terms, are in."""
    return _at(block, _most_rows(x) * _PITCH)


@njit(**_INNER)
def _read_group(x, job, row, count, n, first_class, states, parts, refs, block, t_at, soft, stats):
    """Read n classes of count rows; note what the terms of each block are relative to.

    x is the first logit of them, ``t_at`` where the first probability is.
    """
    n_blocks = (n + _BLOCK - 1) // _BLOCK
    second = _second(x, block)
    for b in range(n_blocks):
        start = b * _BLOCK
        size, first = min(_BLOCK, n - start), first_class + start
        at = _at(x, start * job.x_class)
        _fetch(at, job.x_inner, job.x_class, count, size, block, _PITCH)
        if soft is not None:
            t = _at(_probs_of(soft), t_at + start * job.p_class)
            _fetch_probs(t, job, count, size, second, _PITCH)
        for r in range(count):
            target = _target(x, job, row + r)
            if 0 <= target < job.n_classes:
                here, state = _at(block, r * _PITCH), _at(states, r * _STATE)
                shares, e = _soft_with(soft, _at(second, r * _PITCH), first), _if_given(stats, second)
                logit = parts[_LOGIT_PART + r]
                ref, _ = _read_block(here, size, state, e, shares, first, target, logit, stats)
                refs[r * n_blocks + b] = ref


@njit(**_INNER)
def _write_group(x, job, row, count, n, first_class, states, parts, refs, block, t_at, g, soft):
    """Write n classes of the gradient of count rows, from terms computed as they were when read.

    To keep them costs more than to compute them again: 64 rows of them leave the caches.
    """
    n_blocks = (n + _BLOCK - 1) // _BLOCK
    unit, second = _sum_unit(block), _second(x, block)
    for b in range(n_blocks):
        start = b * _BLOCK
        size, first = min(_BLOCK, n - start), first_class + start
        _fetch(_at(x, start * job.x_class), job.x_inner, job.x_class, count, size, block, _PITCH)
        if soft is not None:
            t = _at(_probs_of(soft), t_at + start * job.p_class)
            _fetch_probs(t, job, count, size, second, _PITCH)
        for r in range(count):
            e, target = _at(block, r * _PITCH), _target(x, job, row + r)
            if not 0 <= target < job.n_classes:
                _fill(e, size, 0.0)
                continue
            m, gap, rest = states[r * _STATE + _M], parts[_GAP + r], parts[_REST + r]
            if gap != gap:
                _fill(e, size, np.nan)
                continue
            if job.log != 0:
                _write_log(e, size, m, gap, rest, e, False)
                continue
            scale, ref = _scale_of(x, job, row + r), refs[r * n_blocks + b]
            here, own = (
                _soft_with(soft, _at(second, r * _PITCH), first),
                _own_at(x, soft, parts, r, scale),
            )
            mass = _if_given(soft, parts[_MASS_PART + r])
            target_term, place = 0.0, _target_to_write(job, target, soft) - first
            if _is_large(scale):
                logits = _at(x, start * job.x_class + r * job.x_inner)
                _write_plain(logits, job.x_class, size, m, rest, scale, e, 1, here, 1, own, mass)
            else:
                _sum_terms(e, size, _splat(e, ref if ref > -np.inf else 0.0), None, e)
                drop, again, error = _drop(ref, m)
                if 0 <= place < size:
                    target_term = np.float64(_get(e, place)) * unit * drop * again
                _write_block(e, size, drop, again, error, rest, scale, e, False, here, own, mass, 0)
            if place < size:
                _set_target(e, place, gap, target_term, rest, scale, soft, own)
        at = _at(g, start * job.g_class)
        _deliver(block, _PITCH, at, job.g_inner, job.g_class, count, size, job.stream != 0)


@njit(**_INNER)
def _start_group(x, job, row, count, states, parts):
    """Clear the states of rows and note their targets' logits; return how many are ignored."""
    ignored = 0
    for r in range(count):
        _clear(_at(states, r * _STATE))
        target = _target(x, job, row + r)
        if 0 <= target < job.n_classes:
            logit = np.float64(_get(x, r * job.x_inner + target * job.x_class))
            parts[_LOGIT_PART + r] = logit
        else:
            ignored += 1
    return ignored


@njit(**_INNER)
def _finish_group(x, job, row, count, states, parts, soft, stats):
    """Store losses and statistics of rows that have been read; return how many are not valid."""
    n_bad = 0
    for r in range(count):
        target = _target(x, job, row + r)
        if 0 <= target < job.n_classes:
            state = _at(states, r * _STATE)
            _finish_row(x, state, target, parts[_LOGIT_PART + r], parts, r, soft, stats)
            if soft is not None and parts[_BAD_PART + r] != 0.0:
                n_bad += 1
    _store_rows(x, job, parts, row, count, soft, stats)
    return n_bad


@njit(**_INNER)
def _strided_rows(x_type, job, item, worker, with_grad, soft, stats):
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, grad, n = _pointer_like(job.x, x_type), _pointer_like(job.grad, x_type), job.n_classes
    states = _float64s(job.scratch + 8 * worker * job.scratch_size, x)
    parts, refs = _at(states, _PARTS), _at(states, _WORK)
    n_refs = _TALL * ((n + _BLOCK - 1) // _BLOCK)
    block = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + n_refs), x)
    n_ignored, n_bad, row = 0, 0, first
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = _rows_of(x_type, job, row, last, soft)
        at = _at(x, outer * job.x_outer + inner * job.x_inner)
        t_at = outer * job.p_outer + inner * job.p_inner
        n_ignored += _start_group(at, job, row, count, states, parts)
        _read_group(at, job, row, count, n, 0, states, parts, refs, block, t_at, soft, stats)
        n_bad += _finish_group(at, job, row, count, states, parts, soft, stats)
        if with_grad is not None:
            g = _at(grad, outer * job.g_outer + inner * job.g_inner)
            _write_group(at, job, row, count, n, 0, states, parts, refs, block, t_at, g, soft)
        row += count
    _sum_tiles(x, job, first, last)
    return _by_targets(soft, n_bad, n_ignored)


# ---- Kernels for very long rows: a work item is a part of a row, so that threads share it ----


@njit(**_INNER)
def _most_rows(x):
    """How many rows are a group, at most: a block of them in 1 MiB."""
    return min(_TALL, 1024 // _size(x, 1))


@njit(**_INNER)
def _rows_of(x, job, first, last, soft):
    """How many rows from ``first`` on are a group: they are one step apart."""
    most = _most_rows(x) // _by_targets(soft, 2, 1)
    return min(most, last - first, job.inner - (job.first_row + first) % job.inner)


@njit(**_INNER)
def _groups_in(x, job, item):
    """Part of the rows, and the first row, of an item: a tile's worth of rows in one part."""
    item, part = divmod(item, job.n_parts)
    return part, item * job.item_rows, min((item + 1) * job.item_rows, job.n_rows)


@njit(**_INNER)
def _read_part(x_type, job, item, worker, soft, stats):
    part, row, last = _groups_in(x_type, job, item)
    first_class = part * _PART
    n = min(_PART, job.n_classes - first_class)
    scratch = _float64s(job.scratch + 8 * worker * job.scratch_size, x_type)
    parts, states, refs = _at(scratch, _PARTS), _float64s(job.states, x_type), _at(scratch, _WORK)
    n_refs = _TALL * (_PART // _BLOCK)
    block = _reals_like(job.scratch + 8 * (worker * job.scratch_size + _WORK + n_refs), x_type)
    direct = job.item_rows == 1
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = 1 if direct else _rows_of(x_type, job, row, last, soft)
        x = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        t_at = outer * job.p_outer + inner * job.p_inner + first_class * job.p_class
        _start_group(x, job, row, count, scratch, parts)
        at = _at(x, first_class * job.x_class)
        if direct:
            target = _target(x_type, job, row)
            if 0 <= target < job.n_classes:
                logit = parts[_LOGIT_PART]
                here, e = (
                    _soft_with(soft, _at(_probs_of(soft), t_at), first_class),
                    _if_given(stats, block),
                )
                _read_row(at, n, scratch, refs, e, 0, here, first_class, target, logit, stats)
        else:
            _read_group(
                at, job, row, count, n, first_class, scratch, parts, refs, block, t_at, soft, stats
            )
        for r in range(count):
            for i in range(_STATE):
                states[((row + r) * job.n_parts + part) * _STATE + i] = scratch[r * _STATE + i]
        row += count
    return 0


@njit(**_INNER)
def _merge(state, other, unit, soft, stats):
    """Add the state of a later part of a row."""
    if other[_M] > state[_M]:
        _raise_maximum(state, other[_M], unit, soft, stats)
        if stats is not None:
            state[_TOP] = other[_TOP]
    behind = -np.inf < other[_M] < state[_M]
    rise = state[_M] - other[_M] if behind else 0.0
    total, carry = other[_TOTAL], other[_CARRY]
    if other[_M] == state[_M]:
        state[_TIES] += other[_TIES]
    elif behind:
        former, error = _scale_sum(other[_TIES] / unit, 0.0, other[_M], other[_REF])
        total, rounded = _two_sum_of(total, former)
        carry += rounded + error
    if soft is not None:
        if behind and other[_MASS] > 0.0:
            mass = other[_MASS] + other[_MASS_CARRY]
            _add_to(state, _LINEAR, mass * _rise(soft, state[_M], other[_M]), 0.0)
        _add_to(state, _LINEAR, other[_LINEAR], other[_LINEAR_CARRY])
        _add_to(state, _MASS, other[_MASS], other[_MASS_CARRY])
        below = _BELOW if other[_M] == state[_M] else _MASS
        _add_to(state, _BELOW, other[below], other[below + 1])
        state[_LEAST] = min(state[_LEAST], other[_LEAST])
    if stats is not None:
        state[_AHEAD] += other[_AHEAD]
        _add_to(other, _SPREAD, (total + carry) * rise, 0.0)
        if other[_M] > -np.inf:
            a, b = other[_REF], state[_REF]
            spread, error = _scale_sum(other[_SPREAD], other[_SPREAD_CARRY], a, b)
            _add_to(state, _SPREAD, spread, error)
            squares, error = _scale_squares(other[_SQUARES], other[_SQUARES_CARRY], a, b)
            _add_to(state, _SQUARES, squares, error)
    if other[_M] > -np.inf:
        total, carry = _scale_sum(total, carry, other[_REF], state[_REF])
    _add_to(state, _TOTAL, total, carry)


@njit(**_INNER)
def _merge_parts(x_type, job, item, worker, soft, stats):
    """Merge the states of each row's parts, in order, into the first, and finish the rows."""
    scratch = _float64s(job.scratch + 8 * worker * job.scratch_size, x_type)
    parts, unit, n_ignored, n_bad = _at(scratch, _PARTS), _sum_unit(x_type), 0, 0
    for row in range(job.n_rows):
        outer, inner = divmod(job.first_row + row, job.inner)
        x = _pointer_like(job.x + _size(x_type, outer * job.x_outer + inner * job.x_inner), x_type)
        merged = _at(_float64s(job.states, x), row * job.n_parts * _STATE)
        for part in range(1, job.n_parts):
            _merge(merged, _at(merged, part * _STATE), unit, soft, stats)
        n_ignored += _start_group(x, job, row, 1, scratch, parts)
        for i in range(_STATE):
            scratch[i] = merged[i]
        n_bad += _finish_group(x, job, row, 1, scratch, parts, soft, stats)
        for i in range(_GRADIENT_PARTS):
            merged[_TOTAL + i] = parts[i * _TALL]
    _sum_tiles(x_type, job, 0, job.n_rows)
    return _by_targets(soft, n_bad, n_ignored)


@njit(**_INNER)
def _write_part(x_type, job, item, worker, soft):
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
        count = _rows_of(x_type, job, row, last, soft)
        x_at = outer * job.x_outer + inner * job.x_inner + first_class * job.x_class
        g_at = outer * job.g_outer + inner * job.g_inner + first_class * job.g_class
        t_at = outer * job.p_outer + inner * job.p_inner + first_class * job.p_class
        x = _pointer_like(job.x + _size(x_type, x_at), x_type)
        g = _pointer_like(job.grad + _size(x_type, g_at), x_type)
        for r in range(count):
            merged = _at(states, (row + r) * job.n_parts * _STATE)
            scratch[r * _STATE + _M] = merged[_M]
            for i in range(_GRADIENT_PARTS):
                parts[i * _TALL + r] = merged[_TOTAL + i]
            for b in range(n_blocks):
                refs[r * n_blocks + b] = merged[_M]
        _write_group(x, job, row, count, n, first_class, scratch, parts, refs, block, t_at, g, soft)
        row += count
    return 0


# ---- Kernels for narrow rows: lanes are rows ----

_LANES_WORK = _NARROW * _GROUP


@njit(**_INNER)
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
            _fetch_ahead(_at(x, c * lanes))
            _transpose_in(_at(x, c), row_step, None, count, some, _at(work, c * lanes), lanes)
    else:
        for c in range(n):
            for r in range(lanes):
                _set(work, c * lanes + r, _get(x, min(r, count - 1) * row_step + c * class_step))


@njit(**_INNER)
def _fetch_lanes_of_probs(t, job, count, n, work):
    """Do the same with probabilities, where there are any."""
    if t is not None:
        _fetch_lanes(t, job.p_inner, job.p_class, count, n, work)


@njit(**_INNER)
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
                _at(work, c * lanes), lanes, _at(g, c), row_step, lanes * row_step, count, some, None, c
            )
    else:
        for c in range(n):
            for r in range(count):
                _set(g, r * row_step + c * class_step, _get(work, c * lanes + r))


@njit(**_INNER)
def _found_lanes(x, job, row, count, n, work, e, m, rest, target_logit, target, stats):
    """Return the statistics that are wanted of rows in the lanes of logits and exponentials."""
    lanes, unit = _lanes(x), _splat_double(x, _sum_unit(x))
    tops, ahead = _splat(x, 0.0), _splat(x, 0.0)
    spread, squares = _splat_double(x, 0.0), _splat_double(x, 0.0)
    if stats is not None and job.argmax != 0:
        for c in range(n - 1, -1, -1):
            tops = _top_lanes(tops, _vector_at(work, c * lanes), m, c)
    if stats is not None and job.rank != 0:
        for c in range(n):
            ahead = _rank_lanes(ahead, _vector_at(work, c * lanes), target_logit, target, c)
    if stats is not None and job.entropy != 0:
        sums = _sum_spread(work, n * lanes, e, m)
        spread = _times(_plus(sums.total, sums.carry), unit)
    if stats is not None and job.brier != 0:
        for r in range(count):
            own = _target(x, job, row + r)
            if 0 <= own < n:
                _set(e, own * lanes + r, 0.0)
        sums = _sum_squares(work, n * lanes, e)
        squares = _times(_plus(sums.total, sums.carry), _splat_double(x, _square_unit(x)))
    m, target_logit = _nan_with(_as_doubles(m), rest), _as_doubles(target_logit)
    return _found(stats, m, target_logit, _as_doubles(tops), _as_doubles(ahead), spread, squares)


@njit(**_INNER)
def _narrow_rows(x_type, job, item, worker, with_grad, soft, stats):
    first = item * job.item_rows
    last = min(first + job.item_rows, job.n_rows)
    x, grad, n = _pointer_like(job.x, x_type), _pointer_like(job.grad, x_type), job.n_classes
    scratch = job.scratch + 8 * worker * job.scratch_size
    saved = _float64s(scratch, x)  # rows' numbers, one by one
    work, second = (
        _reals_like(scratch + 8 * _WORK, x),
        _reals_like(scratch + 8 * (_WORK + _LANES_WORK), x),
    )
    lanes, counted, row = _lanes(x), 0, first
    while row < last:
        outer, inner = divmod(job.first_row + row, job.inner)
        count = min(lanes, last - row, job.inner - inner)
        at = _at(x, outer * job.x_outer + inner * job.x_inner)
        _fetch_lanes(at, job.x_inner, job.x_class, count, n, work)
        kept, target, n_counted = _lanes_kept(x, job, row, count)
        m, target_logit = _splat(x, -np.inf), _splat(x, 0.0)
        for c in range(n):
            v = _vector_at(work, c * lanes)
            m = _larger_of(v, m)
            target_logit = _where_class(target_logit, target, c, v)
        t = _at(_probs_of(soft), outer * job.p_outer + inner * job.p_inner)
        _fetch_lanes_of_probs(t, job, count, n, second)
        here = _soft_with(soft, second, 0)
        sums = _sum_shares(work, n * lanes, here, m, _if_given(with_grad, m))
        e = second if job.log != 0 or stats is not None else work
        e = _if_either(with_grad, stats, e)
        totals, carries, ties = _sum_terms(work, n * lanes, _finite_or_zero(m), m, e)
        rest = _total_of(totals, carries, ties)
        found = _found_lanes(x, job, row, count, n, work, e, m, rest, target_logit, target, stats)
        gap, error, rest = _parts_of_loss(x, _as_doubles(m), _as_doubles(target_logit), rest)
        w = _target_weights(x, job, row, count, soft, lanes, saved)
        linear, mass = _closed(sums.linear, sums.linear_carry), _closed(sums.mass, sums.mass_carry)
        below = _closed(sums.below, sums.below_carry)
        linear, mass, others = _mass_of(soft, gap, linear, mass, below, w)
        n_counted = _by_targets(soft, _count_bad(kept, sums.least, mass), n_counted)
        _store_lanes(x, job, row, count, kept, gap, error, rest, linear, mass, found, saved, 1)
        if with_grad is not None:
            if job.log != 0:
                how = _log_parts(x, _as_doubles(m), gap, rest)
                for c in range(n):
                    _narrow_gradient(work, c, kept, target, m, how)
            else:
                scale = _scale_lanes(x, job, row, count, saved)
                target_term = _splat(x, 0.0)
                for c in range(n):
                    target_term = _where_class(target_term, target, c, _vector_at(work, c * lanes))
                term = _term_of(x, target_term)
                factor = _lane_factors(x, gap, rest, _times_mass(scale, mass))
                own = _own_parts(x, soft, scale, gap, term, rest, mass, others, w)
                how, ids = _how(factor, own, here), _class_id(soft, target)
                own = _target_lanes(x, own, gap, term, rest, scale)
                for c in range(n):
                    _narrow_gradient(work, c, kept, ids, own, how)
                if _any_at_least(scale, _MAX_SCALE):
                    _store(saved, 0, scale)
                    _store(saved, lanes, _as_doubles(m))
                    _store(saved, 2 * lanes, gap)
                    _store(saved, 3 * lanes, rest)
                    if soft is not None:
                        _store(saved, 4 * lanes, mass)
                        _store(saved, 5 * lanes, others)
                        _store(saved, 6 * lanes, w)
                    _plain_lanes(x, job, at, row, count, n, saved, work, here)
            g = _at(grad, outer * job.g_outer + inner * job.g_inner)
            _deliver_lanes(work, g, job.g_inner, job.g_class, count, n)
        counted += n_counted
        row += count
    _sum_tiles(x, job, first, last)
    return counted


@njit(**_INNER)
def _plain_lanes(x_type, job, x, row, count, n, saved, work, soft):
    """Compute the gradient of rows with a large scale from their logits."""
    lanes = _lanes(x)
    for r in range(count):
        scale, m, gap, rest = saved[r], saved[lanes + r], saved[2 * lanes + r], saved[3 * lanes + r]
        target = _target(x, job, row + r)
        if _is_large(scale) and 0 <= target < n and gap == gap:
            logits, out = _at(x, r * job.x_inner), _at(work, r)
            here, mass = _soft_with(soft, _at(_probs_of(soft), r), 0), saved[4 * lanes + r]
            others, w = saved[5 * lanes + r], saved[6 * lanes + r]
            own = _own_parts(x, soft, scale, gap, math.exp(-gap), rest, mass, others, w)
            _write_plain(logits, job.x_class, n, m, rest, scale, out, lanes, here, lanes, own, mass)
            written = _target_to_write(job, target, soft)
            _set_target(out, written * lanes, gap, 0.0, rest, scale, soft, own)


# ---- The kernels: what is wanted of them stands in the type of their first argument ----


def _if_wanted(name: str) -> Any:
    """Make an intrinsic that returns a value in kernels of which something is wanted, else None."""

    def give(typingctx: Any, call: Any, value: Any) -> Any:
        wanted = name in call.wanted

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return args[1] if wanted else context.get_dummy_value()

        return (value if wanted else types.none)(call, value), codegen

    return intrinsic(give)


_if_grad, _if_soft, _if_stats = map(_if_wanted, ("grad", "soft", "stats"))
_if_probs, _if_weight = map(_if_wanted, ("probs", "weight"))


@njit(**_INNER)
def _soft_of(call, job):
    probs, weight = _pointer_like(job.probs, call), _reals_like(job.weight, call)
    soft = _Soft(
        _if_probs(call, probs), _if_weight(call, weight), job.alpha, job.beta, job.unit, job.id_share
    )
    return _if_soft(call, soft)


def _narrow(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _narrow_rows(x, job, item, worker, _if_grad(call, 1), soft, stats)


def _middle(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _middle_rows(x, job, item, worker, _if_grad(call, 1), soft, stats)


def _middle_strided(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _middle_strided_rows(x, job, item, worker, _if_grad(call, 1), soft, stats)


def _direct(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _direct_rows(x, job, item, worker, _if_grad(call, 1), soft, stats)


def _strided(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _strided_rows(x, job, item, worker, _if_grad(call, 1), soft, stats)


def _long_read(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _read_part(x, job, item, worker, soft, stats)


def _long_merge(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    x, soft, stats = _pointer_like(0, call), _soft_of(call, job), _if_stats(call, job)
    return _merge_parts(x, job, item, worker, soft, stats)


def _long_write(call, job, item, worker):
    job = numba.carray(job, 1)[0]
    return _write_part(_pointer_like(0, call), job, item, worker, _soft_of(call, job))


_DTYPES = {
    np.dtype(np.float32): types.float32,
    np.dtype(np.float64): types.float64,
    np.dtype(np.float16): types.int16,
    np.dtype(np.uint16): types.uint16,
}
_compiling = threading.Lock()


@functools.cache
def _address_of(kernel: Callable[..., None], dtype: np.dtype[Any], wanted: tuple[str, ...] = ()) -> int:
    """Compile a kernel for a dtype and what is wanted, or load it from the disk; return its address."""
    fields = [(name, np.float64 if name in _MORE[-_NUMBERS:] else np.int64) for name in _JOB + _MORE]
    job = types.CPointer(numba.from_dtype(np.dtype(fields)))
    signature = types.int64(_Call(_DTYPES[dtype], wanted), job, types.int64, types.int64)
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
        row_weights: NDArray[np.float64] | None,
        soft: Soft | None,
        stats: Stats | None,
        scale: NDArray[np.float64] | None,
        grad: NDArray[Any] | None,
        stream: bool,
        num_threads: int,
    ) -> int:
        """See `fastce.kernels.Kernels.rows`."""
        write = None if scale is None or grad is None else (grad, scale, stream, False)
        places = _address(targets), _address(losses), _address(tile_sums)
        task = logits, first_row, len(targets), places, num_threads
        if row_weights is None and soft is None and stats is None:
            return _run(*task, write, None)
        if stats is not None and write is not None:  # which may take the place of the logits
            _run(*task, None, _more(logits, row_weights, None, stats))
            stats = None
        return _run(*task, write, _more(logits, row_weights, soft, stats))

    def softmax(
        self,
        logits: NDArray[Any],
        first_row: int,
        n_rows: int,
        out: NDArray[Any],
        *,
        log: bool,
        stream: bool,
        num_threads: int,
    ) -> None:
        """See `fastce.kernels.Kernels.softmax`."""
        _run(logits, first_row, n_rows, (0, 0, 0), num_threads, (out, _ONE, stream, log), None)

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


_ONE = np.broadcast_to(np.float64(1.0), 2)  # the scale of a softmax


class _More(NamedTuple):
    """What plain calls have not."""

    wanted: tuple[str, ...]  # of kernels
    direct: bool  # whether probabilities of a row lie side by side
    words: tuple[float, ...]  # of the job
    weight: NDArray[Any] | None  # which the job refers to


def _more(
    logits: NDArray[Any],
    row_weights: NDArray[np.float64] | None,
    soft: Soft | None,
    stats: Stats | None,
) -> _More:
    n_classes = logits.shape[2]
    probs, weight, smoothing = soft or Soft(None, None, 0.0)
    share = smoothing / n_classes
    wanted: tuple[str, ...] = () if stats is None else ("stats",)
    id_weights = None
    if probs is None and smoothing == 0.0:
        weight, id_weights = None, weight
    else:
        arrays = {"soft": logits, "probs": probs, "weight": weight}
        wanted = tuple(name for name, array in arrays.items() if array is not None)
    if weight is not None and n_classes <= _NARROW:  # a vector for each class
        weight = np.repeat(weight, _lanes_of(_DTYPES[logits.dtype]))
    t = (0, 0, 0, 0) if probs is None else (_address(probs), *_strides(probs))
    words = (
        *((0, 0) if row_weights is None else (_address(row_weights), row_weights.strides[0] // 8)),
        *(_address_or_0(id_weights), *t, _address_or_0(weight)),
        *map(_address_or_0, stats or Stats()),
        *(
            (0.0, share, share, 1.0 - smoothing)
            if probs is None
            else (1.0 - smoothing, share, 1.0, 0.0)
        ),
    )
    return _More(wanted, probs is None or t[3] == 1, words, weight)


def _address_or_0(array: NDArray[Any] | None) -> int:
    return 0 if array is None else _address(array)


def _run(
    logits: NDArray[Any],
    first_row: int,
    n_rows: int,
    places: tuple[int, int, int],
    num_threads: int,
    write: tuple[NDArray[Any], NDArray[np.float64], bool, bool] | None,
    more: _More | None,
) -> int:
    """Run the kernels for some rows, whose targets, losses and sums of tiles have these addresses.

    ``write`` says what to write where the logits have their shape: a gradient, its scale, whether it is
    to pass by the caches, and whether it is the logarithm of a softmax.
    """
    if n_rows == 0:
        return 0
    _, inner, n_classes = logits.shape
    x_strides = _strides(logits)
    wanted: tuple[str, ...] = () if more is None else more.wanted
    direct = x_strides[2] == 1 and (more is None or more.direct)
    outputs: tuple[int, ...] = (0, 0, 0, 0, 0, 0, 0, 0)
    if write is not None:
        grad, scale, stream, log = write
        g_strides = _strides(grad)
        wanted, direct = ("grad", *wanted), direct and g_strides[2] == 1
        stream = stream and not (direct and n_classes < _STREAMED)
        outputs = _address(scale), scale.strides[0] // 8, _address(grad), *g_strides, stream, log
    plan = _plan(logits.dtype, n_classes, direct, wanted)
    n_items = -(-n_rows // plan.item_rows) * plan.n_parts
    # a multiple of 8, as all sizes here
    n_states = n_rows * plan.n_parts * _STATE if plan.n_parts > 1 else 0
    workers = max(1, min(num_threads, n_items))
    with _Memory(_JOB_WORDS + n_states + workers * plan.scratch_size) as memory:
        states = memory.address + 8 * _JOB_WORDS
        _pack_job(
            *(memory.words, 0, _address(logits), *x_strides, inner, first_row, n_rows, n_classes),
            *(*places, plan.tile_rows, plan.item_rows),
            *outputs,
            *(states + 8 * n_states, plan.scratch_size, states, plan.n_parts),
            more is not None,
        )
        if more is not None:
            _pack_more(memory.words, 8 * len(_JOB), *more.words)
        counted = 0
        for function, is_merge in plan.functions:
            if workers == 1 or is_merge:
                counted += _run_serially(function, memory.address, 1 if is_merge else n_items)
            else:
                counted += _run_parallel(function, memory, n_items, workers)
        return counted


_pack_job = struct.Struct(f"{len(_JOB)}q").pack_into
_pack_more = struct.Struct(f"{len(_MORE) - _NUMBERS}q{_NUMBERS}d").pack_into


class _Plan(NamedTuple):
    """How rows of some width and layout are computed."""

    functions: tuple[tuple[int, bool], ...]  # one after the other; whether it merges parts, as one item
    tile_rows: int
    item_rows: int  # rows in an item of work
    n_parts: int  # of a row
    scratch_size: int  # words of each worker


@functools.lru_cache(maxsize=256)
def _plan(dtype: np.dtype[Any], n_classes: int, direct: bool, wanted: tuple[str, ...]) -> _Plan:
    """Choose kernels; ``direct`` says that the classes of a row lie side by side."""
    item_rows, kept = tile_rows(n_classes), 0
    if n_classes <= _NARROW:
        kernel = _narrow
        work = _WORK + 2 * _LANES_WORK
    elif n_classes <= _BLOCK:
        kernel = _middle if direct else _middle_strided
        work = _SLOTS + (_GROUP * _PITCH if direct else _FETCHED_WORK)
    elif n_classes > _PART:
        item_rows = 1 if direct else _TALL
        work = _WORK + _TALL * (_PART // _BLOCK + _PITCH)
    elif direct:
        kernel = _direct
        work = _WORK + _PART // _BLOCK
        kept = n_classes if "grad" in wanted else _BLOCK
    else:
        kernel = _strided
        work = _WORK + _TALL * (-(-n_classes // _BLOCK) + _PITCH)
    if n_classes > _PART:
        read = tuple(name for name in wanted if name != "grad")
        kernels = [(_long_read, read), (_long_merge, read), (_long_write, wanted)]
        kernels = kernels[: 3 if "grad" in wanted else 2]
    else:
        kernels = [(kernel, wanted)]
    functions = ((_address_of(kernel, dtype, of), kernel is _long_merge) for kernel, of in kernels)
    if not direct:  # rows in the lanes of a vector
        item_rows *= -(-_FETCHED // item_rows)
    scratch_size = -(-(work + kept) // 8) * 8
    return _Plan(
        tuple(functions), tile_rows(n_classes), item_rows, -(-n_classes // _PART), scratch_size
    )


def _strides(array: NDArray[Any]) -> tuple[int, int, int]:
    """In elements; that of one class says nothing, and is 1."""
    size = array.itemsize
    outer, inner, step = array.strides
    return outer // size, inner // size, step // size if array.shape[2] > 1 else 1


_word_at = ctypes.c_size_t.from_address


def _address(array: NDArray[Any]) -> int:
    """Return where the first element lies: a sixth of the time of ``array.ctypes.data``.

    NumPy promises C extensions that an array's structure starts with it, after what all objects have.
    """
    return int(_word_at(id(array) + object.__basicsize__).value)


# The job, and then the counter of items.
_JOB_WORDS = 64
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
