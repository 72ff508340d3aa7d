"""The `explain` command: which patches of an image the classifier takes for known things, and which for background."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ssod_edge.config import LossConfig, check_gamma, from_dict
from ssod_edge.data.inputs import list_images
from ssod_edge.data.pixels import ImageLike, read_pixels
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import FittedScore
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED, ImageError, UsageError
from ssod_edge.evaluation.images import shipped_score
from ssod_edge.evaluation.pictures import PatchMap, save_patches, shorten
from ssod_edge.files import check_output
from ssod_edge.json_reader import read_json
from ssod_edge.ops import patch_sample
from ssod_edge.terminal import printable, standard_input, tell
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.run import Run


@dataclass(frozen=True)
class Explanation:
    """What a model says of an image and of its patches.

    Attributes:
        patches: for the class that was asked for, or the predicted one.
        class_name, confidence: the predicted class, and its softmax probability.
        scores: score -> value, larger = more OOD.
    """

    patches: PatchMap
    class_name: str
    confidence: float
    scores: dict[str, float]


@dataclass(frozen=True)
class ShippedThreshold:
    """That of the export beside a run: `known = score <= value`; and the score's state, if it has one."""

    score: str
    value: float
    state: FittedScore | None = None


@torch.no_grad()
def explain(
    model: SSODClassifier,
    image: ImageLike,
    gamma: float = 0.95,
    class_name: str | None = None,
    state: FittedScore | None = None,
) -> Explanation:
    """Label each patch of an image's feature map as training would (Eq. 12), by its confidence on one class.

    Args:
        model: in eval mode.
        image: what `ssod_edge.data.pixels.load_image` takes.
        gamma: confidence from which a patch is ID; below 1 - gamma it is OOD.
        class_name: one of the model's; None takes the predicted class of the whole image.
        state: of a score that is named beside those of the logits.

    Raises:
        ImageError: the image cannot be read, or the model's output for it is not finite.
        UsageError: gamma out of range, no such class, or a backbone without patches.
    """
    check_gamma(gamma)
    if model.no_patches:
        raise UsageError(f"'{model.backbone_name}' has no patches to explain: {model.no_patches}")
    target = None if class_name is None else _class_index(model, class_name)
    pixels = read_pixels(image, model.preprocess)
    device = next(model.parameters()).device
    x = normalise(torch.from_numpy(pixels[None]).to(device), model.preprocess)
    pooled, z = model.forward_train(x)
    assert z is not None
    logits, id_logit = model.head(pooled)
    if not (logits.isfinite().all() and id_logit.isfinite().all()):
        raise ImageError("the model's output for it is not finite")
    probs = logits.softmax(dim=1)[0]
    predicted = int(probs.argmax())
    shown = predicted if target is None else target
    shape = z.shape[1:3]
    weight, bias = model.head_weight()
    labels = torch.tensor([shown], device=device)
    confidence, label = patch_sample(z, weight[:-1], bias[:-1], labels, gamma)
    s = F.linear(z.float(), model.ood.weight.float(), model.ood.bias.float())
    patches = PatchMap(
        image=pixels,
        confidence=confidence.view(shape).cpu().numpy(),
        label=label.view(shape).cpu().numpy(),
        id_logit=s.view(shape).cpu().numpy(),
        gamma=gamma,
        class_name=model.classes[shown],
    )
    outputs = logits.cpu().numpy(), id_logit.cpu().numpy()
    named = {str(name): float(value[0]) for name, value in ood_scores(*outputs).items()}
    if state is not None:
        named[state.name] = float(state.score(pooled.float().cpu().numpy(), *outputs)[0])
    return Explanation(patches, model.classes[predicted], float(probs[predicted]), named)


