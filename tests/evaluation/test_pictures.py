"""The pictures of an evaluation: which files, what is drawn, and what they refuse."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from ssod_edge.detect.metrics import detection_metrics, risk_coverage
from ssod_edge.errors import MissingExtraError
from ssod_edge.evaluation import pictures
from ssod_edge.training.outputs import Outputs

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra 'report'")

RNG = np.random.default_rng(0)
SCORES = [f"score{index}" for index in range(11)]
RAW = {
    name: {score: (RNG.normal(shift, 1, n) / (1 + i)).astype(np.float32) for i, score in enumerate(SCORES)}
    for name, shift, n in (("id", 0, 90), ("near", 1, 40), ("far", 3, 50))
}
AUROC = {(o, s): detection_metrics(RAW["id"][s], RAW[o][s], 0)["auroc"] for o in ("near", "far") for s in SCORES}
CORRECT = RNG.random(90) < 0.8


@pytest.fixture
def figures(monkeypatch):
    """What would be written, as matplotlib's figures."""
    seen = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, *rest: (seen.append(figure), save(figure, *rest))[1])
    return seen


def outputs(n, classes):
    """What a model may say of n images."""
    labels, logits, features = RNG.integers(0, classes, n), RNG.normal(size=(n, classes)), RNG.normal(size=(n, 12))
    return Outputs(logits, np.zeros(n), labels, features)


def check(path, least=300):
    with Image.open(path) as png:
        assert png.format == "PNG" and png.width > least and len(png.convert("RGB").getcolors(1 << 24)) > 20


def test_an_evaluation_gets_all_of_them(tmp_path, figures):
    pytest.importorskip("sklearn", reason="needs the extra 'train'")
    said = {name: outputs(len(RAW[name][SCORES[0]]), 3) for name in RAW}
    few = {name: {s: RAW[name][s] for s in SCORES[:2]} for name in RAW}
    written = pictures.save_evaluation(few, AUROC, said, ("a", "b", "c"), tmp_path / "deep" / "folder", "through 32 px")
    assert [figure.get_supxlabel() for figure in figures] == ["through 32 px"] * 5
    expected = ["scores-score0.png", "scores-score1.png", "roc.png", "risk-coverage.png", "features.png"]
    assert [path.name for path in written] == expected
    for path in written:
        check(path)


def test_without_an_ood_set_there_is_no_roc(tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra 'train'")
    raw = {"id": {"energy": RAW["id"]["score0"]}}
    written = pictures.save_evaluation(raw, {}, {"id": outputs(90, 2)}, "ab", tmp_path)
    assert [path.name for path in written] == ["scores-energy.png", "risk-coverage.png", "features.png"]


def test_histograms_of_a_constant_score(tmp_path):
    raw = {"id": {"ssod": np.zeros(5, np.float32)}, "x": {"ssod": np.zeros(3, np.float32)}}
    check(pictures.save_histograms(raw, "ssod", tmp_path / "x.png"))


def test_a_set_of_one_image_beyond_the_others_is_drawn(tmp_path, figures):
    raw = {"id": {"ssod": np.arange(9, dtype=np.float32)}, "x": {"ssod": np.array([20], np.float32)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.save_histograms(raw, "ssod", tmp_path / "x.png")
    assert figures[0].axes[0].patches[-1].get_height() > 0, "its bar is the last"


def test_the_curves_are_those_of_the_metrics(tmp_path, figures):
    raw = {name: {"energy": RAW[name]["score0"]} for name in ("id", "far")}
    pictures.save_roc(raw, {("far", "energy"): AUROC["far", "score0"]}, tmp_path / "roc.png")
    x, y = figures[0].axes[0].lines[0].get_data()
    assert (np.diff(x) >= 0).all() and (x[0], y[0], x[-1], y[-1]) == (0, 0, 100, 100)
    assert np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / 1e4 == pytest.approx(AUROC["far", "score0"], abs=0.01)
    pictures.save_risk_coverage(raw, CORRECT, tmp_path / "risk.png")
    x, y = figures[1].axes[0].lines[0].get_data()
    scores = np.concatenate([raw["id"]["energy"], raw["far"]["energy"]])
    curve = risk_coverage(scores, np.concatenate([CORRECT, np.zeros(50, bool)]))
    np.testing.assert_allclose(y, 100 * curve.risk)
    best = figures[1].axes[0].lines[1].get_ydata()
    assert x[-1] == 100 and best[-1] == pytest.approx(y[-1]) and (np.diff(best) >= 0).all()


def test_of_many_scores_the_best_are_drawn(tmp_path, figures):
    pictures.save_roc(RAW, AUROC, tmp_path / "roc.png")
    for axes, name in zip(figures[0].axes, ("near", "far"), strict=True):
        drawn = [text.get_text().split(",")[0] for text in axes.get_legend().get_texts()]
        assert drawn == [s for s in SCORES if s in sorted(SCORES, key=lambda s: -AUROC[name, s])[: len(drawn)]]
        assert len(drawn) == 8


def test_features_are_drawn_alike_twice_and_no_more_than_the_limit(tmp_path, figures, monkeypatch):
    pytest.importorskip("sklearn", reason="needs the extra 'train'")
    monkeypatch.setattr(pictures, "TSNE_POINTS", 60)
    features = {"id": RNG.normal(size=(90, 8)), "near": RNG.normal(2, 1, (40, 8)), "far": RNG.normal(5, 1, (9, 8))}
    labels = RNG.integers(0, 12, 90)
    for classes in ([*"abcdefghijkl"], [*"abcdefghijkl"]):
        pictures.save_features(features, labels, classes, tmp_path / f"{len(figures)}.png")
    points = [np.concatenate([c.get_offsets() for c in figure.axes[0].collections]) for figure in figures]
    assert len(points[0]) == 30 + 15 + 9
    np.testing.assert_array_equal(points[0], points[1])
    check(tmp_path / "0.png")


def test_features_that_are_all_alike_are_one_point(tmp_path, figures):
    pytest.importorskip("sklearn", reason="needs the extra 'train'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.save_features(
            {"id": np.ones((8, 3)), "x": np.ones((8, 3))}, np.arange(8) % 2, "ab", tmp_path / "x.png"
        )
    assert not np.concatenate([c.get_offsets() for c in figures[0].axes[0].collections]).any()


def test_a_missing_library_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"ssod-edge\[report\]"):
        pictures.save_histograms(RAW, "score0", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_utf8_is_drawn_with_a_replacement(tmp_path, figures):
    raw = {"id": RAW["id"], "caf\udce9": RAW["near"]}
    pictures.save_histograms(raw, SCORES[0], tmp_path / "histograms.png")
    check(tmp_path / "histograms.png")


def test_each_line_of_a_title_is_a_line(tmp_path, figures):
    cell = np.zeros((1, 1))
    patches = pictures.PatchMap(np.zeros((3, 8, 8), np.uint8), cell, cell.astype(np.int8), cell, 0.95, "a")
    pictures.save_patches(patches, "first\x1b\nsecond", tmp_path / "x.png")
    assert figures[0].get_suptitle() == "first\\x1b\nsecond"
