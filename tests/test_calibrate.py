"""The temperature against an independent optimum, and where there is none."""

import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy import optimize, special

import fastce
from fastce import terminal
from fastce.cli import main
from fastce.scoring import CalibrateProgress, InputError, calibrate, calibrate_files

N_ROWS, N_CLASSES = 4_000, 11


@pytest.fixture(scope="module")
def rows():
    """Logits and targets drawn from their softmax."""
    rng = np.random.default_rng(11)
    logits = 2 * rng.standard_normal((N_ROWS, N_CLASSES))
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def found(folder, logits, targets, **options):
    np.save(folder / "x.npy", logits)
    np.save(folder / "y.npy", targets)
    return calibrate_files(folder / "x.npy", folder / "y.npy", **options)


def mean_nll(logits, targets, temperature):
    x = np.asarray(logits, np.float64) / temperature
    return float(np.mean(special.logsumexp(x, axis=1) - x[np.arange(len(x)), targets]))


def slope(logits, targets, temperature):
    """Return the derivative of the mean NLL by 1 / T: what the logits' mean is above the target's."""
    p = special.softmax(logits / temperature, axis=1)
    means = np.where(p > 0, p * np.where(p > 0, logits, 0), 0).sum(axis=1)
    return float(np.mean(means - logits[np.arange(len(logits)), targets]))


def best_temperature(logits, targets):
    scale = math.log(np.std(logits[np.isfinite(logits)]))
    root = optimize.brentq(
        lambda v: slope(logits, targets, math.exp(v)), scale - 6, scale + 6, xtol=1e-12, rtol=1e-12
    )
    return math.exp(root)


@pytest.mark.parametrize("scale", [1e-7, 0.01, 0.4, 1.0, 1.7, 5.0, 100.0, 1e6])
def test_temperature_is_the_independent_optimum(tmp_path, rows, scale):
    logits, targets = rows
    calibration = found(tmp_path, scale * logits, targets)
    assert calibration.status == "converged"
    expected = best_temperature(scale * logits, targets)
    assert calibration.temperature == pytest.approx(expected, rel=2e-6)
    assert calibration.before.mean_nll == pytest.approx(mean_nll(scale * logits, targets, 1), rel=1e-12)
    after = mean_nll(scale * logits, targets, calibration.temperature)
    assert calibration.after.mean_nll == pytest.approx(after, rel=1e-12)
    assert calibration.after.mean_nll == pytest.approx(calibration.after.mean_entropy, abs=1e-5)


def test_passes_are_few_where_temperatures_are_usual(tmp_path, rows):
    for scale in (0.5, 0.9, 1.0, 1.3, 2.0, 4.0):
        assert found(tmp_path, scale * rows[0], rows[1]).passes <= 8


def test_standard_error_is_that_of_maximum_likelihood(tmp_path, rows):
    logits, targets = 3 * rows[0], rows[1]
    calibration = found(tmp_path, logits, targets)
    p = special.softmax(logits / calibration.temperature, axis=1)
    x = logits / calibration.temperature
    variance = np.mean((p * x**2).sum(axis=1) - (p * x).sum(axis=1) ** 2)
    expected = calibration.temperature / math.sqrt(N_ROWS * variance)
    assert calibration.standard_error == pytest.approx(expected, rel=0.01)
    assert abs(calibration.temperature - 3) < 4 * calibration.standard_error


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_other_dtypes(tmp_path, rows, dtype):
    logits = (2.5 * rows[0]).astype(dtype)
    calibration = found(tmp_path, logits, rows[1])
    expected = best_temperature(logits.astype(np.float64), rows[1])
    # float32 arithmetic: losses are off by some 1e-7 of themselves, at random.
    assert calibration.temperature == pytest.approx(expected, rel=5e-6)


def test_bfloat16_bits(tmp_path, rows):
    logits = (2.5 * rows[0]).astype(ml_dtypes.bfloat16)
    bits = found(tmp_path, logits.view(np.uint16), rows[1], dtype="bfloat16")
    assert bits.temperature == found(tmp_path, logits, rows[1]).temperature


