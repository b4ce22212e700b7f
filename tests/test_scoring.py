"""Files in, figures out: the figures' definitions, the layouts accepted, and hostile input."""

import json
import math
import os
import struct

import numpy as np
import pytest

import fastce
from fastce.scoring import InputError, Progress, score_files

N_ROWS, N_CLASSES = 10_000, 7


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(5)
    logits = (4 * rng.standard_normal((N_ROWS, N_CLASSES))).astype(np.float32)
    targets = rng.integers(N_CLASSES, size=N_ROWS)
    targets[::17] = -100
    return logits, targets


@pytest.fixture
def dump(tmp_path, rows):
    """Two shards and one file of targets."""
    logits, targets = rows
    np.save(tmp_path / "logits-2.npy", logits[:6_001])
    np.save(tmp_path / "logits-10.npy", logits[6_001:])
    np.save(tmp_path / "targets.npy", targets)
    return tmp_path


def score(dump, **options):
    return score_files(dump / "logits-*.npy", dump / "targets.npy", **options)


def reference_losses(logits, targets):
    """Losses of the kept rows in plain Python."""
    losses = []
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        if target != -100:
            top = max(row)
            losses.append(math.log(math.fsum(math.exp(x - top) for x in row)) + top - row[target])
    return losses


def test_figures_are_what_their_definitions_say(dump, rows):
    logits, targets = rows
    figures = score(dump, n_bytes=30_000, top_k=(1, 3))
    losses = reference_losses(logits, targets)
    n, total = len(losses), math.fsum(losses)
    mean = total / n
    variance = math.fsum((x - mean) ** 2 for x in losses) / (n - 1)
    assert (figures.rows, figures.ignored, figures.nonfinite) == (N_ROWS, N_ROWS - n, 0)
    # The losses of float32 logits are float32: each is off by up to 3e-7 of itself.
    assert figures.nll_sum == pytest.approx(total, rel=1e-7)
    assert figures.mean_nll == pytest.approx(mean, rel=1e-7)
    assert figures.standard_error == pytest.approx(math.sqrt(variance / n), rel=1e-6)
    assert figures.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert figures.bits_per_token == pytest.approx(mean / math.log(2), rel=1e-7)
    assert figures.bits_per_byte == pytest.approx(total / 30_000 / math.log(2), rel=1e-7)
    kept = targets != -100
    order = np.argsort(-logits[kept], axis=1, kind="stable")
    for k in (1, 3):
        hits = (order[:, :k] == targets[kept][:, None]).any(axis=1)
        assert figures.top_k_accuracy[k] == hits.sum() / n


def test_sums_are_the_losses_correctly_rounded(dump, rows):
    figures = score(dump)
    losses = fastce.cross_entropy(*rows, reduction="none").tolist()
    assert figures.nll_sum == pytest.approx(math.fsum(losses), rel=1e-15)


def test_standard_error_does_not_cancel(tmp_path):
    # Losses near 1e9 that differ by 1: a difference of sums of squares would be noise.
    gaps = 1e9 + np.arange(5_000) % 2
    np.save(tmp_path / "x.npy", np.stack([np.zeros(5_000), -gaps], axis=1))
    np.save(tmp_path / "y.npy", np.ones(5_000, int))
    figures = score_files(tmp_path / "x.npy", tmp_path / "y.npy")
    assert figures.mean_nll == 1e9 + 0.5
    assert figures.standard_error == pytest.approx(math.sqrt(0.25 / 4_999), rel=1e-12)


@pytest.mark.parametrize("block_rows", [1_000, 4_097])
def test_block_size_changes_no_bit(tmp_path, dump, monkeypatch, block_rows):
    whole = score(dump, out=tmp_path / "whole")
    monkeypatch.setattr("fastce.scoring.runner._MIB", block_rows * N_CLASSES * 4)
    seen = []
    blocks = score(dump, out=tmp_path / "blocks", block_mib=1, progress=seen.append)
    assert len(seen) > 2
    assert blocks == whole
    for name in ("logits-2.loss.npy", "logits-10.loss.npy"):
        assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shards_with_targets_of_their_own(dump, rows):
    np.save(dump / "own-2.npy", rows[1][:6_001].astype(np.int16))
    np.save(dump / "own-10.npy", rows[1][6_001:].astype(">i4"))
    own = score_files(
        [dump / "logits-2.npy", str(dump / "logits-10.npy")],
        [dump / "own-2.npy", dump / "own-10.npy"],
    )
    one = score(dump)
    assert (own.nll_sum, own.standard_error) == (one.nll_sum, one.standard_error)
    assert [source.path for source in one.logits] == [
        str(dump / "logits-2.npy"),
        str(dump / "logits-10.npy"),
    ]


