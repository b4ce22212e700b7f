"""The same bits for any layout, batch, alignment, place of the result and number of threads."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

import numpy as np
import pytest
from cases import (
    ALL_DTYPES,
    DTYPES,
    HALVES,
    INF,
    NAN,
    assert_near,
    assert_same_bits,
    both,
    layouts,
    probabilities,
    problem,
)

import fastce
from fastce import info

# ---- Every kind of work on rows of logits x, class ids y, and probabilities t and u ----


def class_ids(x, y, t, u, **options):
    return both(x, y, **options)


def smoothed(x, y, t, u, axis=-1, **options):
    weight = np.linspace(0.25, 2, x.shape[axis])
    return both(x, y, axis=axis, weight=weight, label_smoothing=0.1, base=2, **options)


def soft(x, y, t, u, **options):
    return both(x, t, **options)


def smoothed_soft(x, y, t, u, **options):
    return smoothed(x, t, None, None, **options)


def row_stats(x, y, t, u, **options):
    return fastce.row_stats(x, y, **options)


def softmax(x, y, t, u, **options):
    return (fastce.softmax(x, **options),)


def log_softmax(x, y, t, u, **options):
    return (fastce.log_softmax(x, **options),)


def entropy(x, y, t, u, **options):
    return (info.entropy(t, **options),)


def cross_entropy(x, y, t, u, **options):
    return (info.cross_entropy(t, u, **options),)


def kl_divergence(x, y, t, u, **options):
    return (info.kl_divergence(t, u, **options),)


def kl_divergence_from_logits(x, y, t, u, **options):
    return (info.kl_divergence_from_logits(x, t, **options),)


def binary(x, y, t, u, axis=-1, **options):
    of_logits = fastce.binary_cross_entropy_with_logits_with_grad
    return of_logits(x, t, pos_weight=1.5, weight=0.75, reduction="none", **options)


def binary_of_probabilities(x, y, t, u, axis=-1, **options):
    return fastce.binary_cross_entropy_with_grad(u, t, reduction="none", **options)


# Those whose last result goes to out=, and which argument that may be.
WRITERS = {
    class_ids: "x",
    smoothed: "x",
    soft: "x",
    smoothed_soft: "x",
    softmax: "x",
    log_softmax: "x",
    binary: "x",
    binary_of_probabilities: "u",
}
READERS = (row_stats, entropy, cross_entropy, kl_divergence, kl_divergence_from_logits)
WORK = (*WRITERS, *READERS)

of_all_work = pytest.mark.parametrize("work", WORK)
of_writers = pytest.mark.parametrize("work", WRITERS)


def arguments(n_rows, n_classes, dtype="float32"):
    x, y = problem(n_rows, n_classes, dtype)
    if n_rows > 10:
        y[5] = -100
        x[7, n_classes // 2] = NAN
        x[9, 0] = -INF
    t, u = (probabilities(n_rows, n_classes, dtype, seed) for seed in (1, 2))
    return {"x": x, "y": y, "t": t, "u": u}


def arranged(arrays, arrange):
    """Return the arguments with each array of all classes seen in another way."""
    return {key: array if key == "y" else arrange(array) for key, array in arrays.items()}


def assert_all_same_bits(got, expected, message=""):
    for result, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(one, other, f"{message}, result {result}")


# ---- Layouts ----


@pytest.mark.parametrize(
    ("work", "n_classes"),
    [
        (work, n)
        for work in WORK
        for n in ((2, 3, 10, 31, 65, 700, 1500) if work is class_ids else (3, 31, 700))
    ],
)
def test_any_layout_gives_the_same_bits(backend, work, n_classes):
    """The arrays of a call have each a layout of their own."""
    for dtype in ALL_DTYPES:
        check_layouts(backend, work, dtype, n_classes)


def check_layouts(backend, work, dtype, n_classes):
    arrays = arguments(37 if n_classes < 100 else 19, n_classes, dtype)
    expected = work(**arrays, backend=backend)
    views = {key: layouts(arrays[key]) for key in "xtu"}
    names = list(views["x"])
    for name, of_t in zip(names, names[1:] + names[:1], strict=True):
        given = {"x": views["x"][name], "y": arrays["y"], "t": views["t"][of_t], "u": views["u"][name]}
        assert_all_same_bits(work(**given, backend=backend), expected, f"{name}, {of_t}")
        out = given[WRITERS[work]] if work in WRITERS else None
        if out is not None and out.flags.writeable and out.dtype.isnative:
            got = work(**given, backend=backend, out=out)
            assert got[-1] is out
            assert_all_same_bits(got, expected, f"{name}, {of_t}, in place")
    for name, out in layouts(np.zeros_like(arrays["x"])).items() if work in WRITERS else ():
        if out.flags.writeable:
            got = work(**arrays, backend=backend, out=out)
            assert got[-1] is out
            assert_all_same_bits((*got[:-1], out.astype(dtype)), expected, name)


@pytest.mark.parametrize(
    ("n_classes", "inner"),
    [
        (10, 1),
        (10, 5),
        (10, 16),
        (10, 45),
        (40, 5),
        (40, 45),
        (40, 130),
        (1100, 1),
        (1100, 5),
        (1100, 16),
    ],
)
@of_all_work
def test_classes_in_the_middle_give_the_same_bits(backend, work, inner, n_classes):
    for dtype in ALL_DTYPES:
        check_middle(backend, work, dtype, inner, n_classes)


@pytest.mark.parametrize(("n_classes", "inner"), [(150, 200), (300, 13), (1100, 100), (8300, 16)])
@pytest.mark.parametrize("work", [class_ids, softmax])
def test_many_classes_in_the_middle_give_the_same_bits(backend, work, inner, n_classes):
    """More groups of rows than one, bands of few rows, and more blocks than are kept."""
    for dtype in ALL_DTYPES:
        check_middle(backend, work, dtype, inner, n_classes)


def check_middle(backend, work, dtype, inner, n_classes):
    arrays = arguments(3 * inner, n_classes, dtype)
    expected = work(**arrays, backend=backend)

    def in_the_middle(array):
        return np.ascontiguousarray(array.reshape(3, inner, n_classes).swapaxes(1, 2))

    middle = arranged(arrays, in_the_middle)
    middle["y"] = arrays["y"].reshape(3, inner)
    expected = [
        in_the_middle(array) if array.ndim == 2 else array.reshape(3, inner) for array in expected
    ]
    assert_all_same_bits(work(**middle, axis=1, backend=backend), expected)
    if work in WRITERS:
        out = middle[WRITERS[work]]
        assert_all_same_bits(work(**middle, axis=1, backend=backend, out=out), expected, "in place")


@of_all_work
def test_batch_axes_that_do_not_merge(backend, work):
    """Three batch axes in an order that no two strides describe: copied a block at a time."""
    arrays = arguments(4 * 5 * 6, 12)
    expected = [
        array.reshape(4, 5, 6, -1).squeeze(-1) if array.ndim == 1 else array.reshape(4, 5, 6, 12)
        for array in work(**arrays, backend=backend)
    ]

    def transposed(array):
        return array.reshape(4, 5, 6, 12).transpose(2, 1, 0, 3).copy().transpose(2, 1, 0, 3)

    whole = arranged(arrays, lambda array: array.reshape(4, 5, 6, 12))
    whole["y"] = arrays["y"].reshape(4, 5, 6)
    views = arranged(whole, transposed)
    assert_all_same_bits(work(**views, backend=backend), expected)
    for key in "xtu":
        some = {**whole, key: views[key]}
        assert_all_same_bits(work(**some, backend=backend), expected, key)
    if work in WRITERS:
        for out in (
            transposed(np.zeros(480, np.float32).repeat(3)),
            np.zeros((4, 6, 6, 12), np.float32)[:, :5],
        ):
            assert_all_same_bits(work(**whole, backend=backend, out=out), expected, "out")
            assert_all_same_bits(work(**views, backend=backend, out=out), expected, "out")


@pytest.mark.parametrize("n_classes", [12, 700])
@of_writers
def test_a_buffer_whose_batch_axes_do_not_merge(backend, work, n_classes):
    """The logits' two axes are one, the gradient's are not."""
    arrays = arguments(20, n_classes)
    expected = work(**arrays, backend=backend)
    deep = arranged(arrays, lambda array: array.reshape(4, 5, n_classes))
    deep["y"] = arrays["y"].reshape(4, 5)
    out = np.empty((4, 6, n_classes), np.float32)[:, :5]
    got = work(**deep, backend=backend, out=out)
    assert_all_same_bits(
        [array.reshape(e.shape) for array, e in zip(got, expected, strict=True)], expected
    )


@of_all_work
def test_one_row_without_batch_axes(backend, work):
    """In any layout: the copies of one row have no row axis either."""
    arrays = arguments(1, 40)
    expected = [array[0] for array in work(**arrays, backend=backend)]
    for name in layouts(arrays["x"]):
        row = arranged(arrays, lambda array, name=name: layouts(array)[name][0])
        row["y"] = arrays["y"][0]
        got = [np.asarray(array) for array in work(**row, backend=backend)]
        assert_all_same_bits(got, [np.asarray(array) for array in expected], name)


@of_all_work
def test_broadcast_rows(backend, work):
    arrays = arguments(3, 17)
    arrays = arranged(arrays, lambda array: np.broadcast_to(array[1], (50, 17)))
    arrays["y"] = np.arange(50) % 3
    expected = work(**arranged(arrays, np.ascontiguousarray), backend=backend)
    assert_all_same_bits(work(**arrays, backend=backend), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@of_all_work
def test_any_class_axis(backend, work, axis):
    n_classes = (6, 7, 8)[axis]
    arrays = arguments(6 * 7 * 8 // n_classes, n_classes)
    batch = np.delete((6, 7, 8), axis)
    expected = [
        np.moveaxis(array.reshape(*batch, n_classes), -1, axis)
        if array.ndim == 2
        else array.reshape(batch)
        for array in work(**arrays, backend=backend)
    ]
    moved = arranged(arrays, lambda a: np.moveaxis(a.reshape(*batch, n_classes), -1, axis))
    moved["y"] = arrays["y"].reshape(batch)
    assert_all_same_bits(work(**moved, axis=axis, backend=backend), expected)
    contiguous = arranged(moved, np.ascontiguousarray)
    assert_all_same_bits(work(**contiguous, axis=axis, backend=backend), expected)


# ---- Where results go ----


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("n_classes", [2, 10, 40, 1000, 2100])
@pytest.mark.parametrize("work", [class_ids, smoothed, soft, softmax, log_softmax])
def test_a_result_past_the_caches_has_the_same_bits(backend, work, dtype, n_classes, monkeypatch):
    arrays = arguments(150 if n_classes < 100 else 20, n_classes, dtype)
    expected = work(**arrays, backend=backend)
    monkeypatch.setattr("fastce.losses._STREAM_BYTES", 0)
    for offset in (0, 1, 5):
        memory = np.full(arrays["x"].size + offset + 1, 7, dtype)
        out = memory[offset:-1].reshape(arrays["x"].shape)
        assert_all_same_bits(work(**arrays, backend=backend, out=out), expected, offset)
        assert (memory[:offset] == 7).all()
        assert memory[-1] == 7


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_of_every_kind_past_the_caches(backend, dtype, axis, monkeypatch):
    """A gradient may be written while the next row is read, or with others, whatever kind each is."""
    kinds = {
        "ordinary": 0.0,
        "climbs": np.linspace(0, 100, 5000),  # so its exponentials have several references
        "masked": np.where(np.arange(5000) < 2500, -INF, 0),
        "NaN": np.where(np.arange(5000) == 4000, NAN, 0),
        "inf": np.where(np.arange(5000) == 10, INF, 0),
        "nothing": -INF,
        "ignored": 0.0,
        "far": 500 * (np.arange(5000) % 2),
    }
    order = np.random.default_rng(2).integers(len(kinds), size=64)
    added = np.stack([np.broadcast_to(kind, 5000) for kind in kinds.values()])[order]
    logits = np.random.default_rng(0).standard_normal((64, 5000)) + added
    x, y = logits.astype(dtype), np.random.default_rng(1).integers(5000, size=64)
    y[order == [*kinds].index("ignored")] = -100
    upstream = np.where(np.arange(64) % 5 == 4, 1e-40, 1.0)  # too small for a product of float32
    options = {"reduction": "none", "grad_output": upstream, "backend": backend}
    expected = fastce.cross_entropy_with_grad(x, y, **options)
    monkeypatch.setattr("fastce.losses._STREAM_BYTES", 0)
    for threads, offset in ((1, 0), (2, 0), (2, 5)):
        out = np.empty(x.size + offset, dtype)[offset:]
        out = out.reshape(x.shape) if axis == 1 else out.reshape(x.shape[::-1]).T
        moved = np.ascontiguousarray(x) if axis == 1 else np.asfortranarray(x)
        got = fastce.cross_entropy_with_grad(moved, y, **options, out=out, num_threads=threads)
        assert_all_same_bits(got, expected, (threads, offset))


@pytest.mark.parametrize("n_classes", [10, 300])
@pytest.mark.parametrize("half", HALVES)
@of_writers
def test_half_arrays_into_another_dtype(backend, work, half, n_classes):
    """Computed in float32 and rounded once, not to half first."""
    arrays = arguments(40, n_classes, half)
    *losses, grad = work(**arranged(arrays, lambda array: array.astype(np.float32)), backend=backend)
    for dtype in ("float32", "float64"):
        out = np.empty(grad.shape, dtype)
        got = work(**arrays, backend=backend, out=out)
        assert_all_same_bits(got, (*losses, grad.astype(dtype)))


@pytest.mark.parametrize("n_classes", [10, 300])
@of_all_work
def test_the_bits_of_bfloat16(backend, work, n_classes):
    arrays = arguments(40, n_classes, "bfloat16")
    expected = [
        array.view(np.uint16) if array.itemsize == 2 else array
        for array in work(**arrays, backend=backend)
    ]
    bits = arranged(arrays, lambda array: array.view(np.uint16))
    options = {"dtype": "bfloat16", "backend": backend}
    assert_all_same_bits(work(**bits, **options), expected)
    if work in WRITERS:
        assert_all_same_bits(work(**bits, **options, out=bits[WRITERS[work]]), expected, "in place")


@pytest.mark.parametrize("n_classes", [10, 40, 3000])
@pytest.mark.parametrize("order", ["C", "F"])
@of_writers
def test_in_place(backend, work, n_classes, order):
    arrays = arguments(60, n_classes)
    expected = work(**arrays, backend=backend)
    buffer = arrays[WRITERS[work]].copy(order=order)
    got = work(**{**arrays, WRITERS[work]: buffer}, out=buffer, backend=backend)
    assert got[-1] is buffer
    assert_all_same_bits(got, expected)


@of_all_work
def test_inputs_are_unchanged(backend, work):
    arrays = arguments(50, 20)
    before = {key: array.copy() for key, array in arrays.items()}
    work(**arrays, backend=backend)
    for key in arrays:
        np.testing.assert_array_equal(arrays[key], before[key])


# ---- How work is divided ----


@functools.cache
def truth_of_long_rows(work):
    return work(**arranged(long_rows(), lambda array: array.astype(np.float64)), backend="numpy")


@functools.cache
def long_rows():
    """Two rows past the length that is cut into segments: one masked for a whole segment."""
    n_classes = 2**18 + 4321
    arrays = arguments(2, n_classes)
    x, y, t, _ = arrays.values()
    x[0, 2**18 + 5] = 25.0  # the maximum leads the second segment
    y[:] = 2**18 + 5, n_classes - 1
    x[1, : 2**18] = -INF
    t[1, : 2**18] = 0
    t[0] = probabilities(2, n_classes, seed=3)[1]
    return arrays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORK[1:])  # class ids: below
def test_rows_for_all_threads(backend, work, dtype):
    """Rows of more than 2^18 classes are cut at fixed places."""
    arrays = arranged(long_rows(), lambda array: array.astype(dtype))
    one = work(**arrays, backend=backend, num_threads=1)
    for got, expected in zip(one, truth_of_long_rows(work), strict=True):
        assert_near(got, expected, larger_term=np.nanmax(np.abs(expected)) if got.ndim == 2 else 0.0)
    assert_all_same_bits(work(**arrays, backend=backend, num_threads=3), one)
    if dtype == "float32":
        fortran = arranged(arrays, np.asfortranarray)
        assert_all_same_bits(work(**fortran, backend=backend, num_threads=2), one, "Fortran")
    if work in WRITERS:
        out = arrays[WRITERS[work]] = arrays[WRITERS[work]].copy()
        assert_all_same_bits(work(**arrays, backend=backend, num_threads=2, out=out), one, "in place")


@pytest.mark.parametrize("n_classes", [10, 40, 3000])
@of_all_work
def test_rows_do_not_depend_on_their_neighbours(backend, work, n_classes):
    arrays = arguments(150, n_classes)
    expected = work(**arrays, backend=backend)
    for start, stop in ((0, 1), (5, 22), (70, 150)):
        part = {key: array[start:stop] for key, array in arrays.items()}
        assert_all_same_bits(work(**part, backend=backend), [array[start:stop] for array in expected])


@pytest.mark.parametrize("n_classes", [10, 20_000])
@of_all_work
def test_any_number_of_threads_gives_the_same_bits(backend, work, n_classes):
    arrays = arguments(200_000 // n_classes, n_classes)
    expected = work(**arrays, backend=backend, num_threads=1)
    for num_threads in (2, 3):
        assert_all_same_bits(work(**arrays, backend=backend, num_threads=num_threads), expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"sample_weight": True}])
@pytest.mark.parametrize("n_classes", [10, 300, 20_000])
def test_any_number_of_threads_gives_the_same_mean(backend, n_classes, options):
    x, y = problem(400_000 // n_classes, n_classes)
    y[::5] = -100
    if "sample_weight" in options:
        options = {"sample_weight": np.linspace(0.1, 3, len(y))}
    mean = fastce.cross_entropy(x, y, backend=backend, num_threads=1, **options)
    for num_threads in (2, 3, 4, 7):
        assert fastce.cross_entropy(x, y, backend=backend, num_threads=num_threads, **options) == mean


@of_all_work
def test_slices_change_no_bit(backend, work, monkeypatch):
    """A long call goes to the kernels in slices, so that Ctrl-C is heard."""
    arrays = arguments(3000, 50)
    expected = work(**arrays, backend=backend)
    monkeypatch.setattr("fastce.problem._SLICE_ELEMENTS", 2**14)
    monkeypatch.setattr("fastce.problem._COPY_ELEMENTS", 2**14)
    for arrange in (np.ascontiguousarray, np.asfortranarray, lambda a: a[::-1].copy()[::-1]):
        assert_all_same_bits(work(**arranged(arrays, arrange), backend=backend), expected)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_slices_change_no_sum(backend, options, monkeypatch):
    x, y = problem(3000, 50)
    expected = fastce.cross_entropy(x, y, backend=backend, **options)
    monkeypatch.setattr("fastce.problem._SLICE_ELEMENTS", 1)
    monkeypatch.setattr("fastce.problem._COPY_ELEMENTS", 1)
    for layout in (x, np.asfortranarray(x)):
        assert fastce.cross_entropy(layout, y, backend=backend, **options) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_sums_do_not_depend_on_layout_and_threads(backend, dtype):
    """More elements than one slice of memory that must be copied."""
    rng = np.random.default_rng(4)
    x = (4 * rng.standard_normal((370, 2999))).astype(dtype)
    t = rng.random(x.shape).astype(dtype)
    total = fastce.binary_cross_entropy_with_logits(x, t, backend=backend, num_threads=1)
    for num_threads in (2, 3):
        got = fastce.binary_cross_entropy_with_logits(x, t, backend=backend, num_threads=num_threads)
        assert got == total
    for view in (np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1], layouts(x)["padded rows"]):
        assert fastce.binary_cross_entropy_with_logits(view, t, backend=backend) == total


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_sums_do_not_depend_on_where_they_are_cut(backend, dtype, monkeypatch):
    """Of few tiles, so that what their sums round away would be seen."""
    rng = np.random.default_rng(4)
    cases = [(4 * rng.standard_normal(20_000)).astype(dtype) for _ in range(20)]
    whole = [fastce.binary_cross_entropy_with_logits(x, x > 0, backend=backend) for x in cases]
    monkeypatch.setattr("fastce.problem._SLICE_ELEMENTS", 5000)  # not a whole number of tiles
    assert whole == [fastce.binary_cross_entropy_with_logits(x, x > 0, backend=backend) for x in cases]


# ---- Memory ----


@pytest.mark.parametrize("offset", [1, 3, 7, 15])
@of_all_work
def test_any_alignment_gives_the_same_bits(backend, work, offset):
    arrays = arguments(20, 777)

    def moved(array):
        found = np.zeros(array.size + 16, array.dtype)[offset : offset + array.size]
        found = found.reshape(array.shape)
        found[:] = array
        return found

    assert_all_same_bits(
        work(**arranged(arrays, moved), backend=backend), work(**arrays, backend=backend)
    )


def guarded(array, at_end):
    """Return a copy between two pages that may not be touched: the process would die."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (address, address + page + size):
        assert mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page + (size - array.nbytes if at_end else 0)
    found = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    found[:] = array
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by Linux' mprotect")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@of_all_work
def test_nothing_is_read_or_written_outside_the_rows(backend, work, dtype):
    for n_classes in (1, 5, 31, 33, 40, 63, 65, 97, 1025, 1500):
        arrays = arguments(3, n_classes, dtype)
        expected = work(**arrays, backend=backend)
        for at_end in (False, True):
            given = arranged(arrays, lambda array, at_end=at_end: guarded(array, at_end))
            assert_all_same_bits(work(**given, backend=backend), expected, n_classes)
            if work in WRITERS:
                out = guarded(np.zeros_like(arrays["x"]), at_end)
                assert_all_same_bits(work(**given, backend=backend, out=out), expected, n_classes)