def test_masks_ignored_rows_and_vocab(tmp_path, rows):
    logits, targets = 2 * rows[0], rows[1].copy()
    kept = np.arange(N_ROWS) % 3 > 0
    expected = found(tmp_path, logits[kept], targets[kept])
    np.save(tmp_path / "m.npy", kept)
    np.save(tmp_path / "wrong.npy", np.where(kept, targets, 0))
    padded = np.concatenate([logits, np.full((N_ROWS, 2), 9.0)], axis=1)
    masked = found(
        tmp_path, padded, np.where(kept, targets, 5), mask=tmp_path / "m.npy", vocab=N_CLASSES
    )
    ignored = found(tmp_path, np.where(kept[:, None], logits, np.nan), np.where(kept, targets, -100))
    assert masked.temperature == ignored.temperature == expected.temperature
    assert masked.standard_error == ignored.standard_error == expected.standard_error
    assert masked.before.ignored == ignored.before.ignored == N_ROWS - kept.sum()


def test_shift_takes_the_next_target(tmp_path, rows):
    logits, targets = 2 * rows[0], rows[1]
    inner = np.arange(N_ROWS) % 20 != 19
    expected = found(tmp_path, logits[inner], targets[inner])
    shifted = found(tmp_path, logits, np.roll(targets, 1), shift=True, seq_len=20)
    assert shifted.temperature == expected.temperature
    assert shifted.before.sequences == N_ROWS // 20


def test_minus_infinity_beside_the_target(tmp_path, rows):
    logits, targets = 2 * rows[0], np.where(rows[1] == 4, 5, rows[1])
    logits[:, 4] = -np.inf
    calibration = found(tmp_path, logits, targets)
    assert calibration.temperature == pytest.approx(best_temperature(logits, targets), rel=2e-6)


@pytest.mark.parametrize("kind", ["probs", "logprobs"])
def test_probabilities_are_given_before_and_logits_after(tmp_path, rows, kind):
    logits, targets = 2 * rows[0], rows[1]
    # Rows that do not sum to 1: what is given and its softmax differ, but not at the best temperature.
    p = 0.9 * special.softmax(logits, axis=1)
    calibration = found(tmp_path, p if kind == "probs" else np.log(p), targets, kind=kind)
    assert calibration.temperature == pytest.approx(best_temperature(logits, targets), rel=2e-6)
    given = -np.log(p[np.arange(N_ROWS), targets]).mean()
    assert calibration.before.mean_nll == pytest.approx(given, rel=1e-12)


def test_no_bit_depends_on_blocks_threads_or_shards(tmp_path, rows, monkeypatch):
    logits, targets = (1.7 * rows[0]).astype(np.float32), rows[1]
    whole = found(tmp_path, logits, targets)
    monkeypatch.setattr("fastce.scoring.runner._MIB", 50_000)
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", 30_000)
    seen = []
    for threads in (1, 2):
        cut = found(tmp_path, logits, targets, block_mib=1, num_threads=threads, progress=seen.append)
        assert cut == whole
    assert all(isinstance(at, CalibrateProgress) for at in seen)
    assert {at.passes for at in seen} == set(range(1, whole.passes + 1))
    assert (seen[-1].rows_done, seen[-1].rows_total) == (N_ROWS, N_ROWS)
    np.save(tmp_path / "x-1.npy", logits[:1_001])
    np.save(tmp_path / "x-2.npy", logits[1_001:])
    shards = calibrate_files(tmp_path / "x-*.npy", tmp_path / "y.npy")
    assert (shards.temperature, shards.standard_error) == (whole.temperature, whole.standard_error)
    assert shards.after.reliability == whole.after.reliability