def test_three_axes_are_rows_and_losses_keep_them(tmp_path, rows):
    logits, targets = rows
    np.save(tmp_path / "x.npy", logits.reshape(100, 100, N_CLASSES))
    np.save(tmp_path / "y.npy", targets.reshape(100, 100))
    figures = score_files(tmp_path / "x.npy", tmp_path / "y.npy", out=tmp_path / "out")
    losses = np.load(tmp_path / "out" / "x.loss.npy")
    np.testing.assert_array_equal(
        losses, fastce.cross_entropy(logits, targets, reduction="none").reshape(100, 100)
    )
    assert figures.rows == N_ROWS
    np.save(tmp_path / "flat.npy", targets)
    assert score_files(tmp_path / "x.npy", tmp_path / "flat.npy").nll_sum == figures.nll_sum


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
def test_losses_written_are_those_of_the_library(tmp_path, rows, dtype):
    logits, targets = rows[0].astype(dtype), rows[1]
    np.save(tmp_path / "x.npy", logits)
    np.save(tmp_path / "y.npy", targets)
    score_files(tmp_path / "x.npy", tmp_path / "y.npy", out=tmp_path / "out")
    wide = logits.astype(np.float32) if logits.itemsize == 2 else logits
    losses = np.load(tmp_path / "out" / "x.loss.npy")
    expected = fastce.cross_entropy(wide, targets, reduction="none")
    assert losses.dtype == expected.dtype
    assert losses.tobytes() == expected.tobytes()


def test_out_holds_complete_files_alone(tmp_path, dump):
    figures = score(dump, out=tmp_path / "out", n_bytes=5)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "figures.json",
        "logits-10.loss.npy",
        "logits-2.loss.npy",
        "parts",
        "plan.json",
    ]
    document = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert document["schema_version"] == 2
    told = figures.as_dict()
    assert set(told.pop("run")) > set(document.pop("run")) == {"backend", "isa", "versions"}
    assert document == told
    assert document["figures"]["nll_sum"] == figures.nll_sum
    assert document["inputs"]["logits"][0]["shape"] == [6_001, N_CLASSES]
    assert document["inputs"]["targets"][0]["bytes"] == (dump / "targets.npy").stat().st_size
    assert figures.run.backend in [b.name for b in fastce.backends() if b.chosen]


def test_a_failed_run_leaves_no_losses(tmp_path, dump, rows):
    targets = rows[1].copy()
    targets[9_000] = 7
    np.save(dump / "targets.npy", targets)
    with pytest.raises(InputError):
        score(dump, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["parts", "plan.json"]
    assert len(os.listdir(tmp_path / "out" / "parts")) == 2  # of the first file: losses and record


def test_target_outside_names_file_row_and_value(dump, rows):
    targets = rows[1].copy()
    targets[6_001 + 40] = 50_257
    np.save(dump / "targets.npy", targets)
    with pytest.raises(InputError) as caught:
        score(dump)
    assert str(caught.value) == (
        f"{dump}/targets.npy: row 6041 = 50257 is outside [0, 7) (row 40 of {dump}/logits-10.npy); "
        "if it is padding, set the ignore index to 50257"
    )
    with pytest.raises(InputError, match="row 0 = -100 is outside"):
        score(dump, ignore_index=50_257)
    with pytest.raises(InputError, match="row 0 = -100 is outside"):
        score(dump, ignore_index=None)


def test_rows_that_are_not_finite_are_counted(tmp_path):
    x = np.array([[0.0, 1.0], [np.nan, 0.0], [np.nan, 0.0], [-np.inf, 0.0], [0.0, 0.0]])
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", [1, 1, -100, 0, 0])
    figures = score_files(tmp_path / "x.npy", tmp_path / "y.npy")
    assert (figures.rows, figures.ignored, figures.nonfinite) == (5, 1, 2)
    assert math.isnan(figures.mean_nll)
    assert figures.as_dict()["figures"]["mean_nll"] is None
    assert figures.top_k_accuracy[1] == 0.5
    assert figures.top_k_accuracy[5] == 0.75


@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_kept_row_has_no_mean(tmp_path, n_rows):
    np.save(tmp_path / "x.npy", np.full((n_rows, 2), np.nan))
    np.save(tmp_path / "y.npy", np.full(n_rows, -100))
    figures = score_files(tmp_path / "x.npy", tmp_path / "y.npy")
    assert (figures.rows, figures.ignored, figures.nll_sum) == (n_rows, n_rows, 0.0)
    assert math.isnan(figures.mean_nll)
    assert math.isnan(figures.standard_error)
    assert figures.as_dict()["figures"]["top_k_accuracy"] == {"1": None, "5": None}


def test_progress_tells_rows_bytes_and_mean(dump):
    seen = []
    figures = score(dump, progress=seen.append)
    assert all(isinstance(at, Progress) for at in seen)
    assert [at.rows_done for at in seen] == [6_001, N_ROWS]
    assert (seen[-1].rows_total, seen[-1].row_bytes) == (N_ROWS, 4 * N_CLASSES)
    assert seen[-1].mean_nll == pytest.approx(figures.mean_nll)


def header(descr="'<f4'", order="False", shape="(2, 3)", version=1, pad=0):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}{' ' * pad}\n".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text


