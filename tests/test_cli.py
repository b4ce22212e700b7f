"""The command line end to end: streams, exit codes, and what help does not import."""

import csv
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fastce
from fastce import config, terminal
from fastce.cli import main


@pytest.fixture
def dump(tmp_path, monkeypatch):
    """Work in a folder with logits and targets."""
    monkeypatch.chdir(tmp_path)
    logits = np.random.default_rng(3).standard_normal((20, 9)).astype(np.float32)
    np.save("logits.npy", logits)
    np.save("targets.npy", np.arange(20) % 9)
    return tmp_path


def run(capsys, *argv):
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_score_prints_a_table(capsys, dump):
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "--bytes", "40")
    assert (code, err) == (0, "")
    mean = fastce.cross_entropy(np.load("logits.npy"), np.load("targets.npy"))
    assert re.search(rf"mean NLL +{mean:.6f} ± 0\.\d+ nats", out)
    for name in ("rows", "perplexity", "bits per byte", "top-1 accuracy", "top-5 accuracy"):
        assert name in out
    assert "\x1b" not in out


def test_score_prints_json_alone_on_stdout(capsys, dump):
    argv = ("logits.npy", "--targets", "targets.npy", "-o", "json", "--top-k", "1,2,3", "--out", "s")
    code, out, err = run(capsys, "score", *argv, "--backend", "numpy", "--num-threads", "1")
    assert (code, err) == (0, "")
    document = json.loads(out)
    written = json.loads((dump / "s" / "figures.json").read_text())
    assert {**document, "run": None} == {**written, "run": None}
    assert list(document["figures"]["top_k_accuracy"]) == ["1", "2", "3"]
    assert (document["run"]["backend"], document["run"]["isa"]) == ("numpy", None)
    losses = fastce.cross_entropy(
        np.load("logits.npy"), np.load("targets.npy"), reduction="none", backend="numpy"
    )
    np.testing.assert_array_equal(np.load(dump / "s" / "logits.loss.npy"), losses)


def test_targets_take_several_files_or_a_pattern(capsys, dump):
    x, y = np.load("logits.npy"), np.load("targets.npy")
    for i, rows in enumerate((slice(0, 7), slice(7, 20))):
        np.save(f"x-{i}.npy", x[rows])
        np.save(f"y-{i}.npy", y[rows])
    whole = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "-o", "json")
    for argv in (
        ("x-0.npy", "x-1.npy", "--targets", "y-0.npy", "y-1.npy"),
        ("x-*.npy", "--targets", "y-*.npy"),
        ("x-*.npy", "--targets", "targets.npy"),
    ):
        code, out, _ = run(capsys, "score", *argv, "-o", "json")
        assert code == 0
        figures, expected = json.loads(out)["figures"], json.loads(whole[1])["figures"]
        assert figures["rows"] == 20
        assert figures["nll_sum"] == pytest.approx(expected["nll_sum"], rel=1e-15)


def test_bad_input_is_exit_code_3(capsys, dump):
    np.save("targets.npy", [*range(8), 50_257, *range(11)])
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy")
    assert (code, out) == (3, "")
    assert err.startswith("fastce: targets.npy: row 8 = 50257 is outside [0, 9) (row 8 of logits.npy)")
    (dump / "logits.npy").write_bytes((dump / "logits.npy").read_bytes()[:-1])
    code, _, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy")
    assert code == 3
    assert err.startswith("fastce: logits.npy: expected 848 bytes")


def test_nothing_scored_is_exit_code_3(capsys, dump):
    np.save("targets.npy", np.full(20, -100))
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "-o", "json")
    assert code == 3
    assert json.loads(out)["figures"]["mean_nll"] is None
    assert err == "fastce: no row was scored: all 20 rows are ignored\n"
    assert run(capsys, "score", "logits.npy", "--targets", "targets.npy")[0] == 3


def test_a_row_that_is_not_finite_is_told(capsys, dump):
    x = np.load("logits.npy")
    x[4, 2] = np.nan
    np.save("logits.npy", x)
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "-o", "json")
    assert code == 0
    assert json.loads(out)["figures"]["nonfinite"] == 1
    assert "1 row" in err


def test_score_in_other_formats(capsys, dump):
    argv = ("score", "logits.npy", "--targets", "targets.npy", "--bytes", "40")
    mean = fastce.score_files("logits.npy", "targets.npy").mean_nll
    code, out, err = run(capsys, *argv, "-o", "md")
    assert (code, err) == (0, "")
    assert f"| mean NLL | {mean:.6f} ± " in out
    code, out, _ = run(capsys, *argv, "-o", "csv")
    (row,) = csv.DictReader(out.splitlines())
    assert float(row["mean_nll"]) == mean
    assert float(row["top_k_accuracy.5"]) <= 1
    code, out, _ = run(capsys, *argv, "-o", "jsonl")
    assert json.loads(out)["figures"]["mean_nll"] == mean
    assert out.count("\n") == 1