def test_after_is_what_score_files_gives(tmp_path, rows):
    calibration = found(tmp_path, 3 * rows[0], rows[1], n_bins=7)
    scored = fastce.score_files(
        tmp_path / "x.npy", tmp_path / "y.npy", temperature=calibration.temperature, n_bins=7
    )
    assert calibration.after == scored
    assert calibration.before == fastce.score_files(tmp_path / "x.npy", tmp_path / "y.npy", n_bins=7)


def with_lbfgs(logits, targets, rate):
    """Temperature scaling as it is mostly done (gpleiss/temperature_scaling): LBFGS in T, from 1.5."""
    temperature = torch.full((), 1.5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([temperature], lr=rate, max_iter=50)

    def closure():
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            torch.tensor(logits) / temperature, torch.tensor(targets)
        )
        loss.backward()
        return loss

    optimiser.step(closure)
    return temperature.item()


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_logits_where_lbfgs_ends_worse_or_runs_away(tmp_path, rate):
    rng = np.random.default_rng(2)
    truth = rng.integers(N_CLASSES, size=N_ROWS)
    logits = 0.3 * np.eye(N_CLASSES)[truth] + 0.05 * rng.standard_normal((N_ROWS, N_CLASSES))
    targets = np.where(rng.random(N_ROWS) < 0.1, rng.integers(N_CLASSES, size=N_ROWS), truth)
    theirs = with_lbfgs(logits, targets, rate)
    assert mean_nll(logits, targets, theirs) > mean_nll(logits, targets, 1)
    assert rate < 1 or abs(theirs) > 1_000
    calibration = found(tmp_path, logits, targets)
    assert calibration.status == "converged"
    assert calibration.temperature == pytest.approx(best_temperature(logits, targets), rel=2e-6)
    assert calibration.after.mean_nll < calibration.before.mean_nll


def test_one_wrong_row_is_enough(tmp_path, rows):
    logits = rows[0]
    targets = logits.argmax(axis=1)
    targets[7] = logits[7].argmin()
    calibration = found(tmp_path, logits, targets)
    assert calibration.status == "converged"
    assert calibration.temperature == pytest.approx(best_temperature(logits, targets), rel=2e-6)


def none(calibration):
    return calibration.temperature, calibration.standard_error, calibration.after


def test_separable(tmp_path, rows):
    calibration = found(tmp_path, rows[0], rows[0].argmax(axis=1))
    assert (calibration.status, calibration.passes) == ("separable", 1)
    assert none(calibration) == (None, None, None)
    tied = found(tmp_path, np.array([[1.0, 1.0, 0.0], [0.0, 3.0, 3.0]]), [1, 2])
    assert tied.status == "separable"


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (-x, y),
        lambda x, y: (-x.astype(np.float16), y),
        lambda x, y: (0 * x, y),
        lambda x, y: (0 * x, 0 * y),
        lambda x, y: (x[:, :1], 0 * y),
        lambda x, y: (np.where(np.arange(N_CLASSES) == 3, -np.inf, -x), np.where(y == 3, 0, y)),
    ],
    ids=["inverted", "inverted float16", "constant", "constant, first target", "one class", "-inf"],
)
def test_uninformative(tmp_path, rows, make):
    calibration = found(tmp_path, *make(*rows))
    assert calibration.status == "uninformative"
    assert none(calibration) == (None, None, None)
    assert math.isfinite(calibration.before.mean_nll)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (np.zeros((0, 3)), []),
        (np.zeros((2, 3)), [-100, -100]),
        (np.array([[0.0, np.nan], [0.0, 1.0]]), [0, 1]),
        (np.array([[0.0, -np.inf], [0.0, 1.0]]), [1, 1]),
    ],
    ids=["no rows", "all ignored", "NaN", "target at -inf"],
)
def test_undefined(tmp_path, logits, targets):
    calibration = found(tmp_path, logits, np.array(targets, int))
    assert calibration.status == "undefined"
    assert none(calibration) == (None, None, None)
    document = json.loads(json.dumps(calibration.as_dict(), allow_nan=False))
    assert document["before"]["mean_nll"] is None
    assert document["after"] is None


