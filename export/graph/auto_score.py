"""`export --score auto`: shows the network held-out images and images made from them, for the choice of a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssod_edge.config import prior_score
from ssod_edge.data.disturbances import seeded_copy
from ssod_edge.data.images import Subset
from ssod_edge.data.sources import model_labels
from ssod_edge.detect import choice
from ssod_edge.detect.choice_table import choice_in_brief, choice_table
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.folds import Folds, out_of_fold_parts
from ssod_edge.detect.made_images import CHOICE_KINDS, Images, make_for_choices
from ssod_edge.detect.sums import FittedScore, Outputs, held_out_scores
from ssod_edge.evaluation.left_out import MOST_CLASSES, leave_out
from ssod_edge.export.graph.negatives import negative_kind
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.export.graph.score_graph import MOST_ROUNDING, lost_to_rounding
from ssod_edge.export.graph.source import Source
from ssod_edge.export.release import Say
from ssod_edge.terminal import image_bar
from ssod_edge.training.model import SSODClassifier

#: Held-out images that a score is chosen by; images of each kind are made from the first half of them.
IMAGES = 2000
#: What is added to the description of images that were trained on, and chosen by all the same.
OUT_OF_FOLD = ", out of fold"


def choose(
    source: Source, choices: Subset, data: FitData, say: Say, brief: bool = False
) -> tuple[str, FittedScore | None, dict[str, Any]]:
    """Fit every candidate, and take the best (`ssod_edge.detect.choice.choose`).

    Kinds of made images that the network was trained to reject (`train --outliers`) have no say.

    Args:
        source: a trained model.
        choices: in-distribution images that were not trained on, and that no threshold is fitted to. Where they are few
            and the source has folds, those of these take their place.
        data: what detectors are fitted on.
        say: gets the table.
        brief: one line instead of it.

    Returns:
        the score's name, its state if it has one, and the figures for the spec.

    Raises:
        UsageError: no image can be read.
    """
    model = source.model
    by_folds = None if len(choices) >= choice.LEAST_UNASKED else source.folds
    shown = choices if by_folds is None else source.images.thresholds or choices
    images, found = shown.read(model.preprocess, np.random.default_rng(0).permutation(shown.indices)[:IMAGES])
    half = images[: max(1, len(images) // 2)]
    seen = _seen(source, images) if by_folds is None else []
    made = _made(source, half, say) | negative_kind(source, say)
    logits, _, features = seen[0] if seen else (data.logits, data.id_logit, data.features)
    fitted = choice.fit_all(data, lambda d: lost_to_rounding(d, features, logits) <= MOST_ROUNDING, say)
    singles = choice.single_scores(fitted, bool(model.ood.weight.any()))
    if by_folds is None:
        labels = model_labels(found, choices.source.classes, model.classes)  # -1 where there is none
        plain, disturbed = (held_out_scores(singles, fitted, outputs) for outputs in seen)
        description = choices.description
    else:
        n = len(by_folds.images)
        logits, labels = by_folds.logits(data.features[:n]), data.labels[:n]
        plain, disturbed = out_of_fold_parts(singles, data, by_folds)
        description = f"{shown.description}{OUT_OF_FOLD}"
    left_out = [] if source.folds is None else _left_out(singles, data, source.folds)
    known = choice.Known(logits, labels, plain, disturbed, left_out)
    chosen = choice.choose(
        choice.Candidates(fitted, plain), known, made, multiply_adds(model), prior_score(source.tuned)
    )
    for line in [choice_in_brief(chosen)] if brief else choice_table(chosen, len(known.labels), description):
        say(line)
    figures = {
        "known": description,
        "images": len(known.labels),
        "made_of_each_kind": len(half),
        "mistaken": chosen.mistaken,
        "cost": "multiply-adds over those of the network",
        "most_cost": choice.MOST_COST,
        "level": choice.LEVEL,
        "lead": chosen.lead,
        "candidates": chosen.rows,
    }
    return chosen.name, chosen.state, figures


def _seen(source: Source, images: Images) -> list[Outputs]:
    """What the network says of images, and of a disturbed copy of each."""
    found = []
    with image_bar("choosing", 2 * len(images)) as advance:
        for version in (images, np.stack([*map(seeded_copy, images)])):
            found.append(run_eager(source.model, version))
            advance(len(images))
    return found


def _made(source: Source, images: Images, say: Say) -> dict[str, Outputs]:
    """Kind -> what the network says of images that are made from these, but of kinds that it was taught."""
    kinds = [kind for kind in CHOICE_KINDS if kind not in source.outliers]
    if taught := sorted(set(CHOICE_KINDS) - set(kinds)):
        say(f"not chosen by, because the network was trained to reject them: {', '.join(taught)}")
    found = {}
    with image_bar("choosing", len(kinds) * len(images)) as advance:
        for kind in kinds:
            found[kind] = run_eager(source.model, make_for_choices(images, kinds=(kind,)))
            advance(len(images))
    return found


def _left_out(
    names: Sequence[str], data: FitData, folds: Folds
) -> list[tuple[Mapping[str, Array], Mapping[str, Array]]]:
    """For each class that is left out: scores of images of the others, and of its own."""
    with image_bar("leaving classes out", min(MOST_CLASSES, len(data.bias))) as advance:
        return [(left.known, left.unknown) for left in leave_out(names, data, folds, advance)]


def multiply_adds(model: SSODClassifier) -> int:
    """Of convolutions, linear layers and attention, for one image."""
    size = model.preprocess.input_size
    # Attention in plain matrix products: PyTorch does not count its fused form on a CPU.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.features(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2 + model.head_weight()[0].numel()
