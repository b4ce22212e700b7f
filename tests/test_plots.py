"""Pictures: what is drawn, where it is written, and that nothing else changes."""

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

import fastce
from fastce.cli import main
from fastce.scoring import InputError
from fastce.scoring.figures import HISTOGRAM_BINS
from fastce.scoring.plots import draw_figures, plot_figures


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    rng = np.random.default_rng(4)
    logits = 5 * rng.standard_normal((40, 25, 9))
    np.save(folder / "x.npy", logits)
    np.save(folder / "y.npy", (logits / 2 + rng.gumbel(size=logits.shape)).argmax(axis=-1))
    return folder


@pytest.fixture(scope="module")
def figures(dump):
    return fastce.score_files(dump / "x.npy", dump / "y.npy")


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_panels_show_the_figures(figures):
    figure = draw_figures(figures)
    assert titles(figure) == ["Reliability", "Losses", "Loss by position"]
    reliability, losses, positions = figure.axes
    some = [b for b in figures.reliability if b.rows]
    curve = reliability.lines[-1]
    np.testing.assert_array_equal(curve.get_xdata(), [b.confidence for b in some])
    np.testing.assert_array_equal(curve.get_ydata(), [b.accuracy for b in some])
    heights = np.array([bar.get_height() for bar in reliability.patches])
    rows = np.array([b.rows for b in figures.reliability])
    np.testing.assert_allclose(heights / heights.max(), rows / rows.max())
    assert f"{rows.max():,}" in reliability.get_legend().get_texts()[1].get_text()
    stairs = losses.patches[0].get_data()
    assert stairs.values.sum() == 1_000
    np.testing.assert_array_equal(stairs.values, figures.loss_histogram[: len(stairs.values)])
    assert "nats" in losses.get_xlabel()
    np.testing.assert_array_equal(
        positions.lines[0].get_ydata(), [b.mean_nll for b in figures.positions]
    )
    assert positions.get_xscale() == "log"
    assert "nats" in positions.get_ylabel()


def test_before_and_after(dump):
    found = fastce.calibrate_files(dump / "x.npy", dump / "y.npy")
    figure = draw_figures(found.before, after=found.after)
    after = f"T = {found.temperature:.4g}"
    assert titles(figure) == [
        "Reliability, T = 1",
        f"Reliability, {after}",
        "Losses",
        "Loss by position",
    ]
    assert len(figure.axes[2].patches) == len(figure.axes[3].lines) == 2


def test_no_positions_no_panel(dump):
    rows, targets = np.load(dump / "x.npy").reshape(-1, 9), np.load(dump / "y.npy").reshape(-1)
    scorer = fastce.Scorer()
    scorer.update(rows, targets)
    assert titles(draw_figures(scorer.figures())) == ["Reliability", "Losses"]


def test_figures_without_rows_and_with_infinite_losses_can_be_drawn(tmp_path):
    plot_figures(fastce.Scorer().figures(), tmp_path / "none.png")
    scorer = fastce.Scorer()
    scorer.update(np.array([[0.0, -np.inf], [np.nan, 0.0], [0.0, 50.0]]), [1, 1, 0])
    figures = scorer.figures()
    plot_figures(figures, tmp_path / "some.png")
    losses = draw_figures(figures).axes[1]
    assert losses.patches[0].get_data().values[HISTOGRAM_BINS - 1] == 3
    assert "20 and more in the last" in losses.get_xlabel()


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG\r\n\x1a\n"), (".PDF", b"%PDF-"), (".svg", b"<?xml")]
)
def test_files_are_what_their_names_say(tmp_path, figures, suffix, start):
    path = tmp_path / f"picture{suffix}"
    plot_figures(figures, path)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".svg":
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.get("width").removesuffix("pt")) > float(
            root.get("height").removesuffix("pt")
        )


def test_other_names_are_refused_before_anything_is_scored(tmp_path, dump, figures, capsys):
    with pytest.raises(InputError, match=r"p\.jpeg: expected a picture's name that ends in \.png"):
        plot_figures(figures, tmp_path / "p.jpeg")
    argv = [
        "score",
        str(dump / "x.npy"),
        "--targets",
        str(dump / "y.npy"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*argv, "--plot", str(tmp_path / "p.jpeg")]) == 3
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(tmp_path, figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"p\.png: .*pip install 'fastce\[plot\]'"):
        plot_figures(figures, tmp_path / "p.png")


def test_score_draws(tmp_path, dump, capsys):
    path = tmp_path / "p.png"
    argv = ["score", str(dump / "x.npy"), "--targets", str(dump / "y.npy"), "--plot", str(path)]
    assert main(argv) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_global_is_changed(dump):
    code = f"""
import sys, fastce
figures = fastce.score_files({str(dump / "x.npy")!r}, {str(dump / "y.npy")!r})
assert "matplotlib" not in sys.modules
import matplotlib
def settings():
    return {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
from fastce.scoring.plots import plot_figures
plot_figures(figures, {str(dump / "p.png")!r})
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
