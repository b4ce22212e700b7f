"""What memory can do here: the speed that the kernels' bytes per second are held against.

Two sweeps over more than a cache holds: one that only reads, as the loss does, and one that reads an
array and writes another past the caches, as a large gradient does.

Each thread walks four places at once, some lines of each in turn. One place a thread, as in NumPy's
``max`` and ``copyto`` and in a plain loop in C, copies a quarter less on a Xeon with AVX-512, and
on some reads less too: the hardware's prefetcher starts anew at every page. Both are measured; the
limit is the larger one, because a figure that a kernel can exceed is none.

The sweeps are compiled by Numba when this module is imported, and cached on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

_BYTES = 2**29  # of each array
_SWEEPS = 5
_STREAMS = 4
_LINE = 8  # words of 8 bytes
_TURN = 8 * _LINE  # read of one stream before the next one; 4 KiB are too many for the prefetcher

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


def sweeps(n_threads: int, n_bytes: int = _BYTES) -> dict[str, list[float]]:
    """Return the speed of each sweep, several times over, once the pages are in place.

    Parameters
    ----------
    n_threads : int
        Threads that sweep, each a part of its own.
    n_bytes : int, default 512 MiB
        Size of each of the two arrays.

    Returns
    -------
    dict
        Lists of GB/s, what is read and what is written both counted: ``read`` and ``read_write``,
        and for comparison ``read_one_stream`` and ``read_write_one_stream``.
    """
    part = max(1, n_bytes // (8 * n_threads * _STREAMS * _TURN)) * _STREAMS * _TURN
    source, target = (_aligned(n_threads * part).reshape(n_threads, part) for _ in range(2))
    rates = {}
    with ThreadPoolExecutor(n_threads) as pool:
        for n_streams, name in ((_STREAMS, ""), (1, "_one_stream")):
            streams = [n_streams] * n_threads

            def read(streams: list[int] = streams) -> None:
                list(pool.map(_read, source, streams))

            def copy(streams: list[int] = streams) -> None:
                list(pool.map(_copy, source, target, streams))

            rates[f"read{name}"] = _rates(read, source.nbytes)
            rates[f"read_write{name}"] = _rates(copy, 2 * source.nbytes)
    return rates


def _aligned(n_words: int) -> NDArray[np.int64]:
    """Return touched memory that starts at a cache line; NumPy asks for huge pages."""
    room = np.ones(n_words + _LINE, np.int64)
    start = -room.ctypes.data % 64 // 8
    return room[start : start + n_words]


def _rates(sweep: Callable[[], None], n_bytes: int) -> list[float]:
    sweep()
    rates = []
    for _ in range(_SWEEPS):
        start = time.perf_counter()
        sweep()
        rates.append(n_bytes / (time.perf_counter() - start) / 1e9)
    return rates


@intrinsic
def _want_512(typingctx):
    """Let the calling function use 512-bit vectors, which LLVM avoids unless told."""

    def codegen(context, builder, signature, args):
        # past llvmlite's own add(), which knows only attributes without a value
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), codegen


def _lines(context, builder, array, value, i):
    """Return pointers to the lines of the turn that starts at word i."""
    data = context.make_array(array)(context, builder, value).data
    first = builder.bitcast(builder.gep(data, [i]), ir.VectorType(ir.IntType(64), _LINE).as_pointer())
    return [builder.gep(first, [ir.IntType(64)(k)]) for k in range(_TURN // _LINE)]


@intrinsic
def _read_turn(typingctx, source, i, found):
    """Read the lines of a turn into the words of the line ``found``, so that none can be left out.

    One word made of all would take as long as the reading.
    """

    def codegen(context, builder, signature, args):
        to = context.make_array(signature.args[2])(context, builder, args[2]).data
        to = builder.bitcast(to, ir.VectorType(ir.IntType(64), _LINE).as_pointer())
        words = builder.load(to, align=8)
        for line in _lines(context, builder, signature.args[0], *args[:2]):
            words = builder.xor(words, builder.load(line, align=64))
        builder.store(words, to, align=8)
        return context.get_dummy_value()

    return types.none(source, types.int64, found), codegen


@intrinsic
def _copy_turn(typingctx, source, target, i):
    """Copy the lines of a turn, past the caches."""

    def codegen(context, builder, signature, args):
        places = [
            _lines(context, builder, array, value, args[2])
            for array, value in zip(signature.args[:2], args[:2], strict=True)
        ]
        past_caches = builder.module.add_metadata([ir.IntType(32)(1)])
        for old, new in zip(*places, strict=True):
            store = builder.store(builder.load(old, align=64), new, align=64)
            store.set_metadata("nontemporal", past_caches)
        return context.get_dummy_value()

    return types.none(source, target, types.int64), codegen


@njit(**_OPTIONS)
def _read(source, n_streams):
    _want_512()
    found, step = np.zeros(_LINE, np.int64), source.size // n_streams
    for start in range(0, step, _TURN):
        for turn in range(start, source.size, step):
            _read_turn(source, turn, found)
    return found


@njit(**_OPTIONS)
def _copy(source, target, n_streams):
    _want_512()
    step = source.size // n_streams
    for start in range(0, step, _TURN):
        for turn in range(start, source.size, step):
            _copy_turn(source, target, turn)
