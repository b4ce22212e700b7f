"""Two dumps in, llama.cpp's table and more out: definitions, layouts, its digits, the command line."""

import dataclasses
import json
import math
import os
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import fastce
from fastce.cli import main
from fastce.scoring import CompareProgress, InputError, compare_files, formats
from fastce.scoring.convert import convert
from fastce.scoring.formats import npy

N_ROWS, N_CLASSES = 1_237, 11


@pytest.fixture(scope="module")
def rows():
    """Logits of two models that mostly agree, and targets, of which some are ignored."""
    rng = np.random.default_rng(7)
    p = 3 * rng.standard_normal((N_ROWS, N_CLASSES))
    q = p + 0.7 * rng.standard_normal(p.shape)
    y = rng.integers(N_CLASSES, size=N_ROWS)
    y[::13] = -100
    return p, q, y


@pytest.fixture
def dump(tmp_path, rows):
    """Float64 logits, cut differently."""
    p, q, y = rows
    np.save(tmp_path / "p-2.npy", p[:500])
    np.save(tmp_path / "p-10.npy", p[500:])
    for i, part in enumerate(np.split(q, [1, 499, 501])):
        np.save(tmp_path / f"q-{i}.npy", part)
    np.save(tmp_path / "y.npy", y)
    return tmp_path


def compare(folder, **options):
    return compare_files(folder / "p-*.npy", folder / "q-*.npy", folder / "y.npy", **options)


# The definitions again, a row and a term at a time, in Python's floats.


def log_softmax(row):
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - lse for x in row]


def kl(p, q):
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def per_row(p, q, y):
    """Return for each kept row: KL both ways, losses, agreement of argmax, largest probability."""
    found = {"kl": [], "reverse": [], "base": [], "other": [], "same": [], "top": [], "row": []}
    for i, (a, b, target) in enumerate(zip(p.tolist(), q.tolist(), y.tolist(), strict=True)):
        if target == -100:
            continue
        la, lb = log_softmax(a), log_softmax(b)
        found["kl"].append(kl(la, lb))
        found["reverse"].append(kl(lb, la))
        found["base"].append(-la[target])
        found["other"].append(-lb[target])
        found["same"].append(a.index(max(a)) == b.index(max(b)))
        found["top"].append(math.exp(max(la)))
        found["row"].append(i)
    return found


def mean_error(values):
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def covariance_of_means(a, b):
    n, (ma, _), (mb, _) = len(a), mean_error(a), mean_error(b)
    return math.fsum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True)) / (n - 1) / n


def percentile(values, percent):
    ordered = sorted(values)
    position = percent / 100 * (len(ordered) - 1)
    i = math.floor(position)
    part = position - i
    return ordered[i] if part == 0 else (1 - part) * ordered[i] + part * ordered[i + 1]


def close(estimate, expected, rel=1e-11):
    assert (estimate.value, estimate.error) == pytest.approx(expected, rel=rel, abs=1e-13)


def test_figures_are_what_their_definitions_say(dump, rows):
    found = compare(dump)
    each = per_row(*rows)
    a, b = each["other"], each["base"]
    n = len(a)
    assert (found.rows, found.ignored, found.nonfinite) == (N_ROWS, N_ROWS - n, 0)
    (mean_a, error_a), (mean_b, error_b) = mean_error(a), mean_error(b)
    covariance = covariance_of_means(a, b)
    ppl_a, ppl_b = math.exp(mean_a), math.exp(mean_b)
    ppl = found.perplexity
    close(ppl.other, (ppl_a, ppl_a * error_a))
    close(ppl.base, (ppl_b, ppl_b * error_b))
    assert ppl.correlation == pytest.approx(covariance / (error_a * error_b), rel=1e-11)
    log_error = math.sqrt(error_a**2 + error_b**2 - 2 * covariance)
    close(ppl.log_ratio, (mean_a - mean_b, log_error))
    ratio = ppl_a / ppl_b
    close(ppl.ratio, (ratio, ratio * log_error))
    squares = (ppl_a * error_a) ** 2 + (ppl_b * error_b) ** 2
    close(ppl.difference, (ppl_a - ppl_b, math.sqrt(squares - 2 * ppl_a * ppl_b * covariance)))
    close(found.kl.mean, mean_error(each["kl"]))
    close(found.kl_reverse, mean_error(each["reverse"]))
    delta_p = [math.exp(-x) - math.exp(-y) for x, y in zip(a, b, strict=True)]
    close(found.delta_p.mean, mean_error(delta_p))
    mean_square, error = mean_error([d * d for d in delta_p])
    close(found.delta_p_rms, (math.sqrt(mean_square), error / (2 * math.sqrt(mean_square))))
    share = sum(each["same"]) / n
    close(found.same_top, (share, math.sqrt(share * (1 - share) / (n - 1))))