def test_never_worse_even_where_rounding_decides(tmp_path, rows):
    # At its own best temperature nothing is left to gain but rounding.
    best = found(tmp_path, rows[0], rows[1]).temperature
    logits = (rows[0] / best).astype(np.float32)
    calibration = found(tmp_path, logits, rows[1])
    assert calibration.temperature == pytest.approx(1, abs=2 * calibrate.TOLERANCE)
    assert calibration.after.mean_nll <= calibration.before.mean_nll


def test_bad_input_is_named(tmp_path, rows):
    targets = rows[1].copy()
    targets[40] = 99
    with pytest.raises(InputError, match=r"y\.npy: row 40 = 99 is outside \[0, 11\)"):
        found(tmp_path, rows[0], targets)
    for name, value in (("n_bins", 0), ("block_mib", 0), ("num_threads", 0), ("vocab", 12)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            found(tmp_path, rows[0], rows[1], **{name: value})


@pytest.fixture
def dump(tmp_path, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", 2 * rows[0])
    np.save("y.npy", rows[1])
    return calibrate_files("x.npy", "y.npy")


def run(capsys, *argv):
    code = main(argv)
    return code, *capsys.readouterr()


def test_command_line_table(capsys, dump):
    code, out, err = run(capsys, "calibrate", "x.npy", "--targets", "y.npy")
    assert (code, err) == (0, "")
    assert out.rstrip().endswith(f"fastce score ... --temperature {dump.temperature:.7g}")
    assert f"{dump.before.ece:.2%}" in out
    assert f"{dump.after.ece:.2%}" in out
    assert max(map(len, out.splitlines())) <= 80
    some = [b for b in dump.after.reliability if b.rows]
    bars = [line for line in out.split("after: bin")[1].splitlines() if "│" in line][1:]
    assert len(bars) == len(some)
    for line, b in zip(bars, some, strict=True):
        bar = line.split()[-1]
        assert len(bar) == 30
        assert bar.index("│") == min(int(30 * b.confidence), 29)
        assert abs(bar.count("█") - 30 * b.accuracy) <= 1.5


def test_command_line_json(capsys, dump):
    argv = ("calibrate", "x.npy", "--targets", "y.npy", "-o", "json", "--quiet", "--plot", "p.svg")
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(dump.as_dict()))
    with open("p.svg") as file:
        assert "<svg" in file.read()


def test_command_line_shows_passes(capsys, dump, monkeypatch):
    monkeypatch.setattr(terminal, "_LINE_SECONDS", 0.0)
    code, _, err = run(capsys, "calibrate", "x.npy", "--targets", "y.npy")
    assert code == 0
    lines = err.splitlines()
    assert len(lines) == dump.passes
    assert re.match(r"calibrating: \d+%, pass 1 at temperature 1, [\d,]+ rows/s, .* left$", lines[0])
    assert f"pass {dump.passes} at temperature {dump.temperature:.6g}" in lines[-1]


@pytest.mark.parametrize(
    ("targets", "code", "said"),
    [
        (lambda x, y: x.argmax(axis=1), 1, "every target has the largest logit"),
        (lambda x, y: x.argmin(axis=1), 1, "until rows are uniform"),
        (lambda x, y: 0 * y - 100, 3, "no row is scored"),
    ],
)
def test_command_line_says_why_not(capsys, dump, rows, targets, code, said):
    np.save("y.npy", targets(*rows))
    got, out, err = run(capsys, "calibrate", "x.npy", "--targets", "y.npy")
    assert got == code
    assert said in err
    assert "--temperature" not in out


def test_command_line_errors(capsys, dump):
    assert run(capsys, "calibrate", "no.npy", "--targets", "y.npy")[0] == 3
    assert run(capsys, "calibrate", "x.npy", "--targets", "y.npy", "--bins", "0")[0] == 2
    code, _, err = run(capsys, "calibrate", "x.npy", "--targets", "y.npy", "--plot", "p.gif")
    assert (code, err[:15]) == (3, "fastce: p.gif: ")