def test_every_figure_is_explained(capsys, dump):
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "--explain")
    assert (code, err) == (0, "")
    names = {field.name for field in dataclasses.fields(fastce.scoring.Figures)}
    assert all(name in out for name in names)
    code, out, err = run(
        capsys, "score", "logits.npy", "--targets", "targets.npy", "--explain", "-o", "json"
    )
    assert json.loads(out)
    assert "exp(mean_nll)" in err


@pytest.mark.parametrize(
    ("condition", "code"),
    [("ppl>1", 4), ("ppl > 1e9", 0), ("mean_nll>=0", 4), ("top_k_accuracy.5<=1", 4), ("bpb>0", 4)],
)
def test_gates(capsys, dump, condition, code):
    argv = ("score", "logits.npy", "--targets", "targets.npy", "-o", "json")
    found, out, err = run(capsys, *argv, "--fail-if", condition)
    assert found == code
    assert json.loads(out)  # the figures are told all the same
    assert ("gate failed" in err) == (code == 4)
    # A gate that fails is not made good by one that does not.
    assert run(capsys, *argv, "--fail-if", condition, "--fail-if", "ppl>1e9")[0] == code


def test_a_figure_that_is_no_number_fails_its_gate(capsys, dump):
    x = np.load("logits.npy")
    x[3] = np.nan
    np.save("logits.npy", x)
    argv = ("score", "logits.npy", "--targets", "targets.npy", "--fail-if", "ppl>1e9")
    code, _, err = run(capsys, *argv)
    assert code == 4
    assert "ppl>1e9: perplexity is not a number here" in err


def test_compare_has_gates(capsys, dump):
    np.save("other.npy", np.load("logits.npy")[:, ::-1])
    argv = ("compare", "logits.npy", "other.npy", "--targets", "targets.npy", "--fail-if")
    assert run(capsys, *argv, "kld>100")[0] == 0
    code, _, err = run(capsys, *argv, "kld>0.01")
    assert code == 4
    assert "gate failed: kld>0.01: kl.mean.value = " in err
    assert run(capsys, *argv, "brier>0")[0] == 2


def test_shares_are_merged_and_verified(capsys, dump, monkeypatch):
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", 3 * 9 * 4)  # 7 parts
    argv = ("score", "logits.npy", "--targets", "targets.npy", "--out", "s", "-o", "json")
    code, out, err = run(capsys, *argv, "--shard", "1/2")
    assert (code, json.loads(out)["figures"]["rows"]) == (0, 11)
    assert "when all are: fastce merge s" in err
    code, _, err = run(capsys, "merge", "s")
    assert code == 5
    assert "3 of 7 parts are missing" in err
    assert run(capsys, "verify", "s")[0] == 1
    assert run(capsys, *argv, "--shard", "2/2")[0] == 0
    code, out, err = run(capsys, "merge", "s", "-o", "json")
    assert (code, err) == (0, "")
    whole = fastce.score_files("logits.npy", "targets.npy")
    assert json.loads(out)["figures"] == whole.as_dict()["figures"]
    assert run(capsys, "verify", "s")[:2] == (0, "s: complete, and as recorded\n")
    (dump / "s" / "logits.loss.npy").write_bytes(b"torn")
    code, out, _ = run(capsys, "verify", "s")
    assert code == 1
    assert "logits.loss.npy" in out
    assert run(capsys, "verify", "nowhere")[0] == 3


def test_a_full_disk_is_exit_code_5(capsys, dump, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastce.scoring.records.Folder.write_record", full)
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "--out", "s")
    assert (code, out) == (5, "")
    assert "No space left on device; what is done is kept" in err
    assert "    fastce score logits.npy --targets targets.npy --out s" in err


