"""Parts and records: the same bytes by every way, nothing done twice, and nothing trusted unseen."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from runs import N_CLASSES, N_PARTS, PART_BYTES, PART_ROWS, contents, score, write_dump

import fastce
from fastce.scoring import IncompleteError, InputError, runner, score_files
from fastce.scoring.records import Folder, merge, verify


@pytest.fixture
def dump(tmp_path, monkeypatch):
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", PART_BYTES)
    return write_dump(tmp_path / "dump")


@pytest.fixture
def done(tmp_path, dump):
    """Run over the dump, undisturbed."""
    score(dump, tmp_path / "done")
    return tmp_path / "done"


@pytest.fixture
def scored(monkeypatch):
    """Note the names of the parts that are scored from here on."""
    names = []
    score_part = runner.score_part

    def noted(part, options, settings, name, *rest, **named):
        names.append(name)
        return score_part(part, options, settings, name, *rest, **named)

    monkeypatch.setattr(runner, "score_part", noted)
    return names


def part_names(out):
    return [part["name"] for part in Folder(out).read_plan()["parts"]]


# ---------------------------------------------------------------- the same bytes


def test_what_a_run_leaves(done):
    names = part_names(done)
    assert len(names) == N_PARTS
    assert contents(done).keys() == {
        "plan.json",
        "figures.json",
        "logits-1.loss.npy",
        "logits-2.loss.npy",
        *(f"parts/{name}.{ending}" for name in names for ending in ("npy", "json")),
    }
    assert list(done.rglob("*.part")) == []
    whole = np.concatenate([np.load(done / f"logits-{i}.loss.npy") for i in (1, 2)])
    parts = np.concatenate([np.load(done / "parts" / f"{name}.npy") for name in names])
    assert whole.tobytes() == parts.tobytes()


@pytest.mark.parametrize("n", [1, 2, 4, N_PARTS, N_PARTS + 3])
def test_shares_in_one_folder(dump, tmp_path, done, n):
    out = tmp_path / "out"
    shares = [score(dump, out, shard=(i, n)) for i in range(n, 0, -1)]
    figures = merge([out], out)
    assert contents(out) == contents(done)
    assert sum(share.rows for share in shares) == figures.rows
    assert figures == score(dump, tmp_path / "again")


def test_shares_in_folders_of_their_own(dump, tmp_path, done):
    folders = [tmp_path / f"{i}" for i in (1, 2, 3)]
    for i, folder in enumerate(folders, 1):
        score(dump, folder, shard=(i, 3))
        assert not (folder / "figures.json").exists()
    for out in (tmp_path / "new", folders[1]):
        merge(folders[::-1], out)
        assert contents(out) == contents(done)
        assert verify(out) == []


def test_shares_that_overlap(dump, tmp_path, done):
    score(dump, tmp_path / "half", shard=(1, 2))
    merge([tmp_path / "half", done], tmp_path / "new")
    assert contents(tmp_path / "new") == contents(done)


@pytest.mark.parametrize("share", [(0, 2), (3, 2), (1, 0), (-1, -1)])
def test_shares_are_checked(dump, tmp_path, share):
    with pytest.raises(ValueError, match="shard: expected"):
        score(dump, tmp_path / "out", shard=share)
    with pytest.raises(ValueError, match="shard: expected"):
        score(dump, None, shard=(1, 2))


def test_merge_refuses_what_is_missing_or_other(dump, tmp_path, done):
    score(dump, tmp_path / "half", shard=(2, 2))
    with pytest.raises(
        IncompleteError, match=f"3 of {N_PARTS} parts are missing, the first is logits-1"
    ):
        merge([tmp_path / "half"], tmp_path / "new")
    score(dump, tmp_path / "other", temperature=2)
    with pytest.raises(InputError, match="other: expected a run over the same files"):
        merge([done, tmp_path / "other"], tmp_path / "new")
    with pytest.raises(InputError, match="new: expected a folder of results"):
        merge([tmp_path / "new"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def executors():
    spawn = multiprocessing.get_context("spawn")
    return [lambda: ThreadPoolExecutor(4), lambda: ProcessPoolExecutor(2, mp_context=spawn)]


@pytest.mark.parametrize("make", executors(), ids=["threads", "processes"])
def test_executors(dump, tmp_path, done, make):
    seen = []
    with make() as executor:
        figures = score(dump, tmp_path / "out", executor=executor, progress=seen.append)
        assert figures == score(dump, None, executor=executor) == score(dump, None)
    assert contents(tmp_path / "out") == contents(done)
    assert [at.rows_done for at in seen] == sorted(at.rows_done for at in seen)
    assert len(seen) == N_PARTS
    assert seen[-1].rows_done == seen[-1].rows_total == figures.rows


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_worker_that_dies(dump, tmp_path, done, monkeypatch):
    out = tmp_path / "out"
    score(dump, out, shard=(1, 2))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        submit = executor.submit
        calls = []

        def submit_some(*arguments):
            calls.append(arguments)
            return submit(_die) if len(calls) == 2 else submit(*arguments)

        monkeypatch.setattr(executor, "submit", submit_some)
        with pytest.raises(BrokenExecutor):
            score(dump, out, executor=executor)
    assert not (out / "figures.json").exists()
    score(dump, out)
    assert contents(out) == contents(done)


@pytest.mark.parametrize("block_rows", [1, 3, 7, PART_ROWS])
def test_block_sizes(dump, tmp_path, done, monkeypatch, block_rows):
    monkeypatch.setattr(runner, "_MIB", 2 * block_rows * N_CLASSES * 4)
    seen = []
    score(dump, tmp_path / "out", block_mib=1, progress=seen.append)
    assert len(seen) >= 107 // block_rows
    assert contents(tmp_path / "out") == contents(done)


def test_threads(tmp_path, monkeypatch):
    """With the default backend, in blocks large enough for several threads."""
    rng = np.random.default_rng(8)
    np.save(tmp_path / "x.npy", rng.standard_normal((30_000, 16), np.float32))
    np.save(tmp_path / "y.npy", rng.integers(16, size=30_000))
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", 10_001 * 64)
    for n in (1, 2, 5):
        score_files(tmp_path / "x.npy", tmp_path / "y.npy", out=tmp_path / f"{n}", num_threads=n)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("n_done", range(N_PARTS + 1))
def test_a_failed_run_goes_on(dump, tmp_path, done, monkeypatch, scored, n_done):
    out = tmp_path / "out"
    scored.clear()
    noted = runner.score_part

    def fail(*arguments, **named):
        if len(scored) == n_done:
            raise KeyboardInterrupt
        return noted(*arguments, **named)

    monkeypatch.setattr(runner, "score_part", fail)
    if n_done < N_PARTS:
        with pytest.raises(KeyboardInterrupt):
            score(dump, out)
        assert len(list((out / "parts").glob("*.json"))) == n_done
        monkeypatch.setattr(runner, "score_part", noted)
    score(dump, out)
    assert scored == part_names(done)  # each once
    assert contents(out) == contents(done)


def test_a_resumed_run_tells_what_it_has(dump, tmp_path):
    out = tmp_path / "out"
    first = score(dump, out, shard=(1, 2))
    seen = []
    figures = score(dump, out, progress=seen.append)
    assert {at.rows_before for at in seen} == {first.rows}
    assert seen[0].rows_done > first.rows
    assert seen[-1].rows_done == seen[-1].rows_total == figures.rows
    assert seen[-1].mean_nll == figures.mean_nll
    assert seen[-1].standard_error == figures.standard_error


def test_only_what_is_missing_is_done(dump, done, scored):
    before = contents(done)
    for names in ([], part_names(done)[2:3], part_names(done)[1::2], part_names(done)):
        for ending in ("npy", "json"):
            for name in names:
                (done / "parts" / f"{name}.{ending}").unlink()
            scored.clear()
            score(dump, done)
            assert scored == names
            assert contents(done) == before


def test_without_resume_all_is_done(dump, done, scored):
    before = contents(done)
    score(dump, done, resume=False)
    assert len(scored) == N_PARTS
    assert contents(done) == before


def spoil(path, how, rng):
    """Damage a file."""
    data = path.read_bytes()
    at = rng.randrange(len(data))
    if how == "missing":
        path.unlink()
    elif how == "a byte flipped":
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    else:
        damaged = {"empty": b"", "cut": data[:at], "one byte short": data[:-1], "longer": data + b"\n"}
        path.write_bytes(damaged[how])


DAMAGES = ("missing", "empty", "cut", "one byte short", "longer", *["a byte flipped"] * 12)


@pytest.mark.parametrize("ending", ["npy", "json"])
def test_a_damaged_part_is_done_again(dump, done, scored, ending):
    before = contents(done)
    rng = random.Random(4)
    for how in DAMAGES:
        name = rng.choice(part_names(done))
        spoil(done / "parts" / f"{name}.{ending}", how, rng)
        scored.clear()
        score(dump, done)
        assert scored == [name], how
        assert contents(done) == before


def test_a_record_under_another_name(dump, done, scored):
    before = contents(done)
    first, second = part_names(done)[:2]
    for ending in ("npy", "json"):
        shutil.copy(done / "parts" / f"{first}.{ending}", done / "parts" / f"{second}.{ending}")
    assert any(second in text for text in verify(done))
    with pytest.raises(RuntimeError, match="two attempts at one part gave different results"):
        score(dump, done)
    (done / "parts" / f"{second}.json").unlink()
    scored.clear()
    score(dump, done)
    assert scored == [second]
    assert contents(done) == before


CHANGES = {
    "options": lambda dump, patch: {"temperature": 1.5},
    "ignored": lambda dump, patch: {"ignore_index": -99, "vocab": None, "top_k": (1, 5)},
    "top k": lambda dump, patch: {"top_k": (1, 2)},
    "bins": lambda dump, patch: {"n_bins": 10},
    "vocab": lambda dump, patch: {"vocab": N_CLASSES},
    "kind": lambda dump, patch: {"kind": "logprobs"},
    "backend": lambda dump, patch: {"backend": "numba"},
    "mask": lambda dump, patch: {"mask": dump / "targets.npy"},
    "fastce": lambda dump, patch: patch.setattr(runner, "__version__", "0.0.1"),
    "NumPy": lambda dump, patch: patch.setattr(np, "__version__", "0.0.1"),
    "targets": lambda dump, patch: os.utime(dump / "targets.npy", ns=(5, 5)),
    "place": lambda dump, patch: None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_record_of_something_else_is_not_trusted(dump, done, scored, monkeypatch, what):
    """Not even one that has its name; results of both then lie side by side."""
    targets = np.load(dump / "targets.npy")
    targets[targets == -100] = 0
    np.save(dump / "targets.npy", targets)
    score(dump, done)
    before = contents(done)
    options = CHANGES[what](dump, monkeypatch) or {}
    if what == "place":
        dump = dump.rename(dump.with_name("moved"))
    scored.clear()
    score(dump, done, **options)
    assert len(scored) == N_PARTS
    parts = {name: data for name, data in before.items() if name.startswith("parts/")}
    assert parts.items() < contents(done).items()


def test_a_changed_file_alone_is_done_again(dump, done, scored):
    time.sleep(0.01)
    logits = np.load(dump / "logits-2.npy")
    logits[0, 0] += 1
    np.save(dump / "logits-2.npy", logits)
    assert [text for text in verify(done) if "logits-2.npy: was changed" in text]
    score(dump, done)
    assert [name.partition("-0")[0] for name in scored] == ["logits-2"] * 3
    fresh = score(dump, done.with_name("fresh"))
    assert fresh.nll_sum == json.loads((done / "figures.json").read_text())["figures"]["nll_sum"]
    assert contents(done.with_name("fresh")).items() <= contents(done).items()


def test_two_results_of_one_part_are_told(dump, done):
    """A machine that computes otherwise than it says would go unnoticed."""
    name = part_names(done)[0]
    folder = Folder(done)
    record = folder.read_record(name, folder.read_plan()["parts"][0]["key"])
    record["tally"]["kept"] += 1
    (done / "parts" / f"{name}.json").unlink()
    folder.write_record(name, record)
    with pytest.raises(RuntimeError, match=rf"{name}\.json: two attempts at one part"):
        score(dump, done, resume=False)


def test_losses_that_change_before_the_end(dump, done, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def spoil_first(progress):
        if progress.rows_done == 107:
            (path,) = out.glob("parts/logits-1-000000000000.*.npy")
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(IncompleteError, match=r"logits-1-000000000000.*: was changed since"):
        score(dump, out, progress=spoil_first)
    assert not (out / "figures.json").exists()
    assert not (out / "logits-1.loss.npy").exists()
    score(dump, out)
    assert contents(out) == contents(done)


def test_what_killed_runs_left_goes_after_a_day(dump, done):
    names = [
        f"{folder}/{name}" for folder in (".", "parts") for name in ("a.npy.{}.part", "b.json.{}.part")
    ]
    left = [done / name.format(f"{i:032x}") for i, name in enumerate(names)]
    others = [done / "old.part", done / "parts" / "old.npy.part"]
    for path in (*left, *others):
        path.write_bytes(b"half")
    old = time.time() - 25 * 3600
    for path in (left[0], left[3], *others):
        os.utime(path, (old, old))
    score(dump, done)
    assert [path.exists() for path in (*left, *others)] == [False, True, True, False, True, True]


# ---------------------------------------------------------------- inputs that change meanwhile


def shorten(path):
    os.truncate(path, path.stat().st_size - 4)


def rewrite(path):
    data = path.read_bytes()
    path.write_bytes(data[:-8] + b"\0" * 8)


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"\0" * 20)


@pytest.mark.parametrize("change", [shorten, rewrite, lengthen])
@pytest.mark.parametrize("name", ["logits-2.npy", "targets.npy"])
def test_an_input_that_changes_while_it_is_read(dump, tmp_path, monkeypatch, change, name):
    monkeypatch.setattr(runner, "_MIB", 2 * 5 * N_CLASSES * 4)  # blocks of 5 rows
    whole = (dump / name).read_bytes()
    status = (dump / name).stat()
    out = tmp_path / "out"

    def at_row(progress):
        if progress.rows_done == 47 + PART_ROWS + 5:  # in the middle of a part
            time.sleep(0.01)
            change(dump / name)

    with pytest.raises(InputError, match=f"{dump / name}: was (changed|truncated) while it was read"):
        score(dump, out, block_mib=1, progress=at_row)
    n_done = 3 + 1
    assert len(contents(out)) == 1 + 2 * n_done
    assert list(out.rglob("*.part")) == []
    (dump / name).write_bytes(whole)
    os.utime(dump / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    score(dump, out, block_mib=1)
    score(dump, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_an_input_that_another_takes_the_place_of(dump, tmp_path):
    """The part that reads the old file is good; the next one is not begun with the new file."""

    def replace(progress):
        if progress.rows_done == PART_ROWS:
            np.save(tmp_path / "new.npy", np.zeros((47, N_CLASSES), np.float32))
            (tmp_path / "new.npy").replace(dump / "logits-1.npy")

    with pytest.raises(InputError, match=r"logits-1\.npy: was changed while it was read"):
        score(dump, tmp_path / "out", progress=replace)
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 1


# ---------------------------------------------------------------- verify


def findings(out):
    try:
        return verify(out)
    except InputError as error:
        return [str(error)]


def test_verify_finds_damage_to_each_file(done):
    assert verify(done) == []
    rng = random.Random(6)
    for name, data in contents(done).items():
        for how in ("missing", "empty", "cut", "one byte short", "longer", *["a byte flipped"] * 3):
            spoil(done / name, how, rng)
            found = findings(done)
            assert found, (name, how)
            assert all(name.rpartition(".")[0] in text for text in found), (name, how)
            (done / name).write_bytes(data)
    assert verify(done) == []


def test_verify_finds_a_header_of_another_dtype(done):
    """The bytes of the losses are all there, and mean something else."""
    path = done / "logits-1.loss.npy"
    path.write_bytes(path.read_bytes().replace(b"'<f4'", b"'<i4'"))
    assert verify(done) == ["logits-1.loss.npy: not the losses of its parts"]


def test_verify_finds_a_sum_that_is_not_the_losses(done):
    """Even of a record that is whole."""
    folder = Folder(done)
    part = folder.read_plan()["parts"][0]
    record = folder.read_record(part["name"], part["key"])
    tally = record["tally"]
    tally["sums"]["loss"], tally["sums"]["entropy"] = tally["sums"]["entropy"], tally["sums"]["loss"]
    (done / "parts" / f"{part['name']}.json").unlink()
    folder.write_record(part["name"], record)
    assert verify(done) == [f"parts/{part['name']}: the losses do not have the sum of the record"]


def test_verify_finds_too_few_rows(done):
    """Losses cut at a row, with a record that agrees."""
    folder = Folder(done)
    part = folder.read_plan()["parts"][0]
    record = folder.read_record(part["name"], part["key"])
    path = done / "parts" / f"{part['name']}.npy"
    np.save(path, np.load(path)[:-1])
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (done / "parts" / f"{part['name']}.json").unlink()
    folder.write_record(part["name"], record)
    assert any("expected 20 rows, got 19" in text for text in verify(done))


def test_verify_finds_inputs_that_changed(dump, done):
    (dump / "logits-1.npy").rename(dump / "kept.npy")
    assert verify(done) == []  # the results need the inputs no more
    (dump / "kept.npy").rename(dump / "logits-1.npy")
    os.utime(dump / "targets.npy", ns=(1, 1))
    lengthen(dump / "logits-2.npy")
    assert sorted(verify(done)) == [
        f"{dump}/logits-2.npy: was changed since it was scored",
        f"{dump}/targets.npy: was changed since it was scored",
    ]


def test_verify_finds_what_is_not_done(dump, tmp_path, done):
    score(dump, tmp_path / "half", shard=(1, 2))
    missing = part_names(done)[1::2]
    assert verify(tmp_path / "half") == [
        f"parts/{name}: no record that agrees with its losses" for name in missing
    ]
    with pytest.raises(InputError, match="expected a folder of results"):
        verify(dump)


def test_a_plan_cannot_name_files_elsewhere(done):
    folder = Folder(done)
    plan = folder.read_plan()
    for what in ("shards", "parts"):
        folder.write_plan({**plan, what: [{**plan[what][0], "name": "../elsewhere"}]})
        with pytest.raises(InputError, match=r"plan\.json: expected names, got '\.\./elsewhere'"):
            merge([done], done)


# ---------------------------------------------------------------- names, and nothing to do


def test_names_that_fall_together(tmp_path):
    """Files whose outputs would have one name get numbers: no losses take the place of others."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/x", "b/x", "a_x"):
        np.save(tmp_path / f"{name}.npy", np.zeros((1, 2)))
    np.save(tmp_path / "y.npy", [0, 1, 1])
    paths = [tmp_path / f"{name}.npy" for name in ("a/x", "b/x", "a_x")]
    score_files(paths, tmp_path / "y.npy", out=tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.loss.npy"))) == 3
    assert verify(tmp_path / "out") == []


def test_no_rows(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 3, 2)))
    np.save(tmp_path / "y.npy", np.zeros((0, 3), int))
    figures = score_files(tmp_path / "x.npy", tmp_path / "y.npy", out=tmp_path / "out")
    assert figures.rows == 0
    assert np.load(tmp_path / "out" / "x.loss.npy").shape == (0, 3)
    assert verify(tmp_path / "out") == []
    merge([tmp_path / "out"], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "out")


