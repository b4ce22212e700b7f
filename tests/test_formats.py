"""Every format against files that others wrote, against hostile files, and against random damage."""

import io
import json
import os
import re
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter

import h5py
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import scipy.special
import torch
import zarr

from fastce import cli
from fastce.scoring import InputError, score_files
from fastce.scoring.convert import convert
from fastce.scoring.formats import find, open_source, sources_of
from fastce.scoring.formats.kld import KldWriter

N_ROWS, N_CLASSES = 301, 17
READABLE = ["bool", "float16", "float32", "float64"] + [
    f"{k}int{n}" for k in ("", "u") for n in (8, 16, 32, 64)
]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(8)
    logits = (4 * rng.standard_normal((N_ROWS, N_CLASSES))).astype(np.float32)
    targets = rng.integers(N_CLASSES, size=N_ROWS)
    targets[::17] = -100
    return logits, targets


def read(source, block=7):
    """Return all of an array, read a few rows at a time, and not in order."""
    whole_numbers = source.dtype.kind in "iub" and not source.bfloat16
    n_axes = len(source.shape) - (len(source.shape) > 1 and not whole_numbers)
    n_rows = int(np.prod(source.shape[:n_axes], dtype=int))
    whole = np.empty((n_rows, *source.shape[n_axes:]), source.dtype)
    with open_source(source) as reader:
        starts = list(range(0, n_rows, block))
        for first in starts[::2] + starts[1::2]:
            reader.read_into(first, whole[first : first + block])
    return whole.reshape(source.shape)


def arrays(path, block=7):
    return {source.name: read(source, block) for source in sources_of(path)}


# safetensors


def test_safetensors_of_every_dtype(tmp_path):
    rng = np.random.default_rng(1)
    given = {d: rng.integers(2, size=40).astype(d) for d in READABLE}
    given["two axes"] = rng.standard_normal((6, 5))
    given["bfloat16"] = rng.standard_normal((6, 5)).astype(ml_dtypes.bfloat16)
    given["none"] = np.empty((0, 5), np.float16)
    safetensors.numpy.save_file(given, tmp_path / "x.safetensors", metadata={"a": "b"})
    found = arrays(tmp_path / "x.safetensors")
    assert set(found) == set(given)
    for name, array in given.items():
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].shape == array.shape
    (bits,) = find(f"{tmp_path}/x.safetensors::bfloat16", "logits")
    assert bits.dtype_name == "bfloat16"


# llama.cpp's .kld


def kld_file(n_ctx, n_vocab, chunks):
    """Return a file by its layout: chunks of (tokens, rows of (scale, minimum, q))."""
    content = b"_logits_" + struct.pack("<iii", n_ctx, n_vocab, len(chunks))
    content += b"".join(struct.pack(f"<{n_ctx}i", *tokens) for tokens, _ in chunks)
    for _, chunk_rows in chunks:
        for scale, minimum, q in chunk_rows:
            content += struct.pack(f"<ff{n_vocab}H", scale, minimum, *q) + bytes(2 * (n_vocab % 2))
    return content


