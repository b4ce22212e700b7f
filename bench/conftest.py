"""After the benchmarks: each time with its bandwidth and its largest error beside it."""

from __future__ import annotations

from typing import Any

import pytest

from fastce.bench import duration

#: Lines of the summary: (group, contender, seconds, GB/s, errors).
RESULTS = pytest.StashKey[list[tuple[str, str, float, float, dict[str, Any]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    group = None
    for name, contender, seconds, rate, errors in sorted(
        config.stash[RESULTS], key=lambda result: (result[0], result[2])
    ):
        if name != group:
            group = name
            terminalreporter.section(f"{group}: median, bandwidth, largest error")
        largest = ", ".join(
            f"{what} {errors[f'{what}_max_ulp']:.3g} ULP"
            for what in ("loss", "grad")
            if f"{what}_max_ulp" in errors
        )
        terminalreporter.write_line(
            f"{contender:24} {duration(seconds):>8} {rate:6.1f} GB/s   {largest}"
        )