def test_warnings_are_said(capsys, dump):
    np.save("logits.npy", fastce.softmax(np.load("logits.npy")))
    code, _, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy")
    assert code == 0
    assert "fastce: warning: these look like probabilities, not logits" in err
    code, _, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "--kind", "probs")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(capsys, shell):
    code, out, err = run(capsys, "completion", shell)
    assert (code, err) == (0, "")
    assert "fastce" in out
    assert "llama-compat" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["score", "logits.npy"],
        ["score", "logits.npy", "--targets", "targets.npy", "--fail-if", "ppl"],
        ["score", "logits.npy", "--targets", "targets.npy", "--fail-if", "ppl>x"],
        ["score", "logits.npy", "--targets", "targets.npy", "--fail-if", "beauty<1"],
        ["score", "logits.npy", "--targets", "targets.npy", "--shard", "1/2"],
        ["score", "logits.npy", "--targets", "targets.npy", "--out", "s", "--shard", "3/2"],
        ["score", "logits.npy", "--targets", "targets.npy", "--out", "s", "--shard", "x"],
        ["score", "logits.npy", "--targets", "targets.npy", "--vocab", "10"],
        ["score", "logits.npy", "--targets", "targets.npy", "--temperature", "0"],
        ["score", "logits.npy", "--targets", "targets.npy", "--seq-len", "7"],
        ["score", "logits.npy", "--targets", "targets.npy", "--dask", "here"],
        ["score", "--targets", "targets.npy"],
        ["score", "logits.npy", "--targets", "targets.npy", "--no-such"],
        ["score", "logits.npy", "--targets", "targets.npy", "--top-k", "1,x"],
        ["score", "logits.npy", "--targets", "targets.npy", "--top-k", "0"],
        ["score", "logits.npy", "--targets", "targets.npy", "--block-mib", "0"],
        ["score", "logits.npy", "--targets", "targets.npy", "--num-threads", "0"],
        ["score", "logits.npy", "--targets", "targets.npy", "--backend", "fortran"],
        ["no-such-verb"],
    ],
)
def test_usage_errors_are_exit_code_2(capsys, dump, argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err


def test_failures_are_exit_code_1(capsys, dump, monkeypatch):
    (dump / "taken").write_text("")
    argv = ("score", "logits.npy", "--targets", "targets.npy")
    code, _, err = run(capsys, *argv, "--out", "taken")
    assert code == 1
    assert "taken" in err
    unavailable = [b for b in fastce.backends() if not b.available]
    for backend in unavailable:
        code, _, err = run(capsys, *argv, "--backend", backend.name)
        assert code == 1
        assert f"backend '{backend.name}' cannot run here" in err


def test_interrupt_is_exit_code_130(capsys, dump, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastce.scoring.scorer.row_stats", interrupted)
    code, out, err = run(capsys, "score", "logits.npy", "--targets", "targets.npy", "--out", "s")
    assert (code, out) == (130, "")
    resume = "fastce score logits.npy --targets targets.npy --out s"
    assert (
        err
        == f"fastce: interrupted; what is done is kept, and this goes on from there:\n    {resume}\n"
    )
    assert os.listdir("s/parts") == []


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, dump, monkeypatch):
    argv = ("score", "logits.npy", "--targets", "targets.npy")
    monkeypatch.setattr(terminal, "_LINE_SECONDS", 0.0)
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert re.fullmatch(
        r"scoring: 100%, [\d,]+ rows/s, \d+\.\d\d GB/s, mean NLL 2\.\d{4} ± 0\.\d{4}, 0:00 left\n", err
    )
    assert "scoring" not in out
    assert run(capsys, *argv, "--quiet")[2] == ""


def test_progress_on_a_terminal_is_a_bar(capsys, dump, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    argv = ("score", "logits.npy", "--targets", "targets.npy", "-o", "json")
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert json.loads(out)
    assert "scoring" in err
    assert run(capsys, *argv, "--quiet")[2] == ""


def test_doctor_says_what_runs_here(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert all(backend.name in out for backend in fastce.backends())
    code, out, err = run(capsys, "doctor", "-o", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["backends"]["numpy"].startswith("available")
    assert document["versions"]["fastce"] == fastce.__version__
    assert set(document) >= {"processor", "threads", "backends", "extension", "openmp", "versions"}


@pytest.mark.parametrize(
    ("extension", "said"),
    [
        (None, "install a C compiler, then"),
        ({"OPENMP": False}, "install a C compiler with OpenMP"),
        ({"OPENMP": True}, "yes, with OpenMP"),
    ],
)
def test_doctor_says_what_to_install(capsys, monkeypatch, extension, said):
    module = None if extension is None else type("kernels", (), extension)
    monkeypatch.setitem(sys.modules, "fastce._native.kernels", module)
    assert said in " ".join(config._extension().values())


def python(*argv, **kwargs):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=60, check=False, **kwargs
    )


@pytest.mark.parametrize("argv", [["--help"], ["score", "--help"], ["--version"]])
def test_help_imports_no_library(argv):
    code = (
        "import sys; from fastce.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('numpy', 'numba')))"
    )
    done = python("-c", code, *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert fastce.__version__ in done.stdout or "Usage: fastce" in done.stdout


def test_the_process_exits_with_the_code(dump):
    done = python("-m", "fastce", "score", "logits.npy", "--targets", "targets.npy", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["figures"]["rows"] == 20
    done = python("-m", "fastce", "score", "no.npy", "--targets", "targets.npy")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "fastce: no.npy: cannot be read: No such file or directory\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_broken_pipe_is_silent(dump):
    argv = ["score", "logits.npy", "--targets", "targets.npy"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fastce", *argv],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