def kld_chunks(rng, n_ctx, n_vocab, n_chunk):
    return [
        (
            rng.integers(n_vocab, size=n_ctx).tolist(),
            [
                (rng.random() * 1e-4, -20 * rng.random(), rng.integers(65_536, size=n_vocab).tolist())
                for _ in range(n_ctx - 1 - n_ctx // 2)
            ],
        )
        for _ in range(n_chunk)
    ]


def decoded(content):
    """Return log-probabilities and labels one by one, from the bytes."""
    n_ctx, n_vocab, n_chunk = struct.unpack_from("<iii", content, 8)
    tokens = struct.unpack_from(f"<{n_chunk * n_ctx}i", content, 20)
    at, out, labels = 20 + 4 * n_chunk * n_ctx, [], []
    for c in range(n_chunk):
        for r in range(n_ctx - 1 - n_ctx // 2):
            scale, minimum = np.frombuffer(content, "<f4", 2, at)
            q = np.frombuffer(content, "<u2", n_vocab, at + 8)
            out.append([np.float32(np.float32(scale * np.float32(k)) + minimum) for k in q])
            labels.append(tokens[c * n_ctx + n_ctx // 2 + r + 1])
            at += 2 * (2 * ((n_vocab + 1) // 2) + 4)
    assert at == len(content)
    return np.array(out), labels


@pytest.mark.parametrize(
    ("n_ctx", "n_vocab", "n_chunk"), [(3, 1, 4), (8, 5, 3), (9, 6, 2), (64, 9_001, 2)]
)
def test_kld_is_read_as_it_is_laid_out(tmp_path, n_ctx, n_vocab, n_chunk):
    content = kld_file(
        n_ctx, n_vocab, kld_chunks(np.random.default_rng(n_ctx), n_ctx, n_vocab, n_chunk)
    )
    (tmp_path / "x.kld").write_bytes(content)
    found = arrays(tmp_path / "x.kld")
    expected, labels = decoded(content)
    assert found["logprobs"].dtype == np.float32
    np.testing.assert_array_equal(found["logprobs"], expected)
    assert found["targets"].tolist() == labels
    (x,) = find(tmp_path / "x.kld", "logits")
    assert (x.name, x.kind, x.note) == ("logprobs", "logprobs", None)
    assert [y.name for y in find(tmp_path / "x.kld", "targets")] == ["targets"]


def test_kld_of_a_killed_run_has_its_whole_chunks(tmp_path):
    chunks = kld_chunks(np.random.default_rng(3), 8, 5, 4)
    content = kld_file(8, 5, chunks)
    chunk_bytes = 3 * (8 + 2 * 6)
    whole, labels = decoded(content)
    for missing, n in (
        (1, 3),
        (chunk_bytes, 3),
        (chunk_bytes + 1, 2),
        (4 * chunk_bytes - chunk_bytes, 1),
    ):
        (tmp_path / "x.kld").write_bytes(content[:-missing])
        x, y = sources_of(tmp_path / "x.kld")
        assert x.note == y.note == f"truncated: {n} of 4 chunks {'is' if n == 1 else 'are'} whole"
        np.testing.assert_array_equal(read(x), whole[: 3 * n])
        assert read(y).tolist() == labels[: 3 * n]


def write_kld(path, x, y, kind="logits", block=100):
    with path.open("xb") as file:
        writer = KldWriter(file, x.shape, kind)
        for i in range(0, len(x), block):
            writer.write(x[i : i + block], y[i : i + block])


@pytest.mark.parametrize("kind", ["logits", "logprobs", "probs"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_kld_that_is_written_is_off_by_half_a_step(tmp_path, rows, dtype, kind):
    log_probs = scipy.special.log_softmax(3 * rows[0].astype(np.float64), axis=1)
    given = {"logits": 3.0 * rows[0], "logprobs": log_probs, "probs": np.exp(log_probs)}[kind]
    given = given.astype(dtype)
    exact = given.astype(np.float64)
    if kind == "probs":
        with np.errstate(divide="ignore"):
            exact = np.log(exact)
    elif kind == "logits":
        exact = scipy.special.log_softmax(exact, axis=1)
    exact = np.maximum(exact, exact.max(axis=1, keepdims=True) - 16)
    bits = given.view(np.uint16) if dtype == ml_dtypes.bfloat16 else given
    write_kld(tmp_path / "x.kld", bits, rows[1], kind)
    found, labels = decoded((tmp_path / "x.kld").read_bytes())
    assert labels == rows[1].tolist()
    step = (exact.max(axis=1) - exact.min(axis=1)) / 65_535
    # half a step, and what rounding of scale * q and of the minimum adds to it
    assert (abs(found - exact).max(axis=1) <= step / 2 + 4e-6).all()
    assert (exact.min() - exact.max(axis=1)).min() == pytest.approx(-16, abs=3)


def test_kld_written_twice_is_the_same(tmp_path, rows):
    write_kld(tmp_path / "a.kld", *rows)
    x, y = arrays(tmp_path / "a.kld").values()
    write_kld(tmp_path / "b.kld", x, y, "logprobs", block=13)
    again = arrays(tmp_path / "b.kld")["logprobs"]
    # the second scale is that of the first one's rounded ends
    np.testing.assert_allclose(again, x, rtol=0, atol=1e-5)
    assert (abs(again - x) < 2e-6).mean() > 0.9


def test_kld_of_rows_that_are_no_distributions(tmp_path):
    inf = np.inf
    x = np.array([[np.nan, 0, 1], [inf, 0, 1], [-inf] * 3, [-inf, 0, -inf], [2, 2, 2]], np.float32)
    write_kld(tmp_path / "x.kld", x, np.zeros(5, int))
    found = decoded((tmp_path / "x.kld").read_bytes())[0]
    assert np.isnan(found[:3]).all()
    np.testing.assert_allclose(found[3], [-16, 0, -16], atol=1e-5)
    np.testing.assert_allclose(found[4], -np.log(3), rtol=1e-6)


def test_kld_writer_says_what_it_cannot_hold(tmp_path):
    with (tmp_path / "x").open("xb") as file:
        for shape in ((0, 5), (2**30, 5), (5, 0), (5, 2**31)):
            with pytest.raises(ValueError, match="shape: expected 1 to 1073741822 rows"):
                KldWriter(file, shape)
        writer = KldWriter(file, (2, 3))
        with pytest.raises(ValueError, match="targets: expected int32, got 4294967296 in row 1"):
            writer.write(np.zeros((2, 3)), np.array([0, 2**32]))


# .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_every_dtype(tmp_path, save):
    rng = np.random.default_rng(1)
    given = {d: rng.integers(2, size=40).astype(d) for d in READABLE}
    given["two/axes"] = rng.standard_normal((6, 5)).astype(">f4")
    given["bfloat16"] = rng.standard_normal((6, 5)).astype(ml_dtypes.bfloat16)
    given["none"] = np.empty((0, 5), np.float16)
    given["large"] = rng.integers(5, size=(1_000, 200)).astype(np.float64)
    save(tmp_path / "x.npz", **given)
    found = arrays(tmp_path / "x.npz")
    assert set(found) == set(given)
    for name, array in given.items():
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].shape == array.shape
    (bits,) = find(f"{tmp_path}/x.npz::bfl*", "logits")
    assert bits.dtype_name == "bfloat16"


# Hostile files


def tensors(header, data=bytes(24), length=None):
    """Return a .safetensors file of a header, given as text or as what JSON makes text of."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def zipped(*members, change=None):
    """Return a zip file of (name, content, compression), its bytes perhaps changed."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as file:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content, compression in members:
            file.writestr(name, content, compression)
    return stream.getvalue() if change is None else change(stream.getvalue())


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def with_field(content, signature, offset, value):
    """Return bytes with a number put at an offset behind the last of a signature."""
    at = content.rindex(signature) + offset
    return content[:at] + value + content[at + len(value) :]


X = np.zeros((2, 3), np.float32)
NPY = npy_bytes(X)
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
HUGE_NPY = NPY.replace(b"(2, 3), }" + b" " * 12, b"(2000000000, 3), }   ")
DIRECTORY, DIRECTORY_END, LOCAL = b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"
KLD = kld_file(8, 5, kld_chunks(np.random.default_rng(3), 8, 5, 2))

HOSTILE = {
    # .safetensors
    "st empty": (".safetensors", b"", "expected a .safetensors file"),
    "st not an object": (".safetensors", tensors(b"[1]"), "expected a .safetensors file"),
    "st blank first": (".safetensors", tensors(b" {}"), "expected a .safetensors file"),
    "st of 2**63": (".safetensors", tensors({}, length=2**63), "at most 1048576 bytes"),
    "st header cut": (".safetensors", tensors({}, length=100), "header of 100 bytes.*truncated"),
    "st no length": (".safetensors", b"\1\0\0", "expected a .safetensors file"),
    "st not JSON": (".safetensors", tensors(b"{x}"), "valid .safetensors header"),
    "st not UTF-8": (".safetensors", tensors(b'{"\xff": 1}'), "valid .safetensors header"),
    "st nested": (".safetensors", tensors(b'{"x":' * 100_000), "valid .safetensors header"),
    "st long number": (".safetensors", tensors(b'{"x":' + b"9" * 9_999 + b"}"), "valid .safetensors"),
    "st twice": (".safetensors", tensors(b'{"x": 1, "x": 2}'), "a key is there twice"),
    "st key twice": (".safetensors", tensors(b'{"x": {"dtype": "F32", "dtype": "F64"}}'), "twice"),
    "st many": (".safetensors", tensors({str(i): 0 for i in range(10_001)}), "at most 10000 tensors"),
    "st no entry": (".safetensors", tensors({"x": 3}), "expected dtype, shape and data_offsets"),
    "st more fields": (".safetensors", tensors({"x": tensor() | {"y": 1}}), "got {'dtype'"),
    "st dtype": (".safetensors", tensors({"x": tensor("F33")}), "known dtype of tensor 'x', got 'F33'"),
    "st negative": (".safetensors", tensors({"x": tensor(shape=(-2, -3))}), "expected dtype, shape"),
    "st float": (".safetensors", tensors({"x": tensor(shape=(2.0, 3))}), "expected dtype, shape"),
    "st bool": (
        ".safetensors",
        tensors({"x": tensor("BOOL", (True,), (0, 1))}),
        "expected dtype, shape",
    ),
    "st axes": (".safetensors", tensors({"x": tensor(shape=[1] * 65)}), "expected dtype, shape"),
    "st shape": (
        ".safetensors",
        tensors({"x": tensor(shape=(2**62, 3))}),
        r"got data_offsets \[0, 24\]",
    ),
    "st hole": (".safetensors", tensors({"x": tensor(offsets=(8, 32))}, bytes(32)), "hole of 8 bytes"),
    "st overlap": (
        ".safetensors",
        tensors({"x": tensor(), "y": tensor(offsets=(20, 44))}, bytes(44)),
        "'y', which overlaps another",
    ),
    "st truncated": (".safetensors", tensors({"x": tensor()}, bytes(23)), "truncated"),
    "st trailing": (".safetensors", tensors({"x": tensor()}, bytes(25)), "trailing bytes"),
    "st huge": (
        ".safetensors",
        tensors({"x": tensor(shape=(2**40, 3), offsets=(0, 12 * 2**40))}),
        "trunc",
    ),
    "st escape": (".safetensors", tensors({"\x1b[2J": tensor()}), "printable characters"),
    "st no dtype of ours": (".safetensors", tensors({"x": tensor("F8_E5M2", (24,))}), "got none"),
    # .kld
    "kld empty": (".kld", b"", "expected a file of llama-perplexity"),
    "kld header": (".kld", KLD[:19], "expected a file of llama-perplexity"),
    "kld other": (".kld", b"GGUF" + KLD[4:], "expected a file of llama-perplexity"),
    "kld no chunk": (".kld", KLD[:-70], "truncated, no chunk is whole"),
    "kld tokens": (".kld", KLD[:50], "truncated, no chunk is whole"),
    "kld trailing": (".kld", KLD + b"\0\0", "trailing bytes"),
    "kld n_ctx": (".kld", KLD[:8] + struct.pack("<i", 2) + KLD[12:], "n_ctx of at least 3"),
    "kld n_vocab": (".kld", KLD[:12] + struct.pack("<i", -5) + KLD[16:], "got 8, -5 and 2"),
    "kld n_chunk": (".kld", KLD[:16] + struct.pack("<i", 0) + KLD[20:], "got 8, 5 and 0"),
    "kld huge": (".kld", KLD[:8] + struct.pack("<iii", *[2**31 - 1] * 3) + KLD[20:], "truncated"),
    # .npz
    "npz empty": (".npz", b"", "expected a valid zip file"),
    "npz cut": (".npz", zipped(("x.npy", NPY, STORED))[:-5], "expected a valid zip file"),
    "npz nothing": (".npz", zipped(), "got none"),
    "npz other": (".npz", zipped(("x.txt", NPY, STORED)), "got none"),
    "npz twice": (".npz", zipped(*[("x.npy", NPY, STORED)] * 2), "of different names"),
    "npz many": (".npz", zipped(*[(f"{i}", b"", STORED) for i in range(10_001)]), "10000 members"),
    "npz upwards": (".npz", zipped(("../x.npy", NPY, STORED)), "expected names inside the file"),
    "npz absolute": (".npz", zipped(("/x.npy", NPY, STORED)), "expected names inside the file"),
    "npz bzip2": (".npz", zipped(("x.npy", NPY, zipfile.ZIP_BZIP2)), "stored or deflated"),
    "npz encrypted": (
        ".npz",
        zipped(("x.npy", NPY, STORED), change=lambda c: with_field(c, DIRECTORY, 8, b"\1")),
        "not encrypted",
    ),
    "npz no npy": (".npz", zipped(("x.npy", b"GIF89a", STORED)), "::x: expected a .npy file"),
    "npz objects": (
        ".npz",
        zipped(("x.npy", npy_bytes(X).replace(b"'<f4'", b"'|O' "), STORED)),
        "pickled",
    ),
    "npz huge shape": (".npz", zipped(("x.npy", HUGE_NPY, DEFLATED)), "2000000000.*truncated"),
    "npz ratio": (
        ".npz",
        zipped(
            ("x.npy", HUGE_NPY, DEFLATED),
            change=lambda c: with_field(c, DIRECTORY, 24, struct.pack("<I", 2**32 - 2)),
        ),
        "at most 1032 times",
    ),
    "npz stored longer": (
        ".npz",
        zipped(
            ("x.npy", NPY, STORED),
            change=lambda c: with_field(c, DIRECTORY, 20, struct.pack("<II", 2**31, 2**31)),
        ),
        "members of at most",
    ),
    "npz directory": (
        ".npz",
        zipped(
            ("x.npy", NPY, STORED),
            change=lambda c: with_field(c, DIRECTORY_END, 12, struct.pack("<I", 2**32 - 2)),
        ),
        "expected a valid zip file",
    ),
    "npz other local name": (
        ".npz",
        zipped(("x.npy", NPY, STORED), change=lambda c: with_field(c, LOCAL, 30, b"y")),
        "expected a valid member",
    ),
    "npz not deflated": (
        ".npz",
        zipped(("x.npy", NPY, DEFLATED), change=lambda c: with_field(c, LOCAL, 35, b"\xff" * 9)),
        "expected a valid member",
    ),
}


def refusal(path):
    """Return the message, the seconds and the bytes it took to refuse a file."""
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        find(path, "logits")
    seconds = time.perf_counter() - started
    tracemalloc.start()
    with pytest.raises(InputError):
        find(path, "logits")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return str(caught.value), seconds, peak


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name_at_once_and_in_little_memory(tmp_path, case):
    suffix, content, message = HOSTILE[case]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    said, seconds, peak = refusal(path)
    assert re.search(message, said)
    assert said.startswith(str(path))
    assert len(said) < 1_000
    assert seconds < 1
    assert peak < 2**24


def test_npz_of_a_wrong_checksum_or_end_is_refused_when_it_is_read(tmp_path):
    noise = np.random.default_rng(1).standard_normal((500, 40))
    good = zipped(("x.npy", npy_bytes(noise), DEFLATED))
    crc = with_field(good, DIRECTORY, 16, bytes(4))
    (tmp_path / "x.npz").write_bytes(crc)
    (source,) = sources_of(tmp_path / "x.npz")
    with pytest.raises(
        InputError, match=r"x\.npz: expected a valid member, got one that fails: Bad CRC"
    ):
        read(source, block=500)


def damaged(rng, content):
    """Return a file with bits turned, a part cut, moved or repeated, or numbers made extreme."""
    content = bytearray(content)
    at, to = sorted(rng.integers(len(content) + 1, size=2).tolist())
    match rng.integers(10):
        case 0 | 5 | 6 | 7 | 8 | 9:
            for i in rng.integers(len(content), size=rng.integers(1, 4)):
                content[i] ^= 1 << int(rng.integers(8))
        case 1:
            del content[at:]
        case 2:
            del content[at:to]
        case 3:
            content[at:at] = content[at:to]
        case 4:
            extreme = [b"\xff", b"\x7f", b"\0", b"\x80"][rng.integers(4)]
            content[at : at + 8] = extreme * int(rng.integers(1, 9))
    return bytes(content)


def valid_files():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((12, 9)).astype(np.float32), rng.integers(9, size=12)
    packed, plain = io.BytesIO(), io.BytesIO()
    np.savez_compressed(packed, logits=x, targets=y)
    np.savez(plain, logits=x, targets=y)
    return {
        "npy": npy_bytes(x),
        "safetensors": safetensors.numpy.save({"logits": x, "targets": y}),
        "kld": kld_file(8, 5, kld_chunks(rng, 8, 5, 2)),
        "npz": packed.getvalue(),
        "NPZ": plain.getvalue(),
    }


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "kld", "npz", "NPZ"])
def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path, suffix):
    """Where damage hits the header, by halves: else most of it would change numbers alone."""
    rng = np.random.default_rng(len(suffix))
    content = valid_files()[suffix]
    outcomes = Counter()
    tracemalloc.start()
    for i in range(400):
        n_head = 100 if i % 2 else len(content)
        path = tmp_path / f"{i}.{suffix}"
        path.write_bytes(damaged(rng, content[:n_head]) + content[n_head:])
        for role in ("logits", "targets"):
            try:
                for source in find(path, role):
                    read(source)
                outcomes["read"] += 1
            except InputError as error:
                outcomes["refused" if str(error).startswith(str(path)) else "unnamed"] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(outcomes["read"], outcomes["refused"]) > 30, outcomes
    assert not outcomes["unnamed"]
    assert peak < 2**24


# Arrow and Parquet


def fixed_lists(x):
    return pa.FixedSizeListArray.from_arrays(x.reshape(-1), x.shape[1])


def lists(x):
    return pa.ListArray.from_arrays(np.arange(0, x.size + 1, x.shape[1], dtype=np.int32), x.reshape(-1))


def large_lists(x):
    return pa.LargeListArray.from_arrays(np.arange(0, x.size + 1, x.shape[1]), x.reshape(-1))


def write_arrow(path, content, rows_at_once=100):
    if path.suffix == ".parquet":
        pq.write_table(content, path, row_group_size=rows_at_once)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, content.schema) as writer:
            writer.write_table(content, max_chunksize=rows_at_once)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
@pytest.mark.parametrize("make", [fixed_lists, lists, large_lists])
def test_arrow_columns_of_lists_and_numbers(tmp_path, rows, suffix, make):
    logits, targets = rows
    content = {"x": make(logits), "half": make(logits.astype(np.float16)), "wide": make(logits * 1.5)}
    content |= {d: (np.arange(N_ROWS) % 2).astype(d) for d in READABLE}
    content |= {"text": ["a"] * N_ROWS, "targets": targets}
    path = tmp_path / f"x.{suffix}"
    write_arrow(path, pa.table(content))
    found = arrays(path)
    assert set(found) == set(content) - {"text"}
    np.testing.assert_array_equal(found["x"], logits)
    np.testing.assert_array_equal(found["half"], logits.astype(np.float16))
    np.testing.assert_array_equal(found["wide"], logits * 1.5)
    np.testing.assert_array_equal(found["targets"], targets)
    for d in READABLE:
        assert found[d].dtype == d
        np.testing.assert_array_equal(found[d], content[d])


def arrow_refusal(path, content):
    write_arrow(path, content)
    with pytest.raises(InputError) as caught:
        arrays(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_arrow_columns_that_are_no_arrays(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    gap = pa.array([[1.0, 2.0]] * 150 + [None])
    assert "nulls, where numbers are expected" in arrow_refusal(path, pa.table({"x": gap}))
    gap = pa.array([[1.0, 2.0]] * 150 + [[None, 1.0]])
    assert "nulls, where numbers are expected" in arrow_refusal(path, pa.table({"x": gap}))
    ragged = pa.array([[1.0, 2.0]] * 150 + [[1.0]])
    said = arrow_refusal(path, pa.table({"x": ragged}))
    assert "x: expected rows of 2 numbers, got 1 in row 150" in said
    assert "nulls" in arrow_refusal(path, pa.table({"y": pa.array([1, None])}))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="expected a valid Arrow or Parquet file"):
        sources_of(path)


def test_arrow_compressed(tmp_path, rows):
    feather.write_feather(
        pa.table({"x": fixed_lists(rows[0])}), tmp_path / "x.feather", compression="zstd"
    )
    np.testing.assert_array_equal(arrays(tmp_path / "x.feather")["x"], rows[0])


def test_arrow_of_no_rows(tmp_path):
    write_arrow(tmp_path / "x.arrow", pa.table({"x": fixed_lists(np.empty((0, 3)))}))
    (source,) = sources_of(tmp_path / "x.arrow")
    assert source.shape == (0, 3)


# HDF5, Zarr, torch


def arrays_of_science(rng):
    given = {d: rng.integers(2, size=40).astype(d) for d in READABLE}
    given["two"] = rng.standard_normal((60, 5)).astype(np.float32)
    given["three"] = rng.standard_normal((7, 9, 5))
    given["whole/numbers"] = rng.integers(9, size=(7, 9))
    return given


def write_hdf5(path, given, **options):
    with h5py.File(path, "w") as file:
        for name, array in given.items():
            file.create_dataset(name, data=array, **options)


@pytest.mark.parametrize("options", [{}, {"chunks": True, "compression": "gzip"}])
def test_hdf5_of_every_dtype(tmp_path, options):
    given = arrays_of_science(np.random.default_rng(1))
    write_hdf5(tmp_path / "x.h5", given, **options)
    for block in (7, 25):
        assert_same(arrays(tmp_path / "x.h5", block), given)


def assert_same(found, given):
    assert set(found) == set(given)
    for name, array in given.items():
        assert found[name].dtype.name == array.dtype.name
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.astype(found[name].dtype).tobytes(), name


def test_hdf5_that_is_not_what_it_says(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (2**40, 5), "f4", chunks=(10, 5))
    said, seconds, _ = refusal(path)
    assert "expected an array of at most 1032 times" in said
    assert seconds < 1
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (100, 5), "f4", chunks=(10, 5))[:50] = 1
    assert "expected 10 chunks, got 5: some were never written" in refusal(path)[0]
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (10, 5), "f4", external=[("other", 0, 200)])
    assert "got a link to other files" in refusal(path)[0]
    write_hdf5(path, {"x": X})
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path)[0].startswith(f"{path}: expected a valid HDF5 file")


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_of_every_dtype(tmp_path, version):
    given = arrays_of_science(np.random.default_rng(1))
    group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=version)
    for name, array in given.items():
        group.create_array(name, data=array, chunks=tuple(-(-n // 3) for n in array.shape))
    if version == 3:
        given["shards"] = np.arange(240.0).reshape(60, 4)
        group.create_array("shards", data=given["shards"], chunks=(5, 4), shards=(20, 4))
    for block in (7, 25):
        assert_same(arrays(tmp_path / "x.zarr", block), given)
    assert_same(arrays(tmp_path / "x.zarr" / "two"), {None: given["two"]})


def test_zarr_says_which_chunks_are_missing(tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", shape=(100, 5), chunks=(10, 5), dtype="f4")
    array[:40] = 1
    (source,) = find(tmp_path / "x.zarr", "logits")
    assert source.note == "6 of 10 chunks are not there and read as 0.0"
    np.testing.assert_array_equal(read(source), array[:])


def test_zarr_that_is_not_what_it_says(tmp_path):
    path = tmp_path / "x.zarr"
    zarr.create_array(path, shape=(2**40, 5), chunks=(10, 5), dtype="f4")
    said, seconds, _ = refusal(path)
    assert "expected an array of at most 1032 times" in said
    assert seconds < 1
    zarr.create_array(path, shape=(10, 5), chunks=(2**40, 5), dtype="f4", overwrite=True)
    assert "expected a chunk of at most 1032 times" in refusal(path)[0]
    (path / "zarr.json").write_text("{" + " " * 2**20)
    assert "metadata of at most 1048576 bytes" in refusal(path)[0]
    (path / "zarr.json").write_text("{")
    assert "expected a valid Zarr folder" in refusal(path)[0]
    (path / "zarr.json").unlink()
    metadata = {"zarr_format": 2, "shape": [4, 2], "chunks": [4, 2], "dtype": "<f4", "filters": None}
    metadata |= {"fill_value": 0, "order": "C", "compressor": {"id": "base64"}}
    (path / ".zarray").write_text(json.dumps(metadata))
    assert "expected codecs out of" in refusal(path)[0]
    os.mkfifo(path / "0.0")
    assert "expected files and folders alone" in refusal(path)[0]


def test_zarr_that_changes_is_refused(tmp_path):
    zarr.create_array(tmp_path / "x.zarr", data=X + 1)
    (source,) = find(tmp_path / "x.zarr", "logits")
    with pytest.raises(InputError, match="was changed while it was read"), open_source(source):
        (tmp_path / "x.zarr" / "c" / "0" / "0").write_bytes(b"")


def test_torch_of_every_dtype(tmp_path):
    given = arrays_of_science(np.random.default_rng(1))
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    torch.save(tensors | {"epoch": 3}, tmp_path / "x.pt")
    for block in (7, 25):
        assert_same(arrays(tmp_path / "x.pt", block), given)
    torch.save(tensors["two"].T.contiguous().T, tmp_path / "x.pth")
    assert_same(arrays(tmp_path / "x.pth"), {None: given["two"]})
    half = tensors["two"].bfloat16()
    torch.save(half, tmp_path / "x.pt")
    (source,) = find(tmp_path / "x.pt", "logits")
    assert source.dtype_name == "bfloat16"
    assert (read(source) == half.view(torch.uint16).numpy()).all()


class Unwanted:
    """Unpickles as a terabyte."""

    def __reduce__(self):
        return bytearray, (2**40,)


def test_torch_files_that_are_more_than_tensors(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(Unwanted(), path)
    assert "expected tensors alone, got '__builtin__ bytearray'" in refusal(path)[0]
    torch.save([torch.zeros(3)], path)
    assert "expected a tensor or a dict of tensors, got list" in refusal(path)[0]
    torch.save(torch.zeros(1).expand(2**40), path)
    assert "save tensor.contiguous()" in refusal(path)[0]
    torch.save(torch.zeros(9, 9), path, _use_new_zipfile_serialization=False)
    assert "expected a valid zip file" in refusal(path)[0]
    torch.save(torch.zeros(9, 9), path)
    path.write_bytes(path.read_bytes()[:-50])
    assert "expected a valid zip file" in refusal(path)[0]


# All of them: scored, and converted


def save_npz(path, x, y):
    np.savez_compressed(path, logits=x, targets=y)


def save_safetensors(path, x, y):
    safetensors.numpy.save_file({"logits": x, "targets": y}, path)


def save_arrow(path, x, y):
    write_arrow(path, pa.table({"logits": fixed_lists(x), "targets": y}))


def save_hdf5(path, x, y):
    write_hdf5(path, {"logits": x, "targets": y})


def save_zarr(path, x, y):
    group = zarr.open_group(path, mode="w")
    group.create_array("logits", data=x, chunks=(80, 10))
    group.create_array("targets", data=y)


def save_torch(path, x, y):
    torch.save({"logits": torch.from_numpy(x), "targets": torch.from_numpy(y)}, path)


SAVE = {
    "npz": save_npz,
    "safetensors": save_safetensors,
    "arrow": save_arrow,
    "parquet": save_arrow,
    "h5": save_hdf5,
    "zarr": save_zarr,
    "pt": save_torch,
}


def losses(folder, logits, targets):
    """Return the losses that are written, and figures."""
    figures = score_files(logits, targets, out=folder / "losses", block_mib=1)
    (path,) = (folder / "losses").glob("*.loss.npy")
    found = np.load(path)
    path.unlink()
    return found.tobytes(), figures.nll_sum, figures.standard_error, figures.top_k_accuracy


@pytest.fixture
def reference(tmp_path, rows):
    """Return the losses of the same rows in .npy files."""
    np.save(tmp_path / "logits.npy", rows[0])
    np.save(tmp_path / "targets.npy", rows[1])
    return losses(tmp_path, tmp_path / "logits.npy", tmp_path / "targets.npy")


@pytest.mark.parametrize("suffix", SAVE)
def test_losses_do_not_depend_on_the_format(tmp_path, rows, reference, suffix, monkeypatch):
    path = tmp_path / f"both.{suffix}"
    SAVE[suffix](path, *rows)
    monkeypatch.setattr("fastce.scoring.runner._MIB", 70 * 4 * N_CLASSES)  # blocks that fit no chunk
    assert losses(tmp_path, path, path) == reference
    assert losses(tmp_path, f"{path}::logits", f"{path}::tar*") == reference


@pytest.mark.parametrize("suffix", SAVE)
@pytest.mark.parametrize("target", ["npy", "safetensors", "arrow", "parquet"])
def test_convert_keeps_every_bit(tmp_path, rows, suffix, target):
    SAVE[suffix](tmp_path / f"both.{suffix}", *rows)
    written = convert(tmp_path / f"both.{suffix}", tmp_path / f"new.{target}")
    assert written[0] == tmp_path / f"new.{target}"
    if target == "npy":
        found = [np.load(path, allow_pickle=False) for path in written]
        assert written[1] == tmp_path / "new.targets.npy"
    elif target == "safetensors":
        found = list(safetensors.numpy.load_file(written[0]).values())
    else:
        read_table = pq.read_table if target == "parquet" else feather.read_table
        columns = read_table(written[0])
        assert columns.column_names == ["logits", "targets"]
        found = [np.array(columns["logits"].to_pylist(), np.float32), columns["targets"].to_numpy()]
    for array, given in zip(found, rows, strict=True):
        assert array.dtype == given.dtype
        np.testing.assert_array_equal(array, given)


@pytest.mark.parametrize("target", ["npy", "safetensors", "arrow", "parquet", "kld"])
def test_convert_of_kld(tmp_path, target):
    content = kld_file(64, 901, kld_chunks(np.random.default_rng(5), 64, 901, 3))
    (tmp_path / "base.kld").write_bytes(content)
    expected, labels = decoded(content)
    written = convert(tmp_path / "base.kld", tmp_path / f"new.{target}")
    if target == "npy":
        found = {"logprobs": np.load(written[0]), "targets": np.load(written[1])}
    else:
        found = arrays(written[0])
    assert found["targets"].tolist() == labels
    tolerance = 5.1e-5 if target == "kld" else 0  # half of the largest step, and rounding
    np.testing.assert_allclose(found["logprobs"], expected, rtol=0, atol=tolerance)
    if target != "npy":
        assert find(written[0], "logits")[0].kind == "logprobs"


def test_convert_to_kld_takes_targets_from_elsewhere(tmp_path, rows):
    np.save(tmp_path / "logits.npy", rows[0])
    np.save(tmp_path / "targets.npy", rows[1])
    (path,) = convert(tmp_path / "logits.npy", tmp_path / "x.kld", targets=tmp_path / "targets.npy")
    assert arrays(path)["targets"].tolist() == rows[1].tolist()
    floored = np.maximum(rows[0], rows[0].max(axis=1, keepdims=True) - 16).astype(float)
    kept = rows[1] != -100
    picked = scipy.special.log_softmax(floored, axis=1)[kept, rows[1][kept]]
    # each loss is off by up to half a step of 16 / 65535, to either side
    assert score_files(path, path).mean_nll == pytest.approx(-picked.mean(), abs=1e-5)
    with pytest.raises(InputError, match=r"logits\.npy: expected logits and their targets"):
        convert(tmp_path / "logits.npy", tmp_path / "y.kld")
    np.save(tmp_path / "wide.npy", rows[1] + 2**33)
    with pytest.raises(
        InputError, match=r"wide\.npy: cannot be written as \.kld: targets: expected int32"
    ):
        convert(tmp_path / "logits.npy", tmp_path / "y.kld", targets=tmp_path / "wide.npy")
    assert not list(tmp_path.glob("y.kld*"))


@pytest.mark.parametrize("target", ["npy", "safetensors"])
def test_convert_keeps_axes_and_dtypes(tmp_path, rows, target):
    x, y = rows[0][:300].reshape(20, 15, N_CLASSES), rows[1][:300].reshape(20, 15)
    given = {d: x.astype(d) for d in ("float16", "float32", "float64", ml_dtypes.bfloat16)}
    for source, array in given.items():
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            safetensors.numpy.save_file({"logits": array, "targets": y}, tmp_path / "x.safetensors")
            convert(tmp_path / "x.safetensors", tmp_path / f"new.{target}", dtype=dtype, block_mib=1)
            (found,) = find(tmp_path / f"new.{target}", "logits")
            expected = array.astype(np.float64).astype(getattr(ml_dtypes, dtype, dtype))
            assert found.dtype_name == dtype
            assert read(found).tobytes() == expected.tobytes(), source
            assert found.shape == x.shape


def test_convert_of_targets_alone(tmp_path, rows):
    np.save(tmp_path / "y.npy", rows[1])
    for target in ("safetensors", "parquet"):
        convert(tmp_path / "y.npy", tmp_path / f"y.{target}")
        np.testing.assert_array_equal(arrays(tmp_path / f"y.{target}")["targets"], rows[1])


def test_convert_says_what_it_cannot_do(tmp_path, rows):
    np.save(tmp_path / "x.npy", rows[0] * 1e5)
    np.save(tmp_path / "y.npy", rows[1][:-1])
    for target, options, message in [
        ("x.txt", {}, r"target: expected a name that ends in \.npy"),
        ("x.kld", {"dtype": "float32"}, "dtype: expected one of float16"),
        ("z.npy", {"dtype": "int8"}, "dtype: expected one of float16"),
        ("z.npy", {"block_mib": 0}, "block_mib: expected at least 1"),
        ("z.npy", {"dtype": "float16"}, r"x\.npy: expected numbers that float16 holds, got -695\d+"),
        ("z.npy", {"targets": tmp_path / "y.npy"}, r"y\.npy: expected one target for each row"),
        ("z.arrow", {"dtype": "bfloat16"}, r"x\.npy: expected a dtype that Arrow has"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "x.npy", tmp_path / target, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "y.npy"}


def test_convert_reads_a_block_at_a_time(tmp_path):
    x = np.zeros((20_000, 400), np.float32)
    np.save(tmp_path / "x.npy", x)
    for target in ("safetensors", "arrow", "npy"):
        tracemalloc.start()
        convert(tmp_path / "x.npy", tmp_path / f"y.{target}", block_mib=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < x.nbytes / 4


def test_convert_on_the_command_line(tmp_path, capsys):
    content = kld_file(64, 901, kld_chunks(np.random.default_rng(5), 64, 901, 3))
    (tmp_path / "base.kld").write_bytes(content[:-5])
    assert cli.main(["convert", f"{tmp_path}/base.kld", f"{tmp_path}/x.npy", "--dtype", "float16"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/x.npy\n{tmp_path}/x.targets.npy\n"
    assert "base.kld: truncated: 2 of 3 chunks are whole" in said.err
    assert np.load(tmp_path / "x.npy").dtype == np.float16
    assert cli.main(["convert", f"{tmp_path}/no.npy", f"{tmp_path}/x.npy"]) == 3
    assert cli.main(["convert", f"{tmp_path}/base.kld", f"{tmp_path}/x.txt"]) == 2


@pytest.mark.parametrize(
    ("module", "suffix", "install"),
    [
        ("pyarrow", "arrow", "'fastce[arrow]'"),
        ("h5py", "h5", "'fastce[hdf5]'"),
        ("zarr", "zarr", "'fastce[zarr]'"),
        ("torch", "pt", "torch"),
    ],
)
def test_a_missing_library_is_named(tmp_path, rows, monkeypatch, module, suffix, install):
    path = tmp_path / f"x.{suffix}"
    SAVE[suffix](path, *rows)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError) as caught:
        find(path, "logits")
    assert str(caught.value).startswith(f"{path}: needs {module}, which cannot be imported")
    assert str(caught.value).endswith(f"python -m pip install {install}")
