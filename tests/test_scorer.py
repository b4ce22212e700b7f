"""The streaming scorer: its figures by their definitions, and the same bits as of files."""

import math
import pickle
from dataclasses import replace

import numpy as np
import plain
import pytest

import fastce
from fastce.scoring import Scorer, score_files

N_ROWS, N_CLASSES = 300, 9


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(11)
    logits = 3 * rng.standard_normal((N_ROWS, N_CLASSES))
    targets = rng.integers(N_CLASSES, size=N_ROWS)
    targets[::13] = -100
    return logits, targets


def of_kind(logits, kind):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = powers / powers.sum(axis=1, keepdims=True)
    return {"logits": logits, "probs": probs, "logprobs": np.log(probs)}[kind]


def figures_of(scorer, *batches):
    for x, y in batches:
        scorer.update(x, y)
    return scorer.figures()


@pytest.mark.parametrize("kind", ["logits", "logprobs", "probs"])
@pytest.mark.parametrize(("dtype", "rel"), [(np.float64, 1e-13), (np.float32, 2e-6)])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"vocab": 6}, {"n_bins": 4, "top_k": (2, 7, 1)}],
    ids=["plain", "temperature", "vocab", "bins"],
)
def test_figures_are_what_their_definitions_say(rows, kind, dtype, rel, options):
    x, y = of_kind(rows[0], kind).astype(dtype), rows[1].copy()
    if "vocab" in options:
        y[y >= 6] = 0
    found = figures_of(Scorer(kind=kind, **options), (x, y))
    expected = plain.figures(x, y, y != -100, kind=kind, **options)
    plain.assert_figures(found, expected, rel=rel)
    assert found.sequences is None
    assert found.positions == ()


def test_half_logits_and_bits_of_bfloat16(rows):
    x, y = rows[0].astype(np.float16), rows[1]
    wide = x.astype(np.float32)
    assert figures_of(Scorer(), (x, y)) == figures_of(Scorer(), (wide, y))
    bits = (wide.view(np.uint32) >> 16).astype(np.uint16)
    cut = (bits.astype(np.uint32) << 16).view(np.float32)
    for options in ({}, {"temperature": 3.0}, {"vocab": N_CLASSES}):
        found = figures_of(Scorer(dtype="bfloat16", **options), (bits, y))
        assert found == figures_of(Scorer(**options), (cut, y))


def test_mask_and_sequences(rows):
    x, y = rows[0].reshape(20, 15, N_CLASSES), rows[1].reshape(20, 15)
    mask = np.random.default_rng(1).integers(3, size=y.shape)
    mask[4] = 0  # a sequence of which nothing is kept
    scorer = Scorer()
    losses = scorer.update(x, y, mask=mask)
    kept = (mask != 0) & (y != -100)
    expected = plain.figures(rows[0], rows[1], kept.reshape(-1), starts=range(0, 301, 15))
    plain.assert_figures(scorer.figures(), expected, rel=1e-13)
    assert losses.shape == y.shape
    assert (losses[~kept] == 0).all()
    assert expected["sequences"] == 19
    as_ignored = Scorer()
    as_ignored.update(x, np.where(kept, y, -100))
    assert as_ignored.figures() == scorer.figures()


