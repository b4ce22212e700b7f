"""The backend fixture, the switch that forbids skips, and the accuracy summary."""

from __future__ import annotations

import re

import pytest

from fastce import cpu, registry, threads

_worst = pytest.StashKey[dict[tuple[str, str, str], tuple[float, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backends",
        action="store_true",
        help="fail, instead of skip, where a backend that this processor can run is unavailable",
    )

    parser.addoption(
        "--all-halves",
        action="store_true",
        help="test what Numba compiles for both half dtypes with both; it takes minutes",
    )


# Numba compiles each combination of options for seconds. The half dtypes differ in their loads and
# stores alone, and each of these is in what is left: of targets with many shares, one kind for each.
_OTHER_HALF = re.compile("numba-.*((ids|smooth weighed)-bfloat16|(probabilities|soft weighed)-float16)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-halves"):
        return
    dropped = {item for item in items if _OTHER_HALF.fullmatch(_parameters(item))}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def _parameters(item: pytest.Item) -> str:
    return item.callspec.id if hasattr(item, "callspec") else ""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_worst] = {}


@pytest.fixture(params=registry.BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend and variant in turn, by name."""
    reason = registry.why_unavailable(request.param)
    if reason is not None:
        isa = request.param.isa
        lacks = isa is not None and cpu.missing_features(isa)
        if request.config.getoption("--require-backends") and not lacks:
            pytest.fail(f"{request.param.name} is unavailable: {reason}")
        pytest.skip(reason)
    return request.param.name


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the defaults of the machine."""
    monkeypatch.setattr(registry, "_environment", None)
    monkeypatch.setattr(threads, "_environment", None)


@pytest.fixture
def record_ulp(request: pytest.FixtureRequest):
    """Return a function that keeps the worst error for the summary."""
    worst = request.config.stash[_worst]

    def record(backend: str, quantity: str, dtype: str, ulp: float, case: str) -> None:
        key = (backend, dtype, quantity)
        if ulp >= worst.get(key, (0.0, ""))[0]:
            worst[key] = (ulp, case)

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    worst = config.stash[_worst]
    if not worst:
        return
    terminalreporter.section("worst error against 200 bits, in ULP")
    for (backend, dtype, quantity), (ulp, case) in worst.items():
        terminalreporter.write_line(f"{backend:16} {dtype:8} {quantity:24} {ulp:5.2f}  {case}")
