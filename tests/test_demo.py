"""The demo, with little training: right gradients, a model that learns, files that score the same."""

import os
import re
import shlex
from functools import partial

import numpy as np
import pytest

import fastce
from fastce import demo
from fastce.cli import main


def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(2)
    model = demo.ByteModel(rng)
    contexts = rng.integers(256, size=(8, demo._CONTEXT), dtype=np.uint8)
    targets = rng.integers(256, size=8, dtype=np.uint8)
    # In float64, where a difference of losses has digits to spare.
    for name, parameter in vars(model).items():
        setattr(model, name, parameter.astype(np.float64))
    _, gradients = model.loss_and_gradients(contexts, targets)
    for parameter, gradient in zip(model.parameters, gradients, strict=True):
        index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        parameter[index] += 1e-6
        above = fastce.cross_entropy(model.logits(contexts), targets)
        parameter[index] -= 2e-6
        below = fastce.cross_entropy(model.logits(contexts), targets)
        assert gradient[index] == pytest.approx((above - below) / 2e-6, rel=1e-5)


def test_short_training_beats_unigrams_and_the_command_scores_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_demo", partial(demo.run_demo, n_steps=40))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "kept", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    unigram = float(re.search(r"unigram model .* needs ([\d.]+) bits", out)[1])
    assert 4 < unigram < 5.5
    bits = float(re.search(r"bits per byte +([\d.]+)", out)[1])
    assert bits < unigram - 0.5
    assert sorted(os.listdir("kept")) == [f"logits-{i:02}.npy" for i in range(4)] + ["targets.npy"]
    command = shlex.split(re.search(r"fastce (score .*)", out)[1])
    assert main(command) == 0
    again, _ = capsys.readouterr()
    shown = {tuple(line.split()) for line in out.splitlines()}  # columns are as wide as the speed
    figures = [tuple(line.split()) for line in again.splitlines() if "±" in line or "accuracy" in line]
    assert len(figures) == 3
    assert set(figures) <= shown


def test_without_a_folder_nothing_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_demo", partial(demo.run_demo, n_steps=1))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["demo", "--quiet"]) == 0
    assert "fastce demo DIR" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []
