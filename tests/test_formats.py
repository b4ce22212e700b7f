"""Every format against files that others wrote, against hostile files, and against random damage."""

import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import scipy.special

from fastce.scoring import score_files
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


@pytest.fixture
def losses_of_npy(tmp_path, rows):
    """Return what scoring the same rows from .npy files gives."""
    np.save(tmp_path / "reference.npy", rows[0])
    np.save(tmp_path / "reference-targets.npy", rows[1])
    return losses(tmp_path / "reference.npy", tmp_path / "reference-targets.npy")


def losses(logits, targets):
    out = (logits.parent if hasattr(logits, "parent") else logits.partition("::")[0].parent) / "losses"
    score_files(logits, targets, out=out)
    (path,) = out.glob("*.loss.npy")
    found = np.load(path)
    path.unlink()
    return found


def read(source, block=7):
    """Return all of an array, read a few rows at a time, and not in order."""
    n_axes = 1 if source.dtype.kind in "iub" and not source.bfloat16 else len(source.shape) - 1
    n_rows = int(np.prod(source.shape[:n_axes], dtype=int))
    whole = np.empty((n_rows, *source.shape[n_axes:]), source.dtype)
    with open_source(source) as reader:
        starts = list(range(0, n_rows, block))
        for first in starts[::2] + starts[1::2]:
            reader.read_into(first, whole[first : first + block])
    return whole.reshape(source.shape)


def arrays(path):
    return {source.name: read(source) for source in sources_of(path)}


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