DATA = bytes(24)
HOSTILE = {
    "truncated": (header() + DATA[:-1], "truncated"),
    "trailing bytes": (header() + DATA + b"x", "trailing bytes"),
    "huge shape": (header(shape=f"({2**62}, 3)"), "truncated"),
    "shape beyond int64": (header(shape=f"({2**64}, {2**64})"), "truncated"),
    "negative shape": (header(shape="(-2, -3)") + DATA, "negative"),
    "no class axis": (header(shape="(6,)") + DATA, r"\(n_rows, n_classes\)"),
    "no classes": (header(shape="(6, 0)"), r"\(n_rows, n_classes\)"),
    "four axes": (header(shape="(1, 1, 2, 3)") + DATA, r"\(n_rows, n_classes\)"),
    "objects": (header(descr="'|O'") + DATA, "pickled objects are never loaded"),
    "complex": (header(descr="'<c8'", shape="(3, 1)") + DATA, "expected logits of dtype float16"),
    "integers": (header(descr="'<i4'") + DATA, "expected logits of dtype float16"),
    "fields": (header(descr="[('a', '<f4')]") + DATA, "expected logits of dtype float16"),
    "subarray": (header(descr="('<f4', (3,))", shape="(2,)") + DATA, "expected"),
    "no such dtype": (header(descr="'<f5'") + DATA, "valid .npy header"),
    "Fortran order": (header(order="True") + DATA, "ascontiguousarray"),
    "header too long": (header(pad=10_001) + DATA, "at most 10000 bytes"),
    "header of 4 GB": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "at most 10000 bytes"),
    "header cut": (header()[:40], "valid .npy header"),
    "not a dict": (b"\x93NUMPY\x01\x00\x03\x00(1)" + DATA, "valid .npy header"),
    "nested": (b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000, "valid .npy header"),
    "Python 2": (header(shape="(2L, 3)") + DATA, "valid .npy header"),
    "code": (header(shape="(print(1), 3)") + DATA, "valid .npy header"),
    "version 9": (b"\x93NUMPY\x09\x00" + header()[8:] + DATA, "format 1.0, 2.0 or 3.0"),
    "not npy": (b"GIF89a" + DATA, "expected a .npy file"),
    "empty": (b"", "expected a .npy file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "x.npy").write_bytes(content)
    np.save(tmp_path / "y.npy", [0, 1])
    with pytest.raises(InputError, match=message) as caught:
        score_files(tmp_path / "x.npy", tmp_path / "y.npy")
    assert str(caught.value).startswith(f"{tmp_path / 'x.npy'}: ")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_header_versions(tmp_path, version):
    (tmp_path / "x.npy").write_bytes(header(version=version) + DATA)
    np.save(tmp_path / "y.npy", [0, 1])
    assert score_files(tmp_path / "x.npy", tmp_path / "y.npy").mean_nll == pytest.approx(math.log(3))


def test_files_that_are_not_there(tmp_path, dump):
    missing = tmp_path / "no.npy"
    with pytest.raises(InputError, match=r"no\.npy: cannot be read: No such file"):
        score_files(missing, dump / "targets.npy")
    with pytest.raises(InputError, match=r"no-\*\.npy: expected a pattern that matches"):
        score_files(tmp_path / "no-*.npy", dump / "targets.npy")
    with pytest.raises(InputError, match="expected a regular file"):
        score_files(tmp_path, dump / "targets.npy")


def test_shapes_must_agree(tmp_path, dump, rows):
    np.save(dump / "targets.npy", rows[1][:-1])
    with pytest.raises(InputError, match=r"expected targets of shape \(10000,\).*got \(9999,\)"):
        score(dump)
    np.save(tmp_path / "other.npy", np.zeros((2, N_CLASSES + 1), np.float32))
    with pytest.raises(InputError, match=r"other\.npy: expected float32 logits of 7 classes"):
        score_files([dump / "logits-2.npy", tmp_path / "other.npy"], dump / "targets.npy")
    np.save(dump / "targets.npy", rows[1].astype(float))
    with pytest.raises(InputError, match=r"targets\.npy: expected targets of dtype int8"):
        score(dump)


def test_options_are_checked(dump, tmp_path):
    for name, value in (("top_k", (1, 0)), ("n_bytes", 0), ("block_mib", 0), ("num_threads", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            score(dump, **{name: value})
    with pytest.raises(ValueError, match="targets: expected one file, or one for each of the 1"):
        score_files(dump / "logits-2.npy", [dump / "targets.npy"] * 2)


def test_files_of_one_name_in_several_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.zeros((1, 2)))
    np.save(tmp_path / "y.npy", [0, 1])
    score_files(tmp_path / "*" / "x.npy", tmp_path / "y.npy", out=tmp_path / "out")
    assert {"a_x.loss.npy", "b_x.loss.npy"} < set(os.listdir(tmp_path / "out"))


def test_a_file_changed_while_it_is_read_is_refused(dump):
    def touch(at):
        os.utime(dump / "logits-2.npy", ns=(1, 1))

    with pytest.raises(InputError, match=r"logits-2\.npy: was changed while it was read"):
        score(dump, progress=touch)