def test_a_mask_without_an_id_to_ignore(rows):
    x, y = rows[0], np.where(rows[1] == -100, N_CLASSES, rows[1])
    scorer = Scorer(ignore_index=None)
    scorer.update(x, y, mask=y < N_CLASSES)
    assert scorer.figures() == figures_of(Scorer(), rows)
    with pytest.raises(IndexError, match="targets"):
        scorer.update(x, y, mask=np.ones(N_ROWS))
    with pytest.raises(IndexError, match="targets"):
        scorer.update(x, y)
    assert scorer.figures() == figures_of(Scorer(), rows)  # what fails counts nothing


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_bits_however_cut_and_merged(tmp_path, rows, dtype, seed):
    x, y = (100.0 ** np.arange(-2, 1)).repeat(100)[:, None] * rows[0], rows[1]
    x = x.astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    rng = np.random.default_rng(seed)
    order = rng.permutation(N_ROWS)
    scorers = []
    for piece in np.split(order, np.sort(rng.integers(N_ROWS + 1, size=6))):
        scorers.append(Scorer())
        for batch in np.split(piece, np.sort(rng.integers(len(piece) + 1, size=2))):
            scorers[-1].update(x[batch], y[batch])
    while len(scorers) > 1:
        last = scorers.pop(rng.integers(len(scorers)))
        scorers[rng.integers(len(scorers))].merge(last)
    of_files = score_files(tmp_path / "x.npy", tmp_path / "y.npy")
    assert scorers[0].figures() == replace(of_files, logits=(), targets=(), options={})


@pytest.mark.parametrize("kind", ["logits", "logprobs", "probs"])
def test_the_same_bits_of_sequences_and_kinds(tmp_path, rows, kind):
    x, y = of_kind(rows[0], kind).reshape(30, 10, N_CLASSES), rows[1].reshape(30, 10)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    for options in ({}, {"temperature": 0.5}, {"top_k": (3,), "n_bins": 2}):
        of_files = score_files(tmp_path / "x.npy", tmp_path / "y.npy", kind=kind, **options)
        found = figures_of(Scorer(kind=kind, **options), (x[17:], y[17:]), (x[:17], y[:17]))
        assert found == replace(of_files, logits=(), targets=(), options={})
        assert found.sequences == 30


def test_losses_are_those_of_the_library(rows):
    for x in (rows[0], rows[0].astype(np.float32)):
        losses = Scorer().update(x, rows[1])
        expected = fastce.cross_entropy(x, rows[1], reduction="none")
        assert losses.dtype == expected.dtype
        assert losses.tobytes() == expected.tobytes()


def test_bytes_and_words(rows):
    scorer = Scorer()
    scorer.update(*rows)
    figures = scorer.figures(n_bytes=700, n_words=40)
    total = figures.nll_sum
    assert figures.bits_per_byte == pytest.approx(total / 700 / math.log(2), rel=1e-15)
    assert figures.byte_perplexity == pytest.approx(math.exp(total / 700), rel=1e-15)
    assert figures.word_perplexity == pytest.approx(math.exp(total / 40), rel=1e-15)
    assert scorer.figures().word_perplexity is None


def test_nothing_and_one_row():
    empty = Scorer()
    empty.update(np.empty((0, 3)), np.empty(0, int))
    empty.update(np.empty((0, 4, 3)), np.empty((0, 4), int))
    empty.update(np.empty((4, 0, 3)), np.empty((4, 0), int))
    figures = empty.figures()
    assert (figures.rows, figures.sequences, figures.nll_sum) == (0, 0, 0.0)
    assert math.isnan(figures.mean_nll)
    assert math.isnan(figures.mean_sequence_perplexity)
    empty.update(np.array([0.0, 0.0]), 1)
    assert empty.figures().mean_nll == math.log(2)
    assert math.isnan(empty.figures().standard_error)
    assert empty.figures().top_k_accuracy == {1: 0.0, 5: 1.0}


