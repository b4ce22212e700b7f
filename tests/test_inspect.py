"""What is in files: counts against NumPy's, guesses, samples, and what fits what."""

import json

import ml_dtypes
import numpy as np
import pytest
from scipy import special

import fastce
from fastce.cli import main
from fastce.scoring import InputError, inspect

N_ROWS, N_CLASSES = 600, 13


@pytest.fixture
def logits():
    return 3 * np.random.default_rng(8).standard_normal((N_ROWS, N_CLASSES)).astype(np.float32)


def inspected(folder, array, **options):
    np.save(folder / "a.npy", array)
    (found,) = fastce.inspect_files(folder / "a.npy", **options)
    return found


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", ml_dtypes.bfloat16])
def test_counts_are_those_of_numpy(tmp_path, logits, dtype):
    logits = logits.astype(dtype)
    logits[3, 4:7], logits[5, 1], logits[500, 2:12] = np.nan, np.inf, -np.inf
    found = inspected(tmp_path, logits)
    wide = logits.astype(np.float64)
    floats = found.floats
    assert (floats.nan, floats.posinf, floats.neginf) == (3, 1, 10)
    assert (floats.minimum, floats.maximum) == (
        wide[np.isfinite(wide)].min(),
        wide[np.isfinite(wide)].max(),
    )
    assert (floats.rows, floats.classes, floats.rows_read) == (N_ROWS, N_CLASSES, N_ROWS)
    assert found.dtype == np.dtype(dtype).newbyteorder("=").name
    assert (found.shape, found.is_sample, found.integers) == ((N_ROWS, N_CLASSES), False, None)
    assert found.file_bytes == (tmp_path / "a.npy").stat().st_size


def test_bfloat16_bits(tmp_path, logits):
    halves = logits.astype(ml_dtypes.bfloat16)
    found = inspected(tmp_path, halves.view(np.uint16), dtype="bfloat16")
    assert found.dtype == "bfloat16"
    assert found.floats.maximum == float(halves.max())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_kinds_are_guessed(tmp_path, logits, dtype):
    for kind, array, said in (
        ("logits", logits, "logits"),
        ("logits", logits - 100, "logits"),
        ("probs", special.softmax(logits, axis=1), "probabilities"),
        ("logprobs", special.log_softmax(logits, axis=1), "log-probabilities"),
    ):
        found = inspected(tmp_path, array.astype(dtype))
        assert found.floats.looks_like == kind
        assert found.looks_like == f"looks like {said}, {N_ROWS} rows of {N_CLASSES} columns"
    broken = special.softmax(logits, axis=1).astype(dtype)
    broken[0, 0] = np.nan
    assert inspected(tmp_path, broken).floats.looks_like == "probs"


def test_columns_never_used(tmp_path, logits):
    padded = np.concatenate([logits, np.full((N_ROWS, 3), -np.inf), np.full((N_ROWS, 1), 2.0)], axis=1)
    found = inspected(tmp_path, padded)
    assert found.floats.unused == 4
    assert found.looks_like.endswith(f"{N_CLASSES + 4} columns, the last 4 never used")
    padded[-1, -2] = 1.0  # used once, in the last row
    assert inspected(tmp_path, padded).looks_like.endswith("the last one never used")
    assert inspected(tmp_path, np.zeros((5, 3))).floats.unused == 0
    assert inspected(tmp_path, logits[:1]).floats.unused == 0


def test_columns_are_looked_at_in_all_blocks(tmp_path, logits, monkeypatch):
    monkeypatch.setattr(inspect, "_BLOCK_BYTES", 1_000)
    logits[:, -2:] = 0
    logits[-1, -1] = 1
    assert inspected(tmp_path, logits).floats.unused == 0
    logits[-1, -1] = 0
    assert inspected(tmp_path, logits).floats.unused == 2


def test_large_arrays_are_sampled_and_say_so(tmp_path, logits, monkeypatch):
    monkeypatch.setattr(inspect, "SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(inspect, "_BLOCK_BYTES", 1_000)
    logits[0, 0], logits[-1, 0], logits[N_ROWS // 2 - 25 : N_ROWS // 2 + 25] = 77, -99, np.nan
    sample = inspected(tmp_path, logits)
    assert sample.is_sample
    assert 0 < sample.floats.rows_read * N_CLASSES * 4 <= 10_000
    # Blocks are spread over the array: its start, its end and its middle are in the sample.
    assert (sample.floats.maximum, sample.floats.minimum) == (77, -99)
    assert sample.floats.nan > 0
    whole = inspected(tmp_path, logits, full=True)
    assert not whole.is_sample
    assert (whole.floats.rows_read, whole.floats.nan) == (N_ROWS, 50 * N_CLASSES)
    ids = inspected(tmp_path, np.arange(20_000))
    assert ids.is_sample
    assert (ids.integers.minimum, ids.integers.maximum) == (0, 19_999)


def test_the_estimate_is_of_the_whole_array(tmp_path, logits, monkeypatch):
    monkeypatch.setattr(inspect, "_rehearse", lambda *args: (2.0, "none"))
    monkeypatch.setattr(inspect, "SAMPLE_BYTES", 10_000)
    estimate = inspected(tmp_path, logits).floats.estimate
    assert (estimate.seconds, estimate.backend) == (2.0 * N_ROWS, "none")
    # Two blocks, of the whole array if it is small, and what is kept of their rows.
    assert 2 * logits.nbytes < estimate.memory_bytes < 2 * logits.nbytes + 200 * N_ROWS


def test_the_rehearsal_takes_the_backend_asked_for(tmp_path, logits, backend):
    estimate = inspected(tmp_path, logits, backend=backend, num_threads=1).floats.estimate
    assert estimate.backend == backend
    assert 0 < estimate.seconds < 10


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, ">i4"])
def test_integers(tmp_path, dtype):
    ids = np.random.default_rng(3).integers(90, size=(30, 20)).astype(dtype)
    signed = np.issubdtype(dtype, np.signedinteger)
    if signed:
        ids[::3] = -100
    kept = ids[ids != -100] if signed else ids
    integers = inspected(tmp_path, ids).integers
    assert (integers.size, integers.size_read) == (600, 600)
    assert integers.ignored == (200 if signed else 0)
    assert (integers.minimum, integers.maximum) == (kept.min(), kept.max())
    assert integers.distinct == len(set(kept.reshape(-1).tolist()))


