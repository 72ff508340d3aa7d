"""A peer on the same photos: fastai's usual recipe, from the same published weights, at the same size.

    pip install fastai
    python scripts/peer.py RUN --epochs N --id DATA --ood near=DATA --json FILE

RUN is a run of `ssod-edge train` whose data is where it was. fastai trains on the photos that RUN trained on or set
thresholds with, and never sees those that it validated on. `fine_tune(N)`: an epoch of its head alone, then N epochs of
everything; `--epochs 0` stops after the first. Times are of training alone, with the validation after each
epoch; compare seconds on an idle machine. `cpu_seconds` are of the process and those that read photos.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import fastai
import numpy as np
import torch
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    Normalize,
    Resize,
    accuracy,
    aug_transforms,
    noop,
    set_seed,
    vision_learner,
)

from ssod_edge.config import PUBLISHED
from ssod_edge.data.named import parse_named_data
from ssod_edge.data.sources import ImageSource, model_labels, open_dataset
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.scores import ood_scores
from ssod_edge.errors import UsageError
from ssod_edge.files import write_json
from ssod_edge.training.model import build_model
from ssod_edge.training.run import Run, load_config

SCORES = ("msp", "energy", "gen")
#: Of the resize before the augmentation, over the network's side: fastai's presizing.
PRESIZE = 1.4


@dataclass(frozen=True)
class Photo:
    """An item of fastai's data block."""

    source: ImageSource
    index: int

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return np.asarray(self.source.image(self.index))

    @property
    def label(self) -> str:
        return self.source.classes[self.source.labels[self.index]]


def photos_of(source: ImageSource, indices: np.ndarray) -> list[Photo]:
    return [Photo(source, int(index)) for index in indices]


def make_learner(run: Run, batch_size: int, workers: int) -> tuple[Learner, int]:
    """fastai's learner of a run's photos and published weights, and how many photos it trains on."""
    source, splits = run.splits("go to the folder where it was trained")
    config, model = load_config(run.folder), run.model
    if config.weights != PUBLISHED:
        raise UsageError(f"'{run.folder}' did not start from published weights")
    size, mean, std = model.preprocess.input_size, model.preprocess.mean, model.preprocess.std
    train = np.concatenate([splits.train, splits.calib])
    photos = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=list(source.classes), sort=False)),
        get_x=attrgetter("pixels"),
        get_y=attrgetter("label"),
        splitter=IndexSplitter(range(len(train), len(train) + len(splits.val))),
        item_tfms=Resize(round(PRESIZE * size)),
        batch_tfms=[*aug_transforms(size=size), Normalize.from_stats(mean, std)],
    )
    dls = photos.dataloaders(photos_of(source, np.concatenate([train, splits.val])), bs=batch_size, num_workers=workers)
    learner = vision_learner(dls, model.backbone_name, pretrained=False, normalize=False, metrics=accuracy)
    published = build_model(model.backbone_name, source.classes, model.preprocess, pretrained=True).backbone
    missing = learner.model[0].model.load_state_dict(published.state_dict(), strict=False).missing_keys
    if missing:
        raise UsageError(f"the published weights lack {missing[0]}")
    return learner, len(train)


def logits_of(learner: Learner, source: ImageSource) -> np.ndarray:
    """float32 [N, M] of all photos of a data set."""
    loader = learner.dls.test_dl(photos_of(source, np.arange(len(source))))
    return learner.get_preds(dl=loader, act=noop)[0].numpy()


def evaluate(learner: Learner, known: str, unknown: dict[str, str]) -> dict[str, Any]:
    """Accuracy on known photos, and AUROC and false positives of scores of the logits against unknown ones."""
    source = open_dataset(known)
    logits = logits_of(learner, source)
    labels = model_labels(source.labels, source.classes, learner.dls.vocab)
    scores, found = ood_scores(logits, np.zeros(len(logits))), {}
    for name, data in unknown.items():
        others = logits_of(learner, open_dataset(data, labelled=False))
        theirs = ood_scores(others, np.zeros(len(others)))
        for score in SCORES:
            figures = detection_metrics(scores[score], theirs[score], bootstrap=0)
            found.setdefault(name, {})[score] = {key: figures[key] for key in ("auroc", "fpr_at_id_tpr95")}
    return {"accuracy": float((logits.argmax(1) == labels).mean()), "images": len(labels), "ood": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--epochs", type=int, default=3, help="of everything, after one of the head alone")
    parser.add_argument("--lr", type=float, default=2e-3, help="base_lr of fine_tune; its default is this default")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id", required=True, help="known photos that the run has not seen")
    parser.add_argument("--ood", action="append", default=[], metavar="NAME=DATA")
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    set_seed(given.seed, reproducible=True)
    learner, images = make_learner(Run.at(given.run), given.batch_size, given.workers)
    started, cpu = time.monotonic(), sum(os.times()[:4])
    with learner.no_bar():
        if given.epochs:
            learner.fine_tune(given.epochs, base_lr=given.lr)
        else:
            learner.freeze()
            learner.fit_one_cycle(1, slice(given.lr), pct_start=0.99)
    seconds, cpu = time.monotonic() - started, sum(os.times()[:4]) - cpu
    record = {
        **{key: value for key, value in vars(given).items() if key not in ("json", "ood")},
        "fastai": fastai.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "train_images": images, "images_seen": images * (1 + given.epochs),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        **evaluate(learner, given.id, parse_named_data(given.ood)),
    }  # fmt: skip
    write_json(given.json, record)
    print(f"accuracy {record['accuracy']:.1%} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
