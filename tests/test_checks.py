"""What looks wrong: each trap is told, and sound inputs are not accused."""

import ml_dtypes
import numpy as np
import pytest

import fastce


@pytest.fixture
def rows():
    """Return 200 rows of 30 classes, by a model that is right most of the time."""
    rng = np.random.default_rng(7)
    targets = rng.integers(30, size=200)
    logits = rng.standard_normal((200, 30)).astype(np.float32)
    logits[np.arange(200), targets] += 6
    return logits, targets


def warnings_of(tmp_path, logits, targets, **options):
    np.save(tmp_path / "x.npy", logits)
    np.save(tmp_path / "y.npy", targets)
    return fastce.score_files(tmp_path / "x.npy", tmp_path / "y.npy", **options).warnings


def test_sound_inputs_are_not_accused(tmp_path, rows):
    x, y = rows
    assert warnings_of(tmp_path, x, y) == ()
    assert warnings_of(tmp_path, x.astype(np.float16), y) == ()
    assert warnings_of(tmp_path, x.astype(ml_dtypes.bfloat16), y) == ()
    assert warnings_of(tmp_path, fastce.log_softmax(x), y) == ()  # as logits they are the same
    assert warnings_of(tmp_path, fastce.log_softmax(x), y, kind="logprobs") == ()
    assert warnings_of(tmp_path, fastce.softmax(x), y, kind="probs") == ()
    assert warnings_of(tmp_path, x[:0], y[:0]) == ()
    assert warnings_of(tmp_path, x[:1], y[:1]) == ()
    assert warnings_of(tmp_path, np.zeros((50, 4)), np.zeros(50, int)) == ()
    assert warnings_of(tmp_path, np.full((50, 4), np.nan), np.zeros(50, int)) == ()


def test_probabilities_as_logits(tmp_path, rows):
    (said,) = warnings_of(tmp_path, fastce.softmax(rows[0]), rows[1])
    assert said.startswith("these look like probabilities, not logits")


def test_logits_as_something_else(tmp_path, rows):
    (said,) = warnings_of(tmp_path, rows[0], rows[1], kind="logprobs")
    assert "do not look like log-probabilities" in said
    with pytest.raises(ValueError, match="expected"):
        warnings_of(tmp_path, rows[0], rows[1], kind="probs")


@pytest.mark.parametrize("filler", [0.0, -np.inf, -1e4])
def test_a_padded_vocabulary(tmp_path, rows, filler):
    x = np.concatenate([rows[0], np.full((200, 18), filler, np.float32)], axis=1)
    (said,) = warnings_of(tmp_path, x, rows[1])
    assert "the last 18 of 48 classes are the same in every row" in said
    assert said.endswith("set vocab to 30")
    assert warnings_of(tmp_path, x, rows[1], vocab=30) == ()


def test_targets_off_by_one(tmp_path, rows):
    x, y = rows
    tokens = np.concatenate(([3], y[:-1]))  # each row's logits predict the next token
    (said,) = warnings_of(tmp_path, x, tokens)
    assert "targets look off by one: with the next row's" in said
    assert said.endswith("set shift")
    assert warnings_of(tmp_path, x, tokens, shift=True) == ()
    (said,) = warnings_of(tmp_path, x, np.concatenate((y[1:], [3])))
    assert "with the previous row's" in said


def test_ignored_rows_are_not_looked_at(tmp_path, rows):
    x, y = rows
    y = y.copy()
    y[::2] = -100
    assert warnings_of(tmp_path, x, y) == ()
    assert warnings_of(tmp_path, x, np.full(200, -100)) == ()