def test_quantiles_are_interpolated(dump, rows):
    found = compare(dump)
    each = per_row(*rows)
    delta_p = [math.exp(-x) - math.exp(-y) for x, y in zip(each["other"], each["base"], strict=True)]
    for spread, values in ((found.kl, each["kl"]), (found.delta_p, delta_p)):
        assert spread.minimum == pytest.approx(min(values), rel=1e-11)
        assert spread.maximum == pytest.approx(max(values), rel=1e-11)
        for percent, value in spread.percentiles.items():
            assert value == pytest.approx(percentile(values, percent), rel=1e-10, abs=1e-15)
    assert set(found.delta_p.percentiles) == {99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1}
    assert set(found.kl.percentiles) == set(found.delta_p.percentiles) - {75, 25}


def test_buckets_hold_the_divergence_by_confidence(dump, rows):
    found = compare(dump)
    each = per_row(*rows)
    assert sum(bucket.rows for bucket in found.buckets) == found.rows - found.ignored
    for i, bucket in enumerate(found.buckets):
        pairs = zip(each["top"], each["kl"], strict=True)
        inside = [value for top, value in pairs if i <= 10 * top < i + 1]
        assert (bucket.low, bucket.high, bucket.rows) == (i / 10, (i + 1) / 10, len(inside))
        if inside:
            assert bucket.mean_kl == pytest.approx(math.fsum(inside) / len(inside), rel=1e-11)
        else:
            assert math.isnan(bucket.mean_kl)


def test_a_certain_row_is_in_the_last_bucket(tmp_path):
    np.save(tmp_path / "x.npy", [[1000.0, 0.0], [0.0, 0.0]])
    found = compare_files(tmp_path / "x.npy", tmp_path / "x.npy")
    assert [bucket.rows for bucket in found.buckets] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_worst_rows_are_named(dump, rows):
    each = per_row(*rows)
    order = sorted(range(len(each["kl"])), key=lambda i: -each["kl"][i])
    found = compare(dump, worst=25).worst
    assert len(found) == 25
    for worst, i in zip(found, order, strict=False):
        row = each["row"][i]
        in_first = row < 500
        assert worst.path == str(dump / ("p-2.npy" if in_first else "p-10.npy"))
        assert worst.row == (row if in_first else row - 500)
        assert worst.target == rows[2][row]
        assert worst.kl == pytest.approx(each["kl"][i], rel=1e-11)
        assert worst.loss_base == pytest.approx(each["base"][i], rel=1e-11)
        assert worst.loss_other == pytest.approx(each["other"][i], rel=1e-11)
    assert {w.path for w in found} == {str(dump / "p-2.npy"), str(dump / "p-10.npy")}
    assert compare(dump, worst=0).worst == ()


def test_ignored_rows_are_left_out_of_everything(tmp_path, dump, rows):
    p, q, y = (array.copy() for array in rows)
    kept = y != -100
    p[~kept], q[~kept] = np.nan, 5.0
    for name, array in (("p", p), ("q", q), ("y", y)):
        np.save(tmp_path / f"{name}-all.npy", array)
        np.save(tmp_path / f"{name}-kept.npy", array[kept])
    found, alone = (
        compare_files(*(tmp_path / f"{name}-{which}.npy" for name in "pqy"))
        for which in ("all", "kept")
    )
    assert (found.rows, found.ignored, found.nonfinite) == (N_ROWS, N_ROWS - kept.sum(), 0)
    for name in ("perplexity", "kl", "kl_reverse", "delta_p", "delta_p_rms", "same_top", "buckets"):
        assert getattr(found, name) == getattr(alone, name), name
    assert [w.row for w in found.worst] == [np.flatnonzero(kept)[w.row] for w in alone.worst]
    np.save(tmp_path / "y-all.npy", np.where(kept, y, 3))
    other = compare_files(
        *(tmp_path / f"{name}-all.npy" for name in "pqy"), ignore_index=3
    )  # the rows of NaN again, and those of class 3
    assert other.ignored == np.count_nonzero(~kept | (y == 3))