def test_distinct_ids_are_counted_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "MAX_DISTINCT", 50)
    assert inspected(tmp_path, np.arange(49)).integers.distinct == 49
    assert inspected(tmp_path, np.arange(500)).integers.distinct == 50


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.arange(N_ROWS) % N_CLASSES, "fits {x}"),
        (np.where(np.arange(N_ROWS) % 2, -100, 12), "fits {x}"),
        (np.full(N_ROWS, -100), "fits {x}"),
        (np.arange(N_ROWS - 1) % 3, "does not fit {x}: 599 ids for 600 rows"),
        (np.full(N_ROWS, 13), "does not fit {x}: id 13 is outside [0, 13)"),
        (np.full(N_ROWS, -1), "does not fit {x}: id -1 is below 0 and not -100"),
    ],
)
def test_targets_beside_logits(tmp_path, logits, ids, said):
    np.save(tmp_path / "x.npy", logits)
    np.save(tmp_path / "y.npy", ids)
    found = fastce.inspect_files([tmp_path / "y.npy", tmp_path / "x.npy"])
    assert found[0].integers.fits == (said.format(x=tmp_path / "x.npy"),)


def test_targets_of_several_files_of_logits(tmp_path, logits):
    np.save(tmp_path / "x-1.npy", logits[:400])
    np.save(tmp_path / "x-2.npy", logits[400:])
    np.save(tmp_path / "y.npy", np.zeros(N_ROWS, int))
    found = fastce.inspect_files([tmp_path / "x-*.npy", tmp_path / "y.npy"])
    assert found[2].integers.fits == ("fits the 2 arrays of logits together",)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((0, 3)), "is empty: 0 rows of 3 columns"),
        (np.zeros((3, 0)), "is empty: 3 rows of 0 columns"),
        (np.zeros(5), "holds one number for each of 5 rows"),
        (np.array(2.0), "holds one number for each of 1 rows"),
        (np.zeros(0, int), "holds 0 integers"),
        (np.full(4, -100), "holds 4 integers, all of them -100"),
        (np.array([True, False]), "looks like a mask, or targets of two classes, for 2 rows"),
        (np.array([3, 8]), "looks like targets for 2 rows, of at least 9 classes"),
        (np.zeros(2, complex), "holds complex128, which is neither logits nor targets"),
        (np.full((2, 3), np.nan), "looks like logits, 2 rows of 3 columns"),
    ],
)
def test_odd_arrays(tmp_path, array, said):
    found = inspected(tmp_path, array)
    assert found.looks_like == said
    assert not found.is_sample
    json.dumps(found.as_dict(), allow_nan=False)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\x00")
    with pytest.raises(InputError) as caught:
        fastce.inspect_files(tmp_path / "a.npy")
    assert str(caught.value).startswith(f"{tmp_path / 'a.npy'}: ")
    np.save(tmp_path / "a.npy", [1])
    with pytest.raises(InputError, match=r"a\.npy: expected an array 'logits'"):
        fastce.inspect_files(f"{tmp_path / 'a.npy'}::logits")


def run(capsys, *argv):
    code = main(argv)
    return code, *capsys.readouterr()


def test_command_line(capsys, tmp_path, monkeypatch, logits):
    monkeypatch.chdir(tmp_path)
    logits[:, -2:] = 0
    np.save("x.npy", logits)
    np.save("y.npy", np.arange(N_ROWS) % 11)
    code, out, err = run(capsys, "inspect", "x.npy", "y.npy")
    assert (code, err) == (0, "")
    assert "x.npy looks like logits, 600 rows of 13 columns, the last 2 never used" in out
    assert "set vocab to 11" in out
    assert "estimated" in out
    assert "fits x.npy" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, err = run(capsys, "inspect", "*.npy", "--full", "-o", "json")
    assert (code, err) == (0, "")
    x, y = json.loads(out)["arrays"]
    assert (x["floats"]["unused"], y["integers"]["distinct"]) == (2, 11)
    monkeypatch.setattr(inspect, "SAMPLE_BYTES", 5_000)
    monkeypatch.setattr(inspect, "_BLOCK_BYTES", 1_000)
    assert "a sample:" in run(capsys, "inspect", "x.npy")[1]


def test_command_line_errors(capsys, tmp_path):
    assert run(capsys, "inspect", str(tmp_path / "no.npy"))[0] == 3
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    assert run(capsys, "inspect", str(tmp_path / "x.npy"), "--dtype", "int4")[0] == 2
    assert run(capsys, "inspect", str(tmp_path / "x.npy"), "--num-threads", "0")[0] == 2