def run_explain(
    arguments: Sequence[str],
    backbone: str | None = None,
    runs: str = "runs",
    out: str | None = None,
    gamma: float | None = None,
    class_name: str | None = None,
) -> int:
    """Write one PNG for each image; returns the exit code: 1 if some images could not be read.

    Args:
        arguments: the run folder or checkpoint, unless `backbone` says which, and the images: see
            `ssod_edge.data.inputs.list_images`.
        backbone: take the newest run of it under `runs`.
        out: a .png file for a single image, or a folder; None is the folder `explain` beside the checkpoint.
        gamma, class_name: as for `explain`; None takes the run's gamma.

    Raises:
        UsageError: no run, no image, no such class, or one file for several images.
        ArtifactError: a checkpoint that cannot be read.
        MissingExtraError: matplotlib is not installed.
        OutputError: the pictures cannot be written.
    """
    run = Run.newest(runs, backbone) if backbone else Run.at(arguments[0])
    no_images: dict[str, str] = {}
    images = list_images(arguments if backbone else arguments[1:], standard_input(), no_images)
    model = run.model
    gamma = _gamma_of(run) if gamma is None else gamma
    check_gamma(gamma)
    if class_name is not None:
        _class_index(model, class_name)
    threshold = shipped_threshold(run)
    targets = _targets(images, out, run.folder)
    failed = False
    for image, target in zip(images, targets, strict=True):
        try:
            if image in no_images:
                raise ImageError(no_images[image])
            explanation = explain(model, image, gamma, class_name, threshold.state if threshold else None)
        except ImageError as error:
            failed = True
            tell(f"error: {printable(str(error))}", err=True)
            continue
        title = _title(Path(image).name, explanation, threshold)
        tell(str(save_patches(explanation.patches, title, target)))
    return EXIT_SOME_FAILED if failed else EXIT_OK


def shipped_threshold(run: Run) -> ShippedThreshold | None:
    """The fp32 threshold of the export in a run folder, if it is of this very checkpoint."""
    spec, state = shipped_score(run, "no verdict")
    fitted = [a.threshold for a in spec.artifacts if a.precision == "fp32" and a.threshold] if spec else []
    return ShippedThreshold(spec.score_name, fitted[0].value, state) if spec and fitted else None


def _class_index(model: SSODClassifier, name: str) -> int:
    if name in model.classes:
        return model.classes.index(name)
    close = difflib.get_close_matches(name, model.classes, 3) or model.classes[:5]
    raise UsageError(f"the model has no class '{name}'; give one of its {len(model.classes)}: {', '.join(close)}, ...")


def _gamma_of(run: Run) -> float:
    """The gamma that a run was trained with; the default where it is not recorded."""
    try:
        return from_dict(LossConfig, read_json(run.folder / "config.json")["loss"]).gamma
    except (OSError, ValueError, KeyError):
        return LossConfig().gamma


def _targets(images: Sequence[str], out: str | None, folder: Path) -> list[Path]:
    """A PNG for each image; images of the same name are numbered."""
    if out is not None and Path(out).suffix.lower() == ".png" and not Path(out).is_dir():
        if len(images) > 1:
            raise UsageError(f"'{out}' is one file, and there are {len(images)} images; give a folder")
        return [check_output(out)]
    if out == "-":
        check_output(out)  # raises: pictures are files
    place = folder / "explain" if out is None else Path(out)
    taken: set[str] = set()
    targets = []
    for image in images:
        stem, number = Path(image).stem or "image", 1
        name = stem
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        targets.append(place / f"{name}.png")
    check_output(targets[0])
    return targets


def _title(name: str, explanation: Explanation, threshold: ShippedThreshold | None) -> str:
    scores = "  ".join(f"{score} {value:.2f}" for score, value in explanation.scores.items())
    shown, class_name = (shorten(printable(text), 60) for text in (name, explanation.class_name))
    lines = [f"{shown}: '{class_name}', {explanation.confidence:.1%}"]
    lines.append(f"OOD scores (larger: more likely OOD): {scores}")
    if threshold is not None:
        score = explanation.scores[threshold.score]
        word, sign = ("KNOWN", "<=") if np.float32(score) <= threshold.value else ("UNKNOWN", ">")
        lines.append(f"{word}: {threshold.score} {score:.3f} {sign} threshold {threshold.value:.3f}")
    return "\n".join(lines)