def test_without_targets_there_is_the_divergence(tmp_path, rows):
    p, q, _ = rows
    np.save(tmp_path / "p.npy", p)
    np.save(tmp_path / "q.npy", q)
    found = compare_files(tmp_path / "p.npy", tmp_path / "q.npy")
    each = per_row(p, q, np.zeros(N_ROWS, int))
    assert (found.rows, found.ignored) == (N_ROWS, 0)
    assert (found.perplexity, found.delta_p, found.delta_p_rms) == (None, None, None)
    close(found.kl.mean, mean_error(each["kl"]))
    assert found.same_top.value == sum(each["same"]) / N_ROWS
    assert sum(bucket.rows for bucket in found.buckets) == N_ROWS
    first = found.worst[0]
    assert first.row == max(range(N_ROWS), key=lambda i: each["kl"][i])
    assert (first.target, first.loss_base, first.loss_other) == (None, None, None)
    assert found.as_dict()["figures"]["perplexity"] is None
    with pytest.raises(ValueError, match="targets: llama_compat needs them"):
        compare_files(tmp_path / "p.npy", tmp_path / "q.npy", llama_compat=True)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "bfloat16"])
def test_identical_dumps_do_not_differ(tmp_path, rows, dtype):
    x = rows[0].astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", rows[2])
    found = compare_files(tmp_path / "x.npy", tmp_path / "x.npy", tmp_path / "y.npy")
    assert (found.kl.minimum, found.kl.maximum) == (0.0, 0.0)
    assert (found.kl.mean.value, found.kl_reverse.value, found.kl.mean.error) == (0.0, 0.0, 0.0)
    assert found.same_top.value == 1.0
    assert (found.perplexity.ratio.value, found.perplexity.ratio.error) == (1.0, 0.0)
    assert (found.perplexity.difference.value, found.perplexity.difference.error) == (0.0, 0.0)
    assert found.perplexity.correlation == 1.0
    assert (found.delta_p_rms.value, found.delta_p_rms.error) == (0.0, 0.0)


@pytest.mark.parametrize("base", ["<f2", "bfloat16", "<f4", ">f8"])
@pytest.mark.parametrize("other", [">f2", "bfloat16", "<f4", "<f8"])
def test_dtypes_may_differ(tmp_path, rows, base, other):
    p, q = (
        x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for x, dtype in zip(rows[:2], (base, other), strict=True)
    )
    np.save(tmp_path / "p.npy", p)
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "y.npy", rows[2])
    found = compare_files(tmp_path / "p.npy", tmp_path / "q.npy", tmp_path / "y.npy")
    each = per_row(p.astype(float), q.astype(float), rows[2])
    # Each row's values are float32 where both are narrower than float64.
    close(found.kl.mean, mean_error(each["kl"]), rel=1e-6)
    close(found.kl_reverse, mean_error(each["reverse"]), rel=1e-6)
    assert found.perplexity.other.value == pytest.approx(
        math.exp(mean_error(each["other"])[0]), rel=1e-6
    )
    assert found.perplexity.base.value == pytest.approx(math.exp(mean_error(each["base"])[0]), rel=1e-6)
    assert found.same_top.value == sum(each["same"]) / len(each["same"])
    assert [found.base[0].dtype, found.other[0].dtype] == [
        "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name for dtype in (base, other)
    ]


def without_files(found):
    """Return all figures but the names of files, and rows counted through."""
    return dataclasses.replace(found, base=(), other=(), targets=(), worst=())


