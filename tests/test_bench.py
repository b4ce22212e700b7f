"""`fastce bench`: formats, comparison, bad arguments; nothing depends on how long anything takes."""

import csv
import io
import json

import numpy as np
import pytest

import fastce
from fastce import bench, registry
from fastce.cli import main

BANDWIDTH = {"read": [20.0, 22.0, 10.0], "read_write": [30.0, 30.0, 30.0]}
QUICK = ("bench", "--mib", "0.01", "--seconds", "1e-4", "--backends", "numpy", "--quiet")


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch):
    """Leave out the sweeps, which take a second and a gigabyte."""
    pytest.importorskip("numba")
    monkeypatch.setattr("fastce.bandwidth.sweeps", lambda num_threads: BANDWIDTH)


def run(capsys, *argv):
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_json_has_a_cell_for_each_combination(capsys):
    argv = ("--classes", "3,50", "--threads", "1,2", "--dtypes", "float32,float64", "-o", "json")
    code, out, err = run(capsys, *QUICK, *argv)
    assert (code, err) == (0, "")
    document = json.loads(out)
    cells = document["cells"]
    assert len({tuple(cell[name] for name in bench._KEY) for cell in cells}) == len(cells) == 16
    assert document["bandwidth"] == {n: {"loss": 20.0, "loss+grad": 30.0} for n in ("1", "2")}
    assert document["machine"] == fastce.show_config("dict")["processor"]
    for cell in cells:
        n_bytes = cell["n_rows"] * cell["n_classes"] * np.dtype(cell["dtype"]).itemsize
        assert n_bytes <= 0.01 * 2**20 < n_bytes + 8 * cell["n_classes"]
        moved = n_bytes * bench.TASKS[cell["task"]]
        assert cell["gb_per_s"] == pytest.approx(moved / cell["median_s"] / 1e9)
        limit = {"loss": 20.0, "loss+grad": 30.0}[cell["task"]]
        assert cell["share_of_bandwidth"] == pytest.approx(cell["gb_per_s"] / limit)
        assert 0 < cell["min_s"] <= cell["median_s"]
        assert cell["first_call_s"] > 0


def test_csv_has_the_same_figures_as_json(capsys):
    code, out, _ = run(capsys, *QUICK, "--classes", "7", "-o", "csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["task"] for row in rows] == ["loss", "loss+grad"]
    assert {row["backend"] for row in rows} == {"numpy"}
    assert float(rows[0]["ns_per_logit"]) > 0


@pytest.mark.parametrize("format_", ["md", "table"])
def test_a_table_leaves_out_what_all_rows_share(capsys, format_):
    code, out, _ = run(capsys, *QUICK, "--classes", "7,9", "--threads", "1", "-o", format_)
    assert code == 0
    assert "Memory with 1 thread: read 20.0 GB/s, read and write 30.0 GB/s" in out
    assert "In all rows: backend numpy, dtype float32, threads 1" in out
    head = next(line for line in out.splitlines() if "ns/logit" in line)
    assert "classes" in head
    assert "task" in head
    assert "backend" not in head
    assert "\x1b" not in out


def test_compare_gives_the_ratio_of_each_cell(capsys, tmp_path):
    old = tmp_path / "old.json"
    argv = (*QUICK, "--threads", "1", "-o", "json")
    code, out, _ = run(capsys, *argv, "--classes", "7")
    assert code == 0
    document = json.loads(out)
    for cell in document["cells"]:
        cell["median_s"] = 1000.0
    document["machine"]["model"] = "abacus"
    old.write_text(json.dumps(document))
    code, out, err = run(capsys, *argv, "--classes", "7,9", "--compare", str(old))
    assert code == 0
    assert "another machine (abacus, now " in err
    assert "2 of 4 combinations are not in the old results" in err
    for cell in json.loads(out)["cells"]:
        if cell["n_classes"] == 7:
            assert cell["old_median_s"] == 1000.0
            assert cell["old_over_new"] == pytest.approx(1000.0 / cell["median_s"])
        else:
            assert cell["old_over_new"] is None
    code, out, _ = run(capsys, *QUICK, "--threads", "1", "--classes", "7,9", "--compare", str(old))
    assert code == 0
    assert "old/new" in out
    assert "1e+03 s" in out


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": [{"backend": "numpy"}]}', None])
def test_what_cannot_be_compared_is_bad_input(capsys, tmp_path, text):
    old = tmp_path / "old.json"
    if text is not None:
        old.write_text(text)
    code, out, err = run(capsys, *QUICK, "--compare", str(old))
    assert (code, out) == (3, "")
    assert err.startswith(f"fastce: {old}: ")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--backends", "fortran"], "backend: expected one of"),
        (
            ["--dtypes", "int8"],
            "dtypes: expected some of float64, float32, float16, bfloat16; got 'int8'",
        ),
        (["--task", "gradient"], "task: expected some of loss, loss+grad; got 'gradient'"),
        (["--classes", "0"], "classes: expected at least 1, got 0"),
        (["--classes", "ten"], ""),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["-o", "xml"], ""),
    ],
)
def test_bad_arguments_are_usage_errors(capsys, argv, said):
    code, out, err = run(capsys, *QUICK, *argv)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["seconds", "mib"])
