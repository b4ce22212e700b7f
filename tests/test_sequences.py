"""Sequences, shift and mask in files, against plain NumPy on the whole arrays."""

import json
from itertools import pairwise

import numpy as np
import plain
import pytest
from runs import contents

from fastce.scoring import InputError, runner, score_files

N_CLASSES = 6
LENGTHS = [1, 9, 2, 30, 1, 1, 17, 5, 3, 11, 4, 12]  # 96 rows; the first four are 42
CUT = 42


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Parts of up to 10 rows, or of one longer sequence."""
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", 10 * N_CLASSES * 4)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(12)
    n_rows = sum(LENGTHS)
    logits = 3 * rng.standard_normal((n_rows, N_CLASSES))
    targets = rng.integers(N_CLASSES, size=n_rows)
    targets[[0, 5, 41, 42, 95]] = -100
    mask = rng.integers(4, size=n_rows)
    return logits.astype(np.float32), targets, mask


def shifted(y, starts):
    """Return the next row's values, and which rows have a next one in their sequence."""
    values, there = y.copy(), np.zeros(len(y), bool)
    for begin, end in pairwise(starts):
        for i in range(begin, end - 1):
            values[i], there[i] = y[i + 1], True
    return values, there


def expected_figures(rows, starts, *, shift, masked, known=True):
    x, y, mask = rows
    kept = y != -100
    if masked:
        kept &= mask != 0
    if shift:
        y, there = shifted(y, starts)
        kept = shifted(kept, starts)[0] & there
    return plain.figures(x, y, kept, starts=starts if known else None)


def write(folder, name, array, cuts=()):
    for i, piece in enumerate(np.split(array, cuts)):
        np.save(folder / f"{name}-{i}.npy", piece)
    return folder / f"{name}-*.npy"