@pytest.mark.parametrize("llama_compat", [False, True])
def test_neither_blocks_nor_threads_nor_shards_change_a_bit(
    tmp_path, dump, rows, monkeypatch, llama_compat
):
    whole = compare(dump, num_threads=1, llama_compat=llama_compat)
    for name, array in zip("pqy", rows, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    one = compare_files(*(tmp_path / f"{n}.npy" for n in "pqy"), llama_compat=llama_compat)
    assert without_files(one) == without_files(whole)
    monkeypatch.setattr("fastce.scoring.llama._BLOCK_ELEMENTS", 3 * N_CLASSES)
    for block_rows in (1, 97):
        monkeypatch.setattr("fastce.scoring.compare._MIB", block_rows * 2 * N_CLASSES * 8)
        seen = []
        cut = compare(dump, num_threads=2, block_mib=1, progress=seen.append, llama_compat=llama_compat)
        assert len(seen) == math.ceil(N_ROWS / block_rows)
        assert cut == whole


def test_three_axes_are_rows(tmp_path, rows):
    p, q, y = (array[:1_200] for array in rows)
    np.save(tmp_path / "p-0.npy", p.reshape(40, 30, N_CLASSES))
    np.save(tmp_path / "q-0.npy", q)
    np.save(tmp_path / "y.npy", y.reshape(40, 30))
    cube = compare(tmp_path)
    np.save(tmp_path / "p-0.npy", p)
    np.save(tmp_path / "y.npy", y.astype(np.int16))
    flat = compare(tmp_path)
    assert without_files(cube) == without_files(flat)
    assert cube.worst == flat.worst


def test_progress_tells_rows_bytes_and_mean(dump, monkeypatch):
    monkeypatch.setattr("fastce.scoring.compare._MIB", 500 * 2 * N_CLASSES * 8)
    seen = []
    found = compare(dump, block_mib=1, progress=seen.append)
    assert all(isinstance(at, CompareProgress) for at in seen)
    assert [at.rows_done for at in seen] == [500, 1_000, N_ROWS]
    assert (seen[-1].rows_total, seen[-1].row_bytes) == (N_ROWS, 2 * N_CLASSES * 8)
    assert seen[-1].mean_kl == pytest.approx(found.kl.mean.value)


def test_vocab_leaves_the_padding_out(tmp_path, dump, rows):
    p, q, _ = rows
    np.save(tmp_path / "padded.npy", np.pad(p, ((0, 0), (0, 5)), constant_values=9.0))
    np.save(tmp_path / "q.npy", q)
    exact = compare_files([dump / "p-2.npy", dump / "p-10.npy"], tmp_path / "q.npy", dump / "y.npy")
    cut = compare_files(tmp_path / "padded.npy", tmp_path / "q.npy", dump / "y.npy", vocab=N_CLASSES)
    assert without_files(cut) == without_files(exact)
    with pytest.raises(InputError, match=r"q\.npy: expected 16 classes as in .*padded\.npy, got 11;"):
        compare_files(tmp_path / "padded.npy", tmp_path / "q.npy", dump / "y.npy")
    with pytest.raises(InputError, match=r"q\.npy: expected at least 12 classes, as vocab says"):
        compare_files(tmp_path / "padded.npy", tmp_path / "q.npy", dump / "y.npy", vocab=12)


def test_dumps_must_hold_the_same_rows(tmp_path, dump, rows):
    np.save(tmp_path / "short.npy", rows[1][:-1])
    with pytest.raises(InputError) as caught:
        compare_files(dump / "p-*.npy", tmp_path / "short.npy")
    assert str(caught.value) == (
        f"{tmp_path}/short.npy: expected {N_ROWS} rows as in {dump}/p-2.npy and 1 more, "
        f"got {N_ROWS - 1}; compare dumps of the same rows"
    )
    np.save(tmp_path / "flat.npy", rows[1][0])
    with pytest.raises(InputError, match=r"flat\.npy: expected logits of shape"):
        compare_files(dump / "p-*.npy", tmp_path / "flat.npy")
    np.save(tmp_path / "y.npy", rows[2][1:])
    with pytest.raises(InputError, match=r"y\.npy: expected targets of shape \(1237,\)"):
        compare(dump)


def test_target_outside_names_file_row_and_value(dump, rows):
    y = rows[2].copy()
    y[541] = 11
    np.save(dump / "y.npy", y)
    with pytest.raises(InputError) as caught:
        compare(dump)
    assert str(caught.value) == (
        f"{dump}/y.npy: row 541 = 11 is outside [0, 11) (row 41 of {dump}/p-10.npy); "
        "if it is padding, set the ignore index to 11"
    )
    with pytest.raises(InputError, match=r"row 0 = -100 is outside \[0, 11\)"):
        compare(dump, ignore_index=None)
    huge = rows[2].astype(np.uint64)  # -100 is 2^64 - 100 there
    np.save(dump / "y.npy", huge)
    with pytest.raises(InputError, match=rf"row 0 = {2**64 - 100} is outside"):
        compare(dump)


def test_options_are_checked(dump):
    options = {"vocab": 0, "worst": -1, "block_mib": 0, "num_threads": 0, "backend": "fortran"}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            compare(dump, **{name: value})
    for name in ("base", "other"):
        files = {"base": dump / "p-2.npy", "other": dump / "p-2.npy", name: []}
        with pytest.raises(ValueError, match=f"{name}: expected at least one file"):
            compare_files(**files)


def test_rows_that_are_not_finite_are_counted(tmp_path):
    p = np.array([[0.0, 1.0], [np.nan, 0.0], [0.0, 0.0], [1.0, -np.inf], [0.0, 2.0]])
    q = np.array([[0.0, 1.0], [0.0, 0.0], [0.0, -np.inf], [1.0, -np.inf], [0.0, 1.0]])
    np.save(tmp_path / "p.npy", p)
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "y.npy", np.zeros(5, int))
    found = compare_files(tmp_path / "p.npy", tmp_path / "q.npy", tmp_path / "y.npy", worst=2)
    # NaN once, and class 1 of row 2 is possible in base alone
    assert found.nonfinite == 2
    assert [w.row for w in found.worst] == [1, 2]
    assert found.worst[1].kl == math.inf
    assert all(math.isnan(x) for x in (found.kl.mean.value, found.kl.maximum, found.kl.minimum))
    assert found.as_dict()["figures"]["kl"]["percentiles"]["50"] is None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["figures"]["nonfinite"] == 2
    assert sum(bucket.rows for bucket in found.buckets) == 4
    # in all rows but that of NaN
    assert found.same_top.value == 4 / 5
    np.save(tmp_path / "p.npy", p[2:])
    np.save(tmp_path / "q.npy", q[2:])
    infinite = compare_files(tmp_path / "p.npy", tmp_path / "q.npy")
    assert (infinite.kl.mean.value, infinite.kl.maximum) == (math.inf, math.inf)
    assert infinite.kl.percentiles[10] == pytest.approx(0.2 * percentile_of_last(p, q), rel=1e-12)