def test_bad_amounts(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected a finite number above 0, got {value}"):
        bench.run_bench(**{name: value})


def test_a_backend_that_cannot_run_here_is_a_failure(capsys):
    for backend in registry.BACKENDS:
        if registry.why_unavailable(backend) is not None:
            code, out, err = run(capsys, *QUICK, "--backends", backend.name)
            assert (code, out) == (1, "")
            assert f"backend {backend.name!r} cannot run here" in err


def test_a_backend_is_left_out_where_it_has_no_kernels(monkeypatch):
    narrow = registry.Backend("narrow", "fastce._backends.numpy", dtypes=frozenset({"float32"}))
    numpy = registry.BACKENDS[-1]
    monkeypatch.setattr(registry, "BACKENDS", (narrow, numpy))
    assert bench._kinds((), ["float64", "float32"]) == [("narrow", "float32")]
    with pytest.raises(ValueError, match="dtypes: narrow: no kernels for float64"):
        bench._kinds((), ["float64"])
    monkeypatch.setattr(registry, "BACKENDS", (numpy,))
    with pytest.raises(ValueError, match="fastce doctor"):
        bench._kinds((), ["float32"])


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_sample_logits(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = bench.sample_logits((30, 70), dtype)
    assert (x.shape, x.dtype.name) == ((30, 70), dtype)
    np.testing.assert_array_equal(x, bench.sample_logits((30, 70), dtype))
    assert 3.5 < x.astype(np.float64).std() < 4.5


@pytest.mark.parametrize(
    ("takes", "n_samples"),
    [
        (1e-5, 300),  # 100 calls a sample
        (0.05, 6),
        (0.2, 5),  # at least
        (0.5, 3),  # at least, beyond four times the 0.3 s
    ],
)
def test_timed_repeats_as_often_as_needed(monkeypatch, takes, n_samples):
    now, calls = 0.0, []

    def call():
        nonlocal now
        now += takes
        calls.append("call")

    monkeypatch.setattr("fastce.bench.time.perf_counter", lambda: now)
    timing = bench.timed(call, 0.3, lambda: calls.append("second"))
    assert timing.first == pytest.approx(takes)
    assert timing.median == pytest.approx(takes)
    assert len(timing.samples) == pytest.approx(n_samples, abs=1)
    assert calls.index("second") == 1
    assert calls.count("second") == 1


def test_bandwidth_sweeps_every_word():
    bandwidth = pytest.importorskip("fastce.bandwidth")
    source, target = bandwidth._aligned(2048), bandwidth._aligned(2048)
    source[...] = np.arange(2048) ** 2
    for n_streams in (1, 4):
        found = bandwidth._read(source, n_streams)
        assert np.array_equal(found, np.bitwise_xor.reduce(source.reshape(-1, 8)))
        target[...] = -1
        bandwidth._copy(source, target, n_streams)
        np.testing.assert_array_equal(target, source)


def test_bandwidth_is_reported_by_sweep(monkeypatch):
    bandwidth = pytest.importorskip("fastce.bandwidth")
    monkeypatch.undo()
    rates = bandwidth.sweeps(2, n_bytes=2**20)
    assert set(rates) == {"read", "read_write", "read_one_stream", "read_write_one_stream"}
    assert all(rate > 0 for found in rates.values() for rate in found)