LAYOUTS = ("none", "lengths", "seq_len", "three axes")


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("n_files", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_are_those_of_whole_arrays(tmp_path, rows, monkeypatch, layout, n_files, shift, masked):
    x, y, mask = rows
    cut = 48 if layout in ("seq_len", "three axes") else CUT
    cuts = [cut] if n_files == 2 else []
    if layout == "lengths":
        starts = [0, *np.cumsum(LENGTHS).tolist()]
        options = {"lengths": write(tmp_path, "lengths", np.array(LENGTHS, np.uint16))}
    elif layout == "none":
        starts, options = [0, *cuts, len(x)], {}
    else:
        starts = list(range(0, 97, 8))
        options = {"seq_len": 8} if layout == "seq_len" else {}
    shape = (-1, 8) if layout == "three axes" else (-1,)
    in_file = cut // 8 if layout == "three axes" else cut
    logits = write(tmp_path, "x", x.reshape(*shape, N_CLASSES), [in_file] if cuts else [])
    options |= {"mask": write(tmp_path, "mask", mask, cuts)} if masked else {}
    targets = write(tmp_path, "y", y)
    known = layout != "none" or shift
    expected = expected_figures(rows, starts, shift=shift, masked=masked, known=known)
    found = score_files(logits, targets, shift=shift, out=tmp_path / "out", **options)
    plain.assert_figures(found, expected, rel=2e-6)
    losses = [np.load(path).reshape(-1) for path in sorted((tmp_path / "out").glob("x-*.loss.npy"))]
    assert np.concatenate(losses).sum(dtype=np.float64) == pytest.approx(found.nll_sum, rel=1e-12)
    # Blocks of 3 rows cut sequences; nothing changes.
    monkeypatch.setattr(runner, "_MIB", 2 * 3 * N_CLASSES * 4)
    in_blocks = score_files(
        logits, targets, shift=shift, out=tmp_path / "blocks", block_mib=1, **options
    )
    assert in_blocks == found
    assert contents(tmp_path / "blocks") == contents(tmp_path / "out")


def test_parts_hold_whole_sequences(tmp_path, rows):
    logits, targets = write(tmp_path, "x", rows[0], [CUT]), write(tmp_path, "y", rows[1])
    lengths = write(tmp_path, "lengths", np.array(LENGTHS))
    score_files(logits, targets, lengths=lengths, out=tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [part["rows"] for part in plan["parts"]] == [10, 2, 30, 2, 17, 8, 11, 4, 12]
    assert [part["shard"] for part in plan["parts"]] == [0] * 3 + [1] * 6


@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", "u4", "<i8", ">i8", "u8", ">u8"])
@pytest.mark.parametrize("ignore_index", [None, 0, 3])
def test_dtypes_of_targets(tmp_path, rows, dtype, ignore_index):
    """With shift and mask, whose rows need an id of their own that unsigned targets cannot hold."""
    x, y, mask = rows
    y = np.where(y == -100, 0, y)
    logits, targets = write(tmp_path, "x", x), write(tmp_path, "y", y.astype(dtype))
    masks = write(tmp_path, "mask", (mask != 0))
    starts = list(range(0, 97, 12))
    values, there = shifted(y, starts)
    kept = (
        there
        & shifted(mask != 0, starts)[0]
        & (values != (-1 if ignore_index is None else ignore_index))
    )
    found = score_files(logits, targets, mask=masks, seq_len=12, shift=True, ignore_index=ignore_index)
    plain.assert_figures(found, plain.figures(x, values, kept, starts=starts), rel=2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_targets_beyond_int64_are_refused(tmp_path, rows, masked):
    y = np.where(rows[1] == -100, 0, rows[1]).astype(np.uint64)
    y[50] = 2**64 - 100
    logits, targets = write(tmp_path, "x", rows[0]), write(tmp_path, "y", y)
    mask = write(tmp_path, "mask", np.arange(96) != 3)
    for shift in (False, True):
        with pytest.raises(
            InputError, match=rf"y-0\.npy: row 50 = .* is outside \[0, 6\) \(row {50 - shift} of"
        ):
            score_files(logits, targets, mask=mask if masked else None, shift=shift)


def test_targets_with_the_shape_of_sequences(tmp_path, rows):
    logits = write(tmp_path, "x", rows[0].reshape(12, 8, N_CLASSES), [5])
    flat = score_files(logits, write(tmp_path, "y", rows[1]), shift=True)
    both = score_files(logits, write(tmp_path, "z", rows[1].reshape(12, 8)), shift=True)
    own = score_files(logits, write(tmp_path, "own", rows[1].reshape(12, 8), [5]), shift=True)
    assert flat.nll_sum == both.nll_sum == own.nll_sum
    assert flat.positions == both.positions == own.positions


def test_what_is_wrong_with_sequences_is_told(tmp_path, rows):
    logits, targets = write(tmp_path, "x", rows[0], [CUT]), write(tmp_path, "y", rows[1])

    def refused(error, message, **options):
        with pytest.raises(error, match=message):
            score_files(logits, targets, **options)

    def lengths(*values):
        return write(tmp_path, "lengths", np.array(values))

    for n in (0, -1, 43, 96, 4):
        refused(ValueError, rf"seq_len: expected a length that divides .*, got {n}$", seq_len=n)
    refused(ValueError, "seq_len: expected this or lengths", seq_len=6, lengths=lengths(42, 54))
    refused(
        InputError, r"lengths-0\.npy: expected lengths of at least 1, .* got 0", lengths=lengths(96, 0)
    )
    refused(InputError, r"lengths-0\.npy: .* sum to the 96 rows, got 95", lengths=lengths(42, 53))
    refused(InputError, r"sequences that end where .*x-0\.npy does", lengths=lengths(43, 53))
    too_long = write(tmp_path, "large", np.array([2**63 + 42, 2**63 + 54], np.uint64))
    refused(InputError, r"large-0\.npy: expected lengths", lengths=too_long)
    wrapping = write(tmp_path, "wrapping", np.array([2**62] * 4 + [42, 54]))
    refused(InputError, r"wrapping-0\.npy: ", lengths=wrapping)


def test_one_file_of_targets_and_a_mask_for_each(tmp_path, rows):
    """And the other way round: each is read from its own rows on."""
    x, y, mask = rows
    logits = write(tmp_path, "x", x, [20, CUT])
    found = [
        score_files(
            logits, write(tmp_path, f"y{i}", y, cuts), mask=write(tmp_path, f"m{i}", mask, others)
        )
        for i, (cuts, others) in enumerate([([], [20, CUT]), ([20, CUT], []), ([], [])])
    ]
    expected = plain.figures(x, y, (y != -100) & (mask != 0))
    for figures in found:
        plain.assert_figures(figures, expected, rel=2e-6)


def test_lengths_in_several_files(tmp_path, rows):
    logits, targets = write(tmp_path, "x", rows[0], [CUT]), write(tmp_path, "y", rows[1])
    one = score_files(logits, targets, lengths=write(tmp_path, "one", np.array(LENGTHS)))
    several = score_files(logits, targets, lengths=write(tmp_path, "two", np.array(LENGTHS), [3]))
    assert one == several
    assert one.sequences == len(LENGTHS) - 2  # two of one row are ignored


def test_probabilities_that_are_none_name_the_file(tmp_path, rows):
    x = np.abs(rows[0])
    x[33, 2] = -0.25
    logits, targets = write(tmp_path, "x", x), write(tmp_path, "y", rows[1])
    with pytest.raises(InputError, match=r"x-0\.npy: rows from 30 on: p\[3, 2\] = -0\.25: expected"):
        score_files(logits, targets, kind="probs")