def percentile_of_last(p, q):
    """KL of the last row, the second largest of 0, that and infinity."""
    return kl(log_softmax(p[-1].tolist()), log_softmax(q[-1].tolist()))


@pytest.mark.parametrize("llama_compat", [False, True])
@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_kept_row_has_no_figures(tmp_path, n_rows, llama_compat):
    np.save(tmp_path / "x.npy", np.zeros((n_rows, 2)))
    np.save(tmp_path / "y.npy", np.full(n_rows, -100))
    seen = []
    found = compare_files(
        *(tmp_path / f"{name}.npy" for name in "xxy"), llama_compat=llama_compat, progress=seen.append
    )
    assert (found.rows, found.ignored, found.worst) == (n_rows, n_rows, ())
    assert math.isnan(found.kl.mean.value)
    assert math.isnan(found.perplexity.ratio.value)
    assert math.isnan(found.same_top.value)


def test_a_file_changed_while_it_is_read_is_refused(dump, monkeypatch):
    monkeypatch.setattr("fastce.scoring.compare._MIB", 100 * 2 * N_CLASSES * 8)

    def touch(at):
        os.utime(dump / "q-1.npy", ns=(1, 1))

    with pytest.raises(InputError, match=r"q-1\.npy: was changed while it was read"):
        compare(dump, block_mib=1, progress=touch)


# Formats that say what their numbers are, stood in for by .npy files.


def fake_kinds(monkeypatch, **changes):
    """Let files whose name starts with a key have a source with these fields."""
    real_find, real_open = formats.find, formats.open_source

    def find(paths, role, **options):
        if role == "targets" and str(paths).endswith("p.npy"):
            paths = str(paths).replace("p.npy", "y.npy")
        found = real_find(paths, role, **options)
        return [dataclasses.replace(s, **changes.get(s.path.name[0], {})) for s in found]

    def open_source(source):
        return npy.open_reader(source) if source.format == "kld" else real_open(source)

    monkeypatch.setattr("fastce.scoring.shards.find", find)
    monkeypatch.setattr("fastce.scoring.compare.open_source", open_source)


@pytest.fixture
def logprobs(tmp_path, rows):
    """Log-probabilities that are off by a thousandth, as quantised ones are, of float32."""
    p, q, y = rows
    l_p, l_q = (np.array([log_softmax(row) for row in x.tolist()]) + 1e-3 for x in (p, q))
    for name, array in (("p", l_p.astype(np.float32)), ("q", l_q.astype(np.float32)), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_logprobs_are_taken_as_they_are_for_losses(logprobs, rows, monkeypatch):
    paths = [logprobs / f"{name}.npy" for name in "pqy"]
    as_logits = compare_files(*paths)
    fake_kinds(monkeypatch, p={"kind": "logprobs"}, q={"kind": "logprobs"})
    found = compare_files(*paths)
    kept = rows[2] != -100
    target = rows[2][kept]
    for name, estimate in (("p", found.perplexity.base), ("q", found.perplexity.other)):
        values = np.load(logprobs / f"{name}.npy")[kept][np.arange(len(target)), target]
        losses = [-x for x in values.tolist()]
        mean, error = mean_error(losses)
        close(estimate, (math.exp(mean), math.exp(mean) * error))
    assert found.perplexity.base.value < as_logits.perplexity.base.value
    for name in ("kl", "kl_reverse", "same_top", "buckets"):
        assert getattr(found, name) == getattr(as_logits, name)


def test_targets_in_base_are_found(tmp_path, logprobs):
    y = np.load(logprobs / "y.npy")
    arrays = {"logits": np.load(logprobs / "p.npy"), "labels": y}
    safetensors.numpy.save_file(arrays, tmp_path / "p.safetensors")
    given = compare_files(*(logprobs / f"{name}.npy" for name in "pqy"))
    found = compare_files(tmp_path / "p.safetensors", logprobs / "q.npy")
    assert found.perplexity == given.perplexity
    assert [source.path for source in found.targets] == [f"{tmp_path / 'p.safetensors'}::labels"]


def test_kld_files_of_both(tmp_path, logprobs):
    for name in "pq":
        source, targets = logprobs / f"{name}.npy", logprobs / "y.npy"
        convert(source, tmp_path / f"{name}.kld", targets=targets)
    found = compare_files(tmp_path / "p.kld", tmp_path / "q.kld")
    given = compare_files(*(logprobs / f"{name}.npy" for name in "pqy"))
    # 65535 steps over 16 nats: off by up to 1.3e-4 each
    assert found.kl.mean.value == pytest.approx(given.kl.mean.value, rel=1e-3)
    assert found.perplexity.ratio.value == pytest.approx(given.perplexity.ratio.value, rel=1e-3)
    assert found.same_top.value == pytest.approx(given.same_top.value, abs=2e-3)


def test_probabilities_are_refused_and_kinds_not_mixed(logprobs, monkeypatch):
    fake_kinds(monkeypatch, q={"kind": "probs"})
    with pytest.raises(InputError, match=r"q\.npy: expected logits or log-probabilities, got prob"):
        compare_files(logprobs / "p.npy", logprobs / "q.npy")
    monkeypatch.undo()
    fake_kinds(monkeypatch, q={"kind": "logprobs"})
    with pytest.raises(InputError, match=r"q\.npy: expected logits as in .*p\.npy, got logprobs"):
        compare_files([logprobs / "p.npy", logprobs / "q.npy"], logprobs / "p.npy")


# llama.cpp's table, a term at a time: binary32 numbers are np.float32, binary64 ones Python's floats.

F = np.float32


def expf(x):
    return F(math.exp(float(x)))


def llama_row(x, base, target):
    """Return the values of one row as llama.cpp computes them."""
    top, top_at = x[0], 0
    for i in range(1, len(x)):
        if x[i] > top:
            top, top_at = x[i], i
    sum_exp = 0.0
    for value in x:
        sum_exp += float(expf(value - top))
    log_sum_exp = F(math.log(sum_exp))
    nll, nll_base = top + log_sum_exp - x[target], -base[target]
    top = top + log_sum_exp
    divergence, base_top, base_at = 0.0, F(0), -1
    for i in range(len(x)):
        if i == 0 or base[i] > base_top:
            base_top, base_at = base[i], i
        if base[i] > F(-16):
            divergence += float(expf(base[i]) * (base[i] - x[i] + top))
    return nll, nll_base, divergence, top_at == base_at, expf(-nll) - expf(-nll_base)


def llama_mean(total, squares, n):
    mean = total / n
    variance = squares / n - mean * mean
    return mean, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0


def llama_percentile(ordered, fraction):
    position = F(fraction) * F(len(ordered) - 1)
    i = int(position)
    part = position - F(i)
    return (F(1) - part) * ordered[i] + part * ordered[min(i + 1, len(ordered) - 1)]


def llama_quantiles(values, percents):
    ordered, n = sorted(values), len(values)
    middle = ordered[n // 2] if n % 2 else F(0.5) * (ordered[n // 2] + ordered[n // 2 - 1])
    found = [float(ordered[-1])]
    for percent in percents:
        found.append(float(middle if percent == 50 else llama_percentile(ordered, percent / 100)))
    return [*found, float(ordered[0])]


def llama_text(x, base, y):
    """Print the whole table."""
    sums = dict.fromkeys(("a", "aa", "b", "bb", "ab", "k", "kk", "d", "dd", "dddd", "same"), 0.0)
    kl_values, d_values = [], []
    for row, base_row, target in zip(x, base, y, strict=True):
        if target == -100:
            continue
        a, b, k, same, d = llama_row(row, base_row, target)
        dd = float(d * d)
        values = {"a": a, "aa": a * a, "b": b, "bb": b * b, "ab": a * b, "k": k, "kk": k * k, "d": d}
        for name, value in {**values, "dd": dd, "dddd": dd * dd, "same": same}.items():
            sums[name] += float(value)
        kl_values.append(F(k))
        d_values.append(d)
    n = len(kl_values)
    log_a, error_a = llama_mean(sums["a"], sums["aa"], n)
    log_b, error_b = llama_mean(sums["b"], sums["bb"], n)
    covariance = (sums["ab"] / n - (sums["a"] / n) * (sums["b"] / n)) / (n - 1)
    ppl, ppl_base = math.exp(log_a), math.exp(log_b)
    log_error = math.sqrt(error_a * error_a + error_b * error_b - 2.0 * covariance)
    ratio = math.exp(log_a - log_b)
    ppl_error, base_error = ppl * error_a, ppl_base * error_b
    squares = ppl_error * ppl_error + base_error * base_error
    difference_error = math.sqrt(squares - 2.0 * (ppl * ppl_base * covariance))
    mean_dd, error_dd = llama_mean(sums["dd"], sums["dddd"], n)
    rms, same = math.sqrt(mean_dd), sums["same"] / n

    def pair(value, error):
        return f"{value:10.6f} ± {error:10.6f}"

    def percent(value, error):
        return f"{100.0 * value:6.3f} ± {100.0 * error:5.3f} %"

    lines = [
        "====== Perplexity statistics ======",
        "Mean PPL(Q)                   : " + pair(ppl, ppl_error),
        "Mean PPL(base)                : " + pair(ppl_base, base_error),
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100.0 * (covariance / (error_a * error_b)):6.2f}%",
        "Mean ln(PPL(Q)/PPL(base))     : " + pair(log_a - log_b, log_error),
        "Mean PPL(Q)/PPL(base)         : " + pair(ratio, ratio * log_error),
        "Mean PPL(Q)-PPL(base)         : " + pair(ppl - ppl_base, difference_error),
        "",
        "====== KL divergence statistics ======",
        "Mean    KLD: " + pair(*llama_mean(sums["k"], sums["kk"], n)),
    ]
    names = ["Maximum", "99.9%  ", "99.0%  ", "95.0%  ", "90.0%  ", "Median ", "10.0%  ", " 5.0%  "]
    names += [" 1.0%  ", " 0.1%  ", "Minimum"]
    quantiles = llama_quantiles(kl_values, (99.9, 99, 95, 90, 50, 10, 5, 1, 0.1))
    lines += [f"{name} KLD: {value:10.6f}" for name, value in zip(names, quantiles, strict=True)]
    mean_d, error_d = llama_mean(sums["d"], sums["dd"], n)
    lines += [
        "",
        "====== Token probability statistics ======",
        "Mean    Δp: " + percent(mean_d, error_d),
    ]
    names[5:5], names[7:7] = ["75.0%  "], ["25.0%  "]
    quantiles = llama_quantiles(d_values, (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1))
    lines += [f"{name} Δp: {100.0 * value:6.3f}%" for name, value in zip(names, quantiles, strict=True)]
    same_error = math.sqrt(same * (1.0 - same) / (n - 1))
    lines += [
        "RMS Δp    : " + percent(rms, 0.5 / rms * error_dd),
        "Same top p: " + percent(same, same_error),
    ]
    return "\n".join(lines) + "\n"


def run(capsys, *argv):
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("n_rows", [100, 700, 701])
def test_llama_compat_is_the_same_to_the_last_digit(tmp_path, capsys, monkeypatch, n_rows):
    rng = np.random.default_rng(n_rows)
    x = (8 * rng.standard_normal((n_rows, 40))).astype(np.float32)  # some are below -16
    z = (x + rng.standard_normal(x.shape)).astype(np.float16)
    x[:20, 5] = x[:20].max(axis=1)  # equal ones at the top
    base = fastce.log_softmax(x)
    assert (base <= -16).any(axis=1).mean() > 0.5
    y = rng.integers(40, size=n_rows)
    if n_rows > 100:
        y[::11] = -100
    for name, array in (("p", base), ("x", x), ("q", z), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    expected = llama_text(z.astype(np.float32), base, y)
    argv = (str(tmp_path / "q.npy"), "--targets", str(tmp_path / "y.npy"), "--llama-compat")
    # log-probabilities of logits
    assert run(capsys, "compare", str(tmp_path / "x.npy"), *argv) == (0, expected, "")
    # and as a format gives them, rounded, so that they do not add up to one
    base = np.round(base, 3)
    np.save(tmp_path / "p.npy", base)
    fake_kinds(monkeypatch, p={"kind": "logprobs"})
    expected = llama_text(z.astype(np.float32), base, y)
    assert run(capsys, "compare", str(tmp_path / "p.npy"), *argv) == (0, expected, "")


def test_llama_compat_agrees_with_the_accurate_figures(dump):
    exact, compat = compare(dump), compare(dump, llama_compat=True)
    assert compat.llama_compat
    assert not exact.llama_compat
    assert (compat.kl_reverse, compat.buckets) == (None, ())
    assert [w.row for w in compat.worst] == [w.row for w in exact.worst]
    for name in ("other", "base", "log_ratio", "ratio", "difference"):
        close(getattr(compat.perplexity, name), astuple(getattr(exact.perplexity, name)), rel=1e-3)
    close(compat.kl.mean, astuple(exact.kl.mean), rel=1e-3)
    close(compat.delta_p_rms, astuple(exact.delta_p_rms), rel=1e-3)
    assert compat.same_top == exact.same_top
    for percent, value in exact.kl.percentiles.items():
        assert compat.kl.percentiles[percent] == pytest.approx(value, rel=1e-3, abs=1e-6)


def astuple(estimate):
    return estimate.value, estimate.error


def test_llama_compat_prints_nothing_of_few_rows(tmp_path, capsys, rows):
    for name, array in zip("pqy", rows, strict=True):
        np.save(tmp_path / f"{name}.npy", array[:99])
    argv = [str(tmp_path / "p.npy"), str(tmp_path / "q.npy"), "--targets", str(tmp_path / "y.npy")]
    code, out, err = run(capsys, "compare", *argv, "--llama-compat")
    assert (code, out) == (3, "")
    assert err.startswith("fastce: llama.cpp's table needs 100 rows, got 91;")
    assert run(capsys, "compare", *argv, "--llama-compat", "-o", "json")[0] == 0


# The command line.


@pytest.fixture
def argv(dump, monkeypatch):
    monkeypatch.chdir(dump)
    return ["compare", "p-*.npy", "q-*.npy", "--targets", "y.npy"]


def test_compare_prints_a_table(capsys, dump, argv, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    found = compare(dump)
    assert f"{found.perplexity.ratio.value:.6f} ± {found.perplexity.ratio.error:.6f}" in out
    assert re.search(rf"Median +{found.kl.percentiles[50]:.6f} +-?\d\.\d+%", out)
    for name in ("Mean PPL(Q)", "Mean KLD(Q, base)", "RMS Δp", "Same top p", "90% to 100%"):
        assert name in out
    assert out.count("p-2.npy") + out.count("p-10.npy") == 10
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    out = run(capsys, *argv[:3], "--worst", "0")[1]
    assert "PPL" not in out
    assert "Δp" not in out
    assert "npy" not in out


def test_compare_prints_json_and_markdown(capsys, dump, argv):
    code, out, err = run(capsys, *argv, "-o", "json", "--num-threads", "1", "--backend", "numpy")
    assert (code, err) == (0, "")
    document = json.loads(out)
    found = compare_files("p-*.npy", "q-*.npy", "y.npy", num_threads=1, backend="numpy")
    assert document["figures"] == found.as_dict()["figures"]
    assert document["inputs"] == found.as_dict()["inputs"]
    assert document["schema_version"] == 2
    assert document["run"]["backend"] == "numpy"
    assert [source["path"] for source in document["inputs"]["base"]] == ["p-2.npy", "p-10.npy"]
    assert document["figures"]["kl"]["percentiles"]["99.9"] == found.kl.percentiles[99.9]
    code, out, _ = run(capsys, *argv, "-o", "md")
    assert code == 0
    tables = [table.splitlines() for table in out.strip().split("\n\n")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
        assert set(table[1]) <= set("|-: ")


def test_exit_codes(capsys, dump, argv):
    np.save("q-9.npy", np.zeros((1, N_CLASSES)))
    code, out, err = run(capsys, *argv)
    assert (code, out) == (3, "")
    assert err.startswith(
        f"fastce: q-0.npy and 4 more: expected {N_ROWS} rows as in p-2.npy and 1 more"
    )
    os.remove("q-9.npy")
    assert run(capsys, *argv, "--worst", "-1")[0] == 2
    assert run(capsys, *argv[:3], "--llama-compat")[0] == 2
    assert run(capsys, "compare", "p-2.npy")[0] == 2
    np.save("y.npy", np.full(N_ROWS, -100))
    code, out, err = run(capsys, *argv, "-o", "json")
    assert code == 3
    assert json.loads(out)["figures"]["kl"]["mean"]["value"] is None
    assert err == f"fastce: no row was compared: all {N_ROWS} rows are ignored\n"


def test_rows_that_are_not_finite_are_told(capsys, dump, argv):
    q = np.load("q-1.npy")
    q[3, 3] = np.nan
    np.save("q-1.npy", q)
    code, _, err = run(capsys, *argv)
    assert code == 0
    assert err == "fastce: warning: 1 row has a loss or divergence that is NaN or infinite\n"


def test_progress_is_a_line_now_and_then(capsys, dump, argv, monkeypatch):
    monkeypatch.setattr("fastce.terminal._LINE_SECONDS", 0.0)
    err = run(capsys, *argv)[2]
    assert re.fullmatch(
        r"comparing: 100%, [\d,]+ rows/s, \d+\.\d\d GB/s, mean KLD 0\.\d{6}, 0:00 left\n", err
    )
    assert run(capsys, *argv, "--quiet")[2] == ""
