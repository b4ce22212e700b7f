"""Disks that are full or fail: an error that names the file, nothing torn, and a run that goes on."""

import errno
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from runs import N_CLASSES, PART_BYTES, contents, fork, score, wait, write_dump

from fastce.scoring import InputError
from fastce.scoring.atomic import atomic_file
from fastce.scoring.formats import find, open_source
from fastce.scoring.records import verify


@pytest.fixture
def dump(tmp_path, monkeypatch):
    monkeypatch.setattr("fastce.scoring.shards.PART_BYTES", PART_BYTES)
    return write_dump(tmp_path / "dump")


def fail_at(step, name, number, monkeypatch):
    """Have the n-th call of a function of `os` fail; return a list that says that calls were made."""
    call, calls = getattr(os, name), []

    def stepped(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    monkeypatch.setattr(os, name, stepped)
    return calls


def attempts(tmp_path, monkeypatch, name, number, work):
    """Yield each attempt's step, folder, error and calls, until a run has fewer calls than the step."""
    step = 0
    while True:
        step += 1
        out = tmp_path / f"{name}-{number}-{step}"
        with monkeypatch.context() as patch:
            calls = fail_at(step, name, number, patch)
            try:
                work(out)
            except OSError as error:
                found = error
            else:
                assert len(calls) == step - 1 > 10
                return
        yield step, out, found, calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_each_write_fails(dump, tmp_path, monkeypatch, number):
    score(dump, tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    for _, out, error, _ in attempts(tmp_path, monkeypatch, "write", number, lambda o: score(dump, o)):
        assert error.errno == number
        assert str(out) in str(error)
        assert os.strerror(number) in str(error)
        found = contents(out)
        assert found.items() < undisturbed.items()
        assert list(out.rglob("*.part")) == []
        score(dump, out)
        assert contents(out) == undisturbed


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_each_fsync_or_rename_fails(dump, tmp_path, monkeypatch, name):
    """It is told, and never tried again: the pages that were not written may pass for written."""
    score(dump, tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    for step, out, error, calls in attempts(
        tmp_path, monkeypatch, name, errno.EIO, lambda out: score(dump, out)
    ):
        assert len(calls) == step
        assert error.errno == errno.EIO
        assert name == "replace" or str(out.parent) in str(error)
        assert contents(out).items() <= undisturbed.items()
        assert list(out.rglob("*.part")) == []
        score(dump, out)
        assert contents(out) == undisturbed


def test_earlier_results_stay_whole(dump, tmp_path, monkeypatch):
    """A run with other options that fails leaves each file as it was or as it is to be."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    score(dump, tmp_path / "old")
    score(dump, tmp_path / "new", temperature=2)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert old["figures.json"] != new["figures.json"]

    def work(out):
        out.mkdir()
        for name, data in old.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
        score(dump, out, temperature=2)

    for _, out, _, _ in attempts(tmp_path, monkeypatch, "write", errno.ENOSPC, work):
        found = contents(out)
        assert old.keys() <= found.keys() <= old.keys() | new.keys()
        assert all(data in (old.get(name), new.get(name)) for name, data in found.items())
        score(dump, out, temperature=2)
        assert contents(out) == {**old, **new}
        assert verify(out) == []


def test_short_writes(dump, tmp_path, monkeypatch):
    score(dump, tmp_path / "undisturbed")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:7])))
    score(dump, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_limit_of_file_size(dump, tmp_path):
    """The system itself refuses bytes, some of a write or all."""
    resource = pytest.importorskip("resource")
    score(dump, tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    sizes = sorted({len(data) for data in undisturbed.values()})

    def work(limit, out):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            score(dump, out)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG and str(out) in str(error) else 1)

    for limit in (0, 1, *(size - 1 for size in sizes), sizes[-1]):
        out = tmp_path / f"{limit}"
        status = wait(fork(lambda limit=limit, out=out: work(limit, out)))
        assert os.waitstatus_to_exitcode(status) == (0 if limit == sizes[-1] else 7)
        found = contents(out)
        assert found.items() <= undisturbed.items()
        assert all(len(data) <= limit for data in found.values())
        assert list(out.rglob("*.part")) == []
        score(dump, out)
        assert contents(out) == undisturbed


def test_what_is_on_disk_before_what(dump, tmp_path, monkeypatch):
    """The order that a power cut cannot break: data, name, folder, and the record after the losses."""
    done = []

    def note(name, path_of):
        call = getattr(os, name)

        def noted(*arguments):
            done.append((name, path_of(*arguments)))
            return call(*arguments)

        monkeypatch.setattr(os, name, noted)

    def of_handle(handle, *_):
        return os.readlink(f"/proc/self/fd/{handle}")

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    note("write", of_handle)
    note("fsync", of_handle)
    note("replace", lambda part, name: (str(part), str(name)))
    out = tmp_path / "out"
    score(dump, out)
    on_disk = {}
    for at, (name, places) in enumerate(done):
        if name == "replace":
            part, final = places
            own = [i for i, (_, place) in enumerate(done) if place == part]
            assert done[own[-1]][0] == "fsync"
            assert own[-1] < at
            assert done[at + 1] == ("fsync", os.path.dirname(final))
            on_disk[os.path.relpath(final, out)] = (own[0], at + 1)
    assert on_disk.keys() == contents(out).keys()
    for name, (begun, _) in on_disk.items():
        if name.startswith("parts/") and name.endswith(".json"):
            assert on_disk[name.replace(".json", ".npy")][1] < begun
        if name.startswith("parts/"):
            assert on_disk["plan.json"][1] < begun
            assert on_disk[name][1] < on_disk["figures.json"][0]
    assert max(on_disk, key=lambda name: on_disk[name][0]) == "figures.json"


def test_an_input_that_cannot_be_read_is_named(dump):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (source,) = find(dump / "logits-1.npy", "logits")
    with open_source(source) as reader:
        file = reader.file
        reader.file = SimpleNamespace(
            seek=file.seek, readinto=fail, fileno=file.fileno, close=file.close
        )
        with pytest.raises(InputError, match=r"logits-1\.npy: cannot be read: Input/output error"):
            reader.read_into(0, np.empty((1, N_CLASSES), np.float32))


def test_the_first_error_is_told(tmp_path, monkeypatch):
    """Not what goes wrong while it is cleared up after."""

    def fail(*_, **__):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.unlink", fail)
    with pytest.raises(RuntimeError, match="first"), atomic_file(tmp_path / "x"):
        raise RuntimeError("first")
    assert not (tmp_path / "x").exists()