# ---- Of class ids alone ----


@pytest.mark.parametrize("half", HALVES)
def test_every_half_is_widened_exactly(backend, half):
    """All finite numbers, subnormal ones too: log(1 + e^-x) of each, as from float32."""
    infinity = np.array(INF, half).view(
        np.uint16
    )  # the numbers, then this, then NaNs; twice, for the sign
    values = np.concatenate([np.arange(infinity), np.arange(infinity) + 2**15])
    values = values.astype(np.uint16).view(half)
    for n_classes in (2, 40):
        x = np.zeros((len(values), n_classes), half)
        x[:, 1] = values
        y = np.zeros(len(values), np.int64)
        expected = fastce.cross_entropy(x.astype("float32"), y, reduction="none", backend=backend)
        assert_same_bits(fastce.cross_entropy(x, y, reduction="none", backend=backend), expected)


@functools.cache
def three_segments(dtype):
    n_classes = 2 * 2**18 + 4321
    x, y = problem(3, n_classes, dtype)
    y[0], y[1] = 2**18 + 5, n_classes - 1
    x[0, 2**18 + 5] = 30.0
    x[2, : 2**18] = -INF
    ranks = fastce.row_stats(x, y, outputs=["rank"], backend="numpy").rank.tolist()
    return x, y, both(x.astype("float64"), y, "numpy"), ranks


