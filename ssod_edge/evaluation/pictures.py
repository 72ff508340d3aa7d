"""The pictures of an evaluation and of single images, each a PNG. Needs matplotlib, the extra `report`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ssod_edge.detect.metrics import risk_coverage
from ssod_edge.files import write_atomic
from ssod_edge.optional import load
from ssod_edge.terminal import printable
from ssod_edge.training.outputs import Outputs

Floats = npt.NDArray[np.floating[Any]]
#: {"id": {score: [n]}, OOD set: {score: [n]}}, larger = more OOD.
RawScores = Mapping[str, Mapping[Any, Floats]]

# Okabe and Ito's colours, which people with colour-blindness tell apart.
BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
_LINES = (BLUE, ORANGE, GREEN, "#CC79A7", VERMILLION, "#56B4E9", "#000000", "#B8A800")
_STYLES = ("-", "--", "-.", ":")
# Paul Tol's colours of this name, for classes.
_MUTED = ("#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#661100", "#CC6677", "#882255", "#AA4499", "#6699CC")
_MARKERS = ("x", "+", "^", "s", "v", "D")

#: Points in the t-SNE picture.
TSNE_POINTS = 2000
#: Scores in one curve picture; more cannot be told apart.
_MOST_LINES = 8


def _figure(width: float, height: float, what: str) -> Any:
    """Raises MissingExtraError without matplotlib."""
    return load("matplotlib.figure", what).Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path, caption: str = "") -> Path:
    from matplotlib.text import Text

    if caption:
        figure.supxlabel(caption, fontsize=8, color="#555555")
    for text in figure.findobj(Text):  # a name with two dollar signs is no formula
        text.set_parse_math(False)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks is drawn as a box
        return write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _panels(raw: RawScores, what: str, height: float = 3.4) -> tuple[Any, dict[str, Any]]:
    """A figure, and its axes by name: one for each OOD set, or for "id" without any, at most four side by side."""
    names = _ood_sets(raw) or ["id"]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(4.2 * columns, height * rows, what)
    return figure, {name: figure.add_subplot(rows, columns, index) for index, name in enumerate(names, 1)}


def _ood_sets(raw: Mapping[str, Any]) -> list[str]:
    return [name for name in raw if name != "id"]


def save_evaluation(
    raw: RawScores,
    auroc: Mapping[tuple[str, str], float],
    outputs: Mapping[str, Outputs],
    classes: Sequence[str],
    folder: str | Path,
    caption: str = "",
) -> list[Path]:
    """All pictures of an evaluation: a histogram of each score, ROC (with an OOD set), risk-coverage and t-SNE.

    Args:
        raw, auroc, classes: as of the functions below.
        outputs: "id" and each OOD set -> what the model says of its images.
        folder: gets the files, and is made if need be.
        caption: stands below every picture.

    Returns:
        The files that were written.

    Raises:
        MissingExtraError, OutputError: as `save_histograms`.
    """
    folder = Path(folder)
    written = [save_histograms(raw, score, folder / f"scores-{score}.png", caption) for score in raw["id"]]
    if _ood_sets(raw):
        written.append(save_roc(raw, auroc, folder / "roc.png", caption))
    written.append(save_risk_coverage(raw, outputs["id"].correct, folder / "risk-coverage.png", caption))
    features = {name: part.features for name, part in outputs.items()}
    written.append(save_features(features, outputs["id"].labels, classes, folder / "features.png", caption))
    return written


def save_histograms(raw: RawScores, score: str, path: str | Path, caption: str = "") -> Path:
    """The distribution of one score on ID and on each OOD set (the paper's Fig. 6).

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    figure, panels = _panels(raw, "the histogram")
    values = np.concatenate([raw[name][score] for name in raw])
    low, high = (float(end) for end in np.quantile(values, [0.001, 0.999]))
    bins = np.linspace(low, high if high > low else low + 1, 50).tolist()
    # What lies outside is drawn at the ends; in float64, because a bin's edge in float32 may lie outside as well.
    inside = {name: np.clip(raw[name][score].astype(np.float64), bins[0], bins[-1]) for name in raw}
    for name, axes in panels.items():
        axes.hist(inside["id"], bins, density=True, alpha=0.65, color=ORANGE, label="ID")
        if name != "id":
            axes.hist(inside[name], bins, density=True, alpha=0.55, color=BLUE, label=name)
        axes.set(xlabel=f"{score} (larger: more likely OOD)", ylabel="density")
        axes.legend()
    return _save(figure, path, caption)


def save_roc(raw: RawScores, auroc: Mapping[tuple[str, str], float], path: str | Path, caption: str = "") -> Path:
    """Receiver operating characteristic of each score on each OOD set: ID images accepted over OOD images accepted.

    Args:
        raw: at least one OOD set.
        auroc: (OOD set, score) -> area under the curve, in [0, 1].

    Raises:
        MissingExtraError, OutputError: as `save_histograms`.
    """
    figure, panels = _panels(raw, "the ROC curve", height=4.4)
    styles = _line_styles(raw["id"])
    for name, axes in panels.items():
        for score in _best(styles, {score: auroc[name, score] for score in styles}):
            accepted = [_accepted(raw[which][score], raw["id"][score]) for which in (name, "id")]
            axes.plot(*accepted, **styles[score], label=f"{score}, AUROC {100 * auroc[name, score]:.1f}%")
        axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.8)
        axes.axhline(95, color=GREY, linestyle=(0, (1, 2)), linewidth=1)
        axes.annotate("95% of ID", (1, 95.5), va="bottom", color="#555555", fontsize=8)
        axes.set(title=name, xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axes.set(xlabel="OOD images accepted (%)", ylabel="ID images accepted (%)")
        axes.legend(loc="lower right", fontsize=8)
    return _save(figure, path, caption)


def _accepted(scores: Floats, thresholds: Floats) -> Floats:
    """Share of `scores` in % that are accepted at each of the thresholds, from none to all."""
    at = np.sort(thresholds)
    shares: Floats = 100 * np.searchsorted(np.sort(scores), at, side="right") / len(scores)
    return np.concatenate([[0.0], shares, [100.0]])


def save_risk_coverage(raw: RawScores, correct: npt.NDArray[np.bool_], path: str | Path, caption: str = "") -> Path:
    """Selective risk over coverage, for ID and each OOD set together.

    The images with the lowest scores are answered. Risk is the share of wrong answers among those: an ID image whose
    class is wrong, and every OOD image (`ssod_edge.detect.metrics.risk_coverage`).

    Args:
        raw: without OOD sets, of the ID images alone.
        correct: bool [n_id], whether the class of each ID image is right.

    Raises:
        MissingExtraError, OutputError: as `save_histograms`.
    """
    figure, panels = _panels(raw, "the risk-coverage curve", height=4.0)
    figure.suptitle("Wrong answers: ID images of the wrong class, and every OOD image", fontsize=10)
    styles = _line_styles(raw["id"])
    for name, axes in panels.items():
        ood = 0 if name == "id" else len(next(iter(raw[name].values())))
        right = np.concatenate([correct, np.zeros(ood, bool)])
        parts = ("id",) if name == "id" else ("id", name)
        curves = {s: risk_coverage(np.concatenate([raw[part][s] for part in parts]), right) for s in styles}
        for score in _best(styles, {score: -curve.aurc for score, curve in curves.items()}):
            curve = curves[score]
            shown = np.unique(np.linspace(0, len(right) - 1, 500).astype(int))
            line = 100 * curve.coverage[shown], 100 * curve.risk[shown]
            axes.plot(*line, **styles[score], label=f"{score}, AURC {100 * curve.aurc:.1f}%")
        coverage = np.linspace(0, 1, 200)[1:]
        best = 100 * np.maximum(0, coverage - right.mean()) / coverage
        axes.plot(100 * coverage, best, color=GREY, linewidth=1, label="best possible")
        mix = f"{len(correct):,} ID" + (f" + {ood:,} OOD" if ood else "")
        axes.set(title=f"{name} ({mix})", xlim=(0, 100), ylim=(0, None))
        axes.set(xlabel="coverage: images answered (%)", ylabel="risk: wrong among them (%)")
        axes.legend(fontsize=8)
    return _save(figure, path, caption)


def _line_styles(scores: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Score -> its colour and dashes, the same in every panel."""
    return {
        score: {"color": _LINES[i % len(_LINES)], "linestyle": _STYLES[i % len(_STYLES)], "linewidth": 1.6}
        for i, score in enumerate(scores)
    }


def _best(scores: Mapping[str, Any], value: Mapping[str, float]) -> list[str]:
    """The scores in a panel, in their order: all of them, or those of the largest value."""
    kept = sorted(scores, key=lambda score: -value[score])[:_MOST_LINES]
    return [score for score in scores if score in kept]


def save_features(
    features: Mapping[str, Floats],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    path: str | Path,
    caption: str = "",
) -> Path:
    """t-SNE of pooled features (the paper's Fig. 4): ID images coloured by class, OOD images by set.

    At most `TSNE_POINTS` images, half of them ID, drawn with a fixed seed; by PCA to 50 dimensions first.

    Args:
        features: {"id": [n, D], OOD set: [n, D]}.
        labels: int64 [n], of the ID images.

    Raises:
        MissingExtraError: matplotlib or scikit-learn is not installed.
        OutputError: the file cannot be written.
    """
    figure = _figure(8.6, 6.4, "the picture of the features")
    rng = np.random.default_rng(0)
    names = _ood_sets(features)
    share = {"id": TSNE_POINTS // 2 if names else TSNE_POINTS}
    share |= {name: (TSNE_POINTS - share["id"]) // len(names) for name in names}
    drawn = {name: np.sort(rng.permutation(len(features[name]))[: share[name]]) for name in share}
    points = _tsne(np.concatenate([features[name][drawn[name]] for name in drawn]).astype(np.float64))
    ends = np.cumsum([len(rows) for rows in drawn.values()])
    groups = dict(zip(drawn, np.split(points, ends[:-1]), strict=True))
    axes = figure.add_subplot()
    _draw_classes(axes, groups["id"], labels[drawn["id"]], classes)
    for index, name in enumerate(names):
        marker, shade = _MARKERS[index % len(_MARKERS)], 0.45 * (index % 3) / 2
        style = {"c": [(shade,) * 3]} if marker in "x+" else {"facecolors": "none", "edgecolors": [(shade,) * 3]}
        axes.scatter(*groups[name].T, s=16, marker=marker, linewidths=0.7, label=f"OOD: {name}", **style)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE dimension 1 (no unit)", ylabel="t-SNE dimension 2 (no unit)")
    ood = f", {len(points) - len(groups['id']):,} OOD by set" if names else ""
    axes.set_title(f"t-SNE of pooled features: {len(groups['id']):,} ID images by class{ood}")
    figure.legend(loc="outside right upper", fontsize=8, markerscale=1.4)
    return _save(figure, path, caption)


def _tsne(features: Floats) -> Floats:
    """[n, D] -> [n, 2], the same for the same features."""
    what = "the picture of the features"
    decomposition, manifold = load("sklearn.decomposition", what), load("sklearn.manifold", what)
    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2))  # all alike: neighbours of distance 0 crash scikit-learn
    dimensions = min(50, *features.shape)
    reduced = decomposition.PCA(dimensions, svd_solver="full").fit_transform(features)
    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    embedded: Floats = manifold.TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    return embedded


def _draw_classes(axes: Any, points: Floats, labels: npt.NDArray[np.int64], classes: Sequence[str]) -> None:
    if len(classes) > len(_MUTED):
        axes.scatter(*points.T, s=12, color="#56B4E9", label=f"ID, {len(classes):,} classes")
        return
    for index, name in enumerate(classes):
        axes.scatter(*points[labels == index].T, s=12, color=_MUTED[index], label=name)


@dataclass(frozen=True)
class PatchMap:
    """What the classifier says of each patch of one image.

    Attributes:
        image: uint8 [3, S, S], what the network saw.
        confidence: [H, W], softmax probability of the class, in [0, 1].
        label: int8 [H, W], 1 = ID, 0 = OOD, -1 = ignored (Eq. 12).
        id_logit: [H, W], s of Eq. 13; above 0 is ID.
        gamma: of Eq. 12.
        class_name: the class that `confidence` is of.
    """

    image: npt.NDArray[np.uint8]
    confidence: Floats
    label: npt.NDArray[np.int8]
    id_logit: Floats
    gamma: float
    class_name: str


#: Label -> its colour and opacity.
_LABELS = {1: (GREEN, 0.45), 0: (VERMILLION, 0.45), -1: ("#BBBBBB", 0.3)}
#: Cells in a row up to which the figures are written into them.
_WRITTEN_CELLS = 8


def save_patches(patches: PatchMap, title: str, path: str | Path) -> Path:
    """The patches' labels on the image (the paper's Fig. 2 and 3), and beside it a heat map of their ID logit.

    Raises:
        MissingExtraError, OutputError: as `save_histograms`.
    """
    figure = _figure(9.2, 5.7, "the picture of the patches")
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(title, fontsize=10)
    (left, right), (legend, bar) = figure.subplots(2, 2, height_ratios=(1, 0.035))
    size = patches.image.shape[1]
    for axes in (left, right):
        axes.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))
    _draw_labels(left, legend, patches)
    _draw_heat(figure, right, bar, patches)
    return _save(figure, path)


def _draw_labels(axes: Any, below: Any, patches: PatchMap) -> None:
    from matplotlib.patches import Patch, Rectangle

    size = patches.image.shape[1]
    axes.imshow(patches.image.transpose(1, 2, 0), extent=(0, size, size, 0))
    for label, x, y, width, height in _cells(patches):
        colour, opacity = _LABELS[label]
        axes.add_patch(Rectangle((x, y), width, height, color=colour, alpha=opacity, linewidth=0))
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="white", linewidth=0.8))
        if label >= 0:
            edge = 0.03 * width
            frame: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 2.5}
            axes.add_patch(Rectangle((x + edge, y + edge), width - 2 * edge, height - 2 * edge, **frame))
    _write(axes, patches, 100 * patches.confidence, ".0f")
    counts = {label: int((patches.label == label).sum()) for label in _LABELS}
    low, high = f"{100 * (1 - patches.gamma):g}%", f"{100 * patches.gamma:g}%"
    rules = {1: f"ID: at least {high}", 0: f"OOD: below {low}", -1: "ignored: between"}
    handles = [Patch(facecolor=_LABELS[label][0], label=f"{rules[label]} ({count})") for label, count in counts.items()]
    below.axis("off")
    below.legend(handles=handles, loc="center", ncols=3, fontsize=8, frameon=False, columnspacing=1.2)
    axes.set_title(f"confidence on '{shorten(patches.class_name, 40)}' at each patch (%)", fontsize=9)


def _draw_heat(figure: Any, axes: Any, below: Any, patches: PatchMap) -> None:
    size = patches.image.shape[1]
    limit = float(np.abs(patches.id_logit).max()) or 1.0
    heat = axes.imshow(patches.id_logit, cmap="PuOr", vmin=-limit, vmax=limit, extent=(0, size, size, 0))
    axes.set_title("ID logit s at each patch", fontsize=9)
    _write(axes, patches, patches.id_logit, ".1f")
    scale = figure.colorbar(heat, cax=below, orientation="horizontal")
    scale.set_label("s (no unit): below 0 more likely OOD, above 0 more likely ID", fontsize=8)
    scale.ax.tick_params(labelsize=8)


def _cells(patches: PatchMap) -> list[tuple[int, float, float, float, float]]:
    """(label, left, top, width, height) of each cell, in pixels of the image."""
    size, (rows, columns) = patches.image.shape[1], patches.label.shape
    width, height = size / columns, size / rows
    return [
        (int(patches.label[row, column]), column * width, row * height, width, height)
        for row in range(rows)
        for column in range(columns)
    ]


def _write(axes: Any, patches: PatchMap, values: Floats, form: str) -> None:
    from matplotlib.patheffects import withStroke

    if max(patches.label.shape) > _WRITTEN_CELLS:
        return
    outline = [withStroke(linewidth=2, foreground="white")]
    for value, (_, x, y, width, height) in zip(values.ravel().tolist(), _cells(patches), strict=True):
        place = {"ha": "center", "va": "center", "fontsize": 9, "path_effects": outline}
        axes.text(x + width / 2, y + height / 2, format(value, form), **place)


def shorten(text: str, most: int) -> str:
    """At most so many characters of it."""
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"
