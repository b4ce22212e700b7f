"""Who imports whom, and what importing fastce does not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastce

PACKAGE = Path(fastce.__file__).parent

# Module (or folder) -> what it may import of fastce. Everything else is forbidden.
ALLOWED = {
    "cpu": set(),
    "kernels": set(),
    "threads": {"cpu"},
    "problem": {"kernels"},
    "registry": {"cpu", "kernels"},
    "losses": {"kernels", "problem", "registry", "threads"},
    "stats": {"kernels", "losses", "problem"},
    "activations": {"kernels", "losses", "problem", "registry", "threads"},
    "binary": {"kernels", "problem", "registry", "threads"},
    "info": {"kernels", "losses", "problem", "registry", "threads"},
    "config": {"cpu", "registry", "threads", "_native", "__version__"},
    "_backends": {"_backends", "kernels", "_native"},
    "_native": set(),
    "scoring": {"kernels", "registry", "scoring", "stats", "__version__"},
    # the library's users: what is public, and the scoring they show
    "demo": {"", "scoring"},
    "bench": {"", "bandwidth", "cpu", "registry"},
    "bandwidth": set(),
    "terminal": {"scoring"},
    "cli": {"BackendUnavailable", "bench", "demo", "score_files", "scoring", "show_config", "terminal"}
    | {"__version__"},
    "__main__": {"cli"},
}


def _imports(path: Path) -> set[str]:
    """Return the first names under fastce that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastce"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                (name.name.split(".") + [""])[1]
                for name in node.names
                if name.name.split(".")[0] == "fastce"
            }
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part != "__init__":
        assert _imports(path) <= ALLOWED[part], f"{part} may import only {ALLOWED[part]}"


def test_backends_do_not_import_one_another():
    """A backend of several files has its name at the start of each."""
    for path in (PACKAGE / "_backends").glob("*.py"):
        own = path.stem.partition("_")[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.match(r"\s*(?:from|import) fastce\._backends(?:\.| import )(\w+)", line)
            assert not found or found[1].partition("_")[0] == own, line


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import fastce", {"numba", "fastce._native.kernels", "cyclopts", "rich", "threadpoolctl"}),
        ("import fastce; fastce.cross_entropy([[0.0, 1.0]], [1], backend='cython')", {"numba"}),
        (
            "import fastce; fastce.cross_entropy([[0.0, 1.0]], [1], backend='numpy')",
            {"numba", "fastce._native.kernels"},
        ),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(statement, banned):
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not banned & set(done.stdout.split())


def test_import_leaves_the_process_as_it_was():
    code = """
    import os, signal, numpy as np
    before = dict(os.environ), signal.getsignal(signal.SIGINT), np.geterr()
    tiny = np.float64(5e-324)
    import fastce
    fastce.cross_entropy(np.ones((9, 9)), np.zeros(9, int))
    assert (dict(os.environ), signal.getsignal(signal.SIGINT), np.geterr()) == before
    assert tiny * 1.0 == 5e-324, "subnormal numbers are flushed"
    """
    lines = "\n".join(line[4:] for line in code.splitlines())
    subprocess.run([sys.executable, "-c", lines], check=True)