@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        ("float32", "C"),
        ("float32", "F"),
        ("float64", "C"),
        ("float64", "F"),
        ("float16", "C"),
        ("bfloat16", "F"),
    ],
)
def test_a_row_for_all_threads(backend, dtype, order):
    """Rows of more than 2^18 classes are cut at fixed places."""
    x, y, truth, expected_ranks = three_segments(dtype)
    x = np.array(x, order=order)
    loss, grad = both(x, y, backend, num_threads=1)
    np.testing.assert_allclose(loss, truth[0], rtol=1e-6 if dtype != "float64" else 1e-14)
    rtol = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(
        grad.astype("float64"), truth[1], rtol=rtol, atol=6e-8 if dtype == "float16" else 0
    )
    for num_threads in (2, 3):
        got_loss, got_grad = both(x, y, backend, num_threads=num_threads)
        assert_same_bits(got_loss, loss)
        assert_same_bits(got_grad, grad)
    ranks = fastce.row_stats(x, y, backend=backend).rank
    assert ranks.tolist() == expected_ranks
    both(x, y, backend, out=x)
    assert_same_bits(x, grad, "in place")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("n_classes", [1, 10, 40, 600])
def test_a_small_call_of_plain_arrays_is_like_any_other(backend, dtype, n_classes):
    """The short way round the checks, which other integers and lists do not take."""
    x, y = problem(20, n_classes, dtype)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": backend}
        short = fastce.cross_entropy_with_grad(x, y, **options)
        long = fastce.cross_entropy_with_grad(x, y.astype(np.int32), **options)
        np.testing.assert_array_equal(short[0], long[0])
        assert_same_bits(short[1], long[1])
        assert type(short[0]) is type(long[0])
        np.testing.assert_array_equal(fastce.cross_entropy(x, y, **options), long[0])
    y[4] = -100
    np.testing.assert_array_equal(
        fastce.cross_entropy(x, y, backend=backend),
        fastce.cross_entropy(x, y.astype(np.int32), backend=backend),
    )


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4", ">u8"]
)
def test_any_integer_dtype(backend, kind):
    x, y = problem(30, 9)
    expected = fastce.cross_entropy(x, y, backend=backend)
    assert fastce.cross_entropy(x, y.astype(kind), backend=backend) == expected
    assert fastce.cross_entropy(x, np.repeat(y, 2).astype(kind)[::2], backend=backend) == expected