def test_numbers_of_any_size():
    """Losses beyond where their squares are floats, above and below, and those that no sum can hold."""
    large = figures_of(Scorer(), (np.array([[0, 1e200], [0, 3e200]]), [0, 0]))
    assert (large.mean_nll, large.perplexity) == (2e200, math.inf)
    assert large.standard_error == math.inf  # its square is beyond the largest float
    rows = np.array([[0, 1e154], [0, 1.5e154]])
    assert figures_of(Scorer(), (rows, [0, 0])).standard_error == pytest.approx(2.5e153, rel=1e-15)
    rows = np.array([[-1e-150, -500], [-3e-150, -500]])
    small = figures_of(Scorer(kind="logprobs"), (rows, [0, 0]))
    assert small.standard_error == pytest.approx(1e-150, rel=1e-15)
    beyond = figures_of(Scorer(), (np.array([[0, 1e308]] * 3), [0, 0, 0]))
    assert (beyond.nll_sum, beyond.mean_nll, beyond.standard_error) == (math.inf, 1e308, 0.0)
    infinite = figures_of(Scorer(), (np.array([[-math.inf, 0.0], [0.0, 0.0]]), [0, 0]))
    assert (infinite.nonfinite, infinite.mean_nll) == (1, math.inf)
    assert infinite.loss_histogram[80] == 1


def test_numbers_that_are_no_log_probabilities():
    """Negative losses: they count, and look as wrong as they are."""
    x = np.array([[3.0, 1.0], [math.inf, 0.0], [-0.5, -0.5]])
    figures = figures_of(Scorer(kind="logprobs"), (x[[0, 2]], [0, 0]))
    assert (figures.nll_sum, sum(figures.loss_histogram[:3])) == (-2.5, 2)
    assert figures_of(Scorer(kind="logprobs"), (x, [0, 0, 0])).nll_sum == -math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "odds"}, "kind: expected logits, logprobs or probs, got 'odds'"),
        ({"temperature": 0}, "temperature: expected a finite number above 0"),
        ({"temperature": math.inf}, "temperature: expected a finite number above 0"),
        ({"temperature": math.nan}, "temperature: expected a finite number above 0"),
        ({"top_k": (0,)}, "top_k: expected whole numbers of at least 1"),
        ({"vocab": 0}, "vocab: expected at least 1"),
        ({"n_bins": 0}, "n_bins: expected at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Scorer(**options)


def test_arguments_are_checked(rows):
    x, y = rows
    with pytest.raises(ValueError, match="vocab: expected at most the 9 classes, got 10"):
        Scorer(vocab=10).update(x, y)
    with pytest.raises(ValueError, match=r"mask: expected shape \(300,\)"):
        Scorer().update(x, y, mask=np.ones(299))
    with pytest.raises(TypeError, match="kind: expected probabilities"):
        Scorer(kind="probs", dtype="bfloat16").update(x.astype(np.uint16), y)
    for wrong in (y.astype(float), y > 0):
        for mask in (None, np.ones(N_ROWS)):
            with pytest.raises(TypeError, match="targets: expected integer class ids, got dtype"):
                Scorer().update(x, wrong, mask=mask)
    beyond = y.astype(np.uint64)  # -100 as uint64 is no class, and no -100
    for mask in (None, np.ones(N_ROWS)):
        with pytest.raises(IndexError, match="is outside"):
            Scorer().update(x, beyond, mask=mask)
    with pytest.raises(ValueError, match=r"p\[1, 2\] = -0\.5: expected a probability"):
        Scorer(kind="probs").update(np.array([[0.5, 0.5, 0], [1, 0.5, -0.5]]), [0, 0])


def test_merge_wants_the_same_options():
    for options in (
        {"n_bins": 3},
        {"top_k": (1,)},
        {"temperature": 2},
        {"kind": "probs"},
        {"vocab": 2},
    ):
        with pytest.raises(ValueError, match="other: expected a scorer of the same options"):
            Scorer().merge(Scorer(**options))


def test_pickle(rows):
    x, y = rows[0].reshape(30, 10, N_CLASSES), rows[1].reshape(30, 10)
    scorer = Scorer(top_k=(1, 2))
    scorer.update(x[:11], y[:11])
    copy = pickle.loads(pickle.dumps(scorer))
    assert copy.figures() == scorer.figures()
    copy.update(x[11:], y[11:])
    assert copy.figures() == figures_of(Scorer(top_k=(1, 2)), (x, y))
    assert copy.figures() != scorer.figures()
