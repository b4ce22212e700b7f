"""Dask: a real scheduler and workers on loopback, workers killed, bits compared; and dask arrays."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import CancelledError
from unittest import mock

import dask.array as da
import numpy as np
import pytest

import fastce
from fastce.interop.dask import _Workers, cluster_executor, cross_entropy
from fastce.scoring import shards

N_ROWS, N_CLASSES = 4_000, 50


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(11)
    logits = (3 * rng.standard_normal((N_ROWS, N_CLASSES))).astype(np.float32)
    targets = rng.integers(N_CLASSES, size=N_ROWS)
    targets[::13] = -100
    return logits, targets


@pytest.fixture
def dump(tmp_path, rows, monkeypatch):
    np.save(tmp_path / "logits.npy", rows[0])
    np.save(tmp_path / "targets.npy", rows[1])
    monkeypatch.setattr(shards, "PART_BYTES", 40 * N_CLASSES * 4)  # 100 parts
    return tmp_path / "logits.npy", tmp_path / "targets.npy"


@pytest.fixture(scope="module")
def executor():
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the event loop's, which Dask starts
        with cluster_executor("local:3") as workers:
            yield workers


def folder_bytes(folder):
    """Return every file but those that a killed process was writing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".part"
    }


def test_workers_give_the_bits_of_one_process(tmp_path, dump, executor):
    one = fastce.score_files(*dump, out=tmp_path / "one")
    many = fastce.score_files(*dump, out=tmp_path / "many", executor=executor)
    assert many == one
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_workers_change_no_bit(tmp_path, dump, executor, seed):
    one = fastce.score_files(*dump, out=tmp_path / "one")
    rng = np.random.default_rng(seed)
    kill_at = sorted(int(n) for n in rng.integers(200, N_ROWS - 400, size=2))
    killed = []

    def kill(at):
        if kill_at and at.rows_done >= kill_at[0]:
            kill_at.pop(0)
            victim = executor._client.submit(os.getpid, pure=False).result()
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    many = fastce.score_files(*dump, out=tmp_path / "many", executor=executor, progress=kill)
    assert len(killed) == 2
    assert many == one
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


@pytest.mark.parametrize("way", [CancelledError(), TimeoutError()])
def test_lost_results_are_computed_again(way):
    def losing(n_lost):
        client = mock.Mock()
        task = client.submit.return_value
        task.result.side_effect = [way] * n_lost + [32]
        task.add_done_callback.side_effect = lambda callback: callback(task)
        return client

    client = losing(3)
    assert _Workers(client).submit(pow, 2, 5).result(timeout=1) == 32
    assert client.submit.return_value.cancel.call_count == 3
    with pytest.raises(type(way)):
        _Workers(losing(4)).submit(pow, 2, 5).result(timeout=1)


@pytest.fixture
def cluster(tmp_path):
    """Start a scheduler and three workers as the README does; return its address and the workers."""
    address_file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    here = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0"]
    scheduler = subprocess.Popen([*dask, "scheduler", *here, "--scheduler-file", address_file], **quiet)
    workers = [
        subprocess.Popen(
            [*dask, "worker", "--scheduler-file", address_file, "--nthreads", "1"]
            + ["--no-dashboard", "--no-nanny", "--local-directory", str(tmp_path)],
            **quiet,
        )
        for _ in range(3)
    ]
    while not address_file.exists() or not address_file.read_text():
        assert scheduler.poll() is None
        time.sleep(0.1)
    yield json.loads(address_file.read_text())["address"], workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


def test_a_real_cluster_loses_workers_but_no_row(tmp_path, dump, cluster):
    address, workers = cluster
    one = fastce.score_files(*dump, out=tmp_path / "one")
    victims = [workers[0], workers[1]]  # nobody starts them again

    def kill(at):
        if victims and at.rows_done > N_ROWS * (3 - len(victims)) // 4:
            victims.pop().kill()

    with cluster_executor(address) as executor:
        executor._client.wait_for_workers(3, timeout=60)
        many = fastce.score_files(*dump, out=tmp_path / "many", executor=executor, progress=kill)
    assert not victims
    assert many == one
    assert folder_bytes(tmp_path / "many") == folder_bytes(tmp_path / "one")


def test_a_bad_target_is_named_from_a_worker(dump, rows, executor):
    targets = rows[1].copy()
    targets[3_333] = N_CLASSES
    np.save(dump[1], targets)
    with pytest.raises(fastce.scoring.InputError, match=r"row 3333 = 50 is outside \[0, 50\)"):
        fastce.score_files(*dump, executor=executor)


@pytest.mark.parametrize("address", ["local", "local:0", "local:x", "10.0.0.1:8786", ""])
def test_addresses_are_checked(address):
    with (
        pytest.raises(ValueError, match="expected tcp://HOST:PORT or local:N"),
        cluster_executor(address),
    ):
        pass


@pytest.mark.parametrize("chunks", [1_000, 333, N_ROWS])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_dask_arrays(rows, chunks, reduction):
    x, y = da.from_array(rows[0], chunks=(chunks, -1)), da.from_array(rows[1], chunks=500)
    lazy = cross_entropy(x, y, reduction=reduction, label_smoothing=0.1, base=2)
    expected = fastce.cross_entropy(*rows, reduction=reduction, label_smoothing=0.1, base=2)
    found = lazy.compute(scheduler="synchronous")
    assert lazy.shape == np.shape(expected)
    assert lazy.dtype == found.dtype
    if reduction == "none":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # the losses summed are float32


def test_dask_arrays_with_weights_more_axes_and_probabilities(rows):
    x, y = rows
    weight = np.linspace(0.5, 2, N_CLASSES)
    found = cross_entropy(da.from_array(x, chunks=(700, -1)), y, weight=weight).compute()
    assert found == pytest.approx(fastce.cross_entropy(x, y, weight=weight), rel=1e-6)
    deep, deep_y = x.reshape(40, 100, -1).astype(float), y.reshape(40, 100)
    found = cross_entropy(da.from_array(deep, chunks=(7, 30, -1)), deep_y, reduction="none").compute()
    np.testing.assert_array_equal(
        found, fastce.cross_entropy(deep, deep_y, axis=-1, reduction="none").reshape(40, 100)
    )
    q = fastce.softmax(x[::-1])
    found = cross_entropy(da.from_array(x, chunks=(700, -1)), da.from_array(q, chunks=500)).compute()
    assert found == pytest.approx(fastce.cross_entropy(x, q), rel=1e-6)


def test_dask_arrays_are_checked(rows):
    x = da.from_array(rows[0], chunks=(1_000, 25))
    with pytest.raises(ValueError, match=r"class axis in one chunk, got 2; .*rechunk"):
        cross_entropy(x, rows[1])
    with pytest.raises(ValueError, match="targets: expected shape"):
        cross_entropy(x.rechunk({-1: -1}), rows[1][1:])
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy(x.rechunk({-1: -1}), rows[1], reduction="median")
