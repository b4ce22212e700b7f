"""Choosing a backend: by argument, context, environment or order; never replaced in silence."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest

import fastce
from fastce import cpu, registry
from fastce.kernels import Kernels

X = np.zeros((2, 3), np.float32)
Y = np.zeros(2, int)


@pytest.fixture
def only_numpy(monkeypatch):
    """Pretend that nothing but NumPy runs here."""
    registry._choose.cache_clear()
    monkeypatch.setattr(
        registry, "why_unavailable", lambda b: None if b.name == "numpy" else "a test says so"
    )
    yield
    registry._choose.cache_clear()


def chosen():
    return next(info.name for info in fastce.backends() if info.chosen)


def test_names_are_unique_and_the_reference_is_last():
    names = [b.name for b in registry.BACKENDS]
    assert len(set(names)) == len(names)
    assert names[-1] == "numpy"


def test_backends_satisfy_the_protocol(backend):
    record = next(b for b in registry.BACKENDS if b.name == backend)
    kernels = registry.load(record)
    for method in ("rows", "plain", "max_threads"):
        want = inspect.signature(getattr(Kernels, method)).parameters.values()
        got = inspect.signature(getattr(type(kernels), method)).parameters.values()
        assert [(p.name, p.kind) for p in want] == [(p.name, p.kind) for p in got], method
    assert kernels.max_threads() >= 1


def test_automatic_choice_is_the_first_available():
    available = [info.name for info in fastce.backends() if info.available]
    assert chosen() == available[0]
    assert all((info.reason is None) == info.available for info in fastce.backends())


def test_argument_beats_context_beats_environment(monkeypatch):
    monkeypatch.setattr(registry, "_environment", "numpy")
    assert chosen() == "numpy"
    with fastce.use_backend("numba"):
        assert chosen() == "numba"
        with fastce.use_backend("auto"):
            assert chosen() == next(i.name for i in fastce.backends() if i.available)
        assert registry.choose("numpy", "float32").name == "numpy"
    assert chosen() == "numpy"


def test_a_family_name_takes_its_best_variant():
    best = next(i.name for i in fastce.backends() if i.available and i.name.startswith("cython"))
    assert registry.choose("cython", "float32").name == best


def test_use_backend_holds_for_its_own_thread_alone():
    seen = []
    with fastce.use_backend("numpy"):
        thread = threading.Thread(target=lambda: seen.append(registry.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_named_backend_is_refused_not_replaced(only_numpy):
    with pytest.raises(
        fastce.BackendUnavailable, match=r"'numba' cannot run here .*a test says so.*numpy"
    ):
        fastce.cross_entropy(X, Y, backend="numba")
    with pytest.raises(fastce.BackendUnavailable), fastce.use_backend("cython"):
        pass
    assert fastce.cross_entropy(X, Y) == pytest.approx(np.log(3))


def test_a_name_in_the_environment_is_refused_not_replaced(only_numpy, monkeypatch):
    monkeypatch.setattr(registry, "_environment", "cython")
    with pytest.raises(fastce.BackendUnavailable):
        fastce.cross_entropy(X, Y)
    assert not any(info.chosen for info in fastce.backends())


def test_an_unknown_name_in_the_environment_says_where_it_stands(monkeypatch):
    monkeypatch.setattr(registry, "_environment", "cuda")
    with pytest.raises(ValueError, match="got 'cuda' from FASTCE_BACKEND"):
        fastce.cross_entropy(X, Y)


def test_missing_instruction_sets_are_named(monkeypatch):
    monkeypatch.setattr(cpu, "_features", lambda: {"AVX2": True, "FMA3": True, "F16C": True})
    reason = registry.why_unavailable(registry.BACKENDS[0])
    assert reason == "this processor lacks AVX512F, AVX512BW, AVX512DQ, AVX512VL"


def test_a_broken_extension_is_a_reason_not_a_crash(monkeypatch):
    def broken(backend):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(registry, "load", broken)
    assert "libgomp" in registry.why_unavailable(registry.BACKENDS[2])


def test_show_config(capsys):
    fastce.show_config()
    printed = capsys.readouterr().out
    config = fastce.show_config(mode="dict")
    for section in ("processor", "threads", "backends", "openmp", "versions"):
        assert f"{section}:" in printed
        assert section in config
    assert config["versions"]["fastce"] == fastce.__version__
    with pytest.raises(ValueError, match="mode"):
        fastce.show_config(mode="xml")