def test_losses_that_are_no_numbers(tmp_path):
    """Records hold NaN and infinities, and numbers beyond the floats' range."""
    x = np.array([[0, 1e308], [0, 1e308], [np.nan, 0], [0, np.inf], [-np.inf, 0], [0.0, 1.0]])
    np.save(tmp_path / "x.npy", x)
    for name, y in {"all": [0, 0, 0, 0, 0, 1], "large": [0, 0, 1, 1, 1, 1]}.items():
        np.save(tmp_path / f"{name}.npy", y)
        out = tmp_path / f"out-{name}"
        figures = score_files(tmp_path / "x.npy", tmp_path / f"{name}.npy", out=out, kind="logprobs")
        losses = np.load(out / "x.loss.npy")
        np.testing.assert_equal(figures.nll_sum, np.nan if name == "all" else -np.inf)
        assert figures.nonfinite == (~np.isfinite(losses)).sum()
        assert verify(out) == []
        scorer = fastce.Scorer(kind="logprobs")
        scorer.update(x, y)
        np.testing.assert_equal(scorer.figures().nll_sum, figures.nll_sum)


def test_losses_as_parquet_and_hashes_of_inputs(tmp_path, dump, done):
    found = score(dump, tmp_path / "out", loss_format="parquet", hash_inputs=True)
    inputs = (*found.logits, *found.targets)
    assert len(inputs) == 3
    for source in inputs:
        assert source.sha256 == hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
    for name in ("logits-1", "logits-2"):
        table = pyarrow.parquet.read_table(tmp_path / "out" / f"{name}.loss.parquet")
        np.testing.assert_array_equal(table["loss"].to_numpy(), np.load(done / f"{name}.loss.npy"))
    assert verify(tmp_path / "out") == []
