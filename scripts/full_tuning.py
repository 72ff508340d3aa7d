"""Full tuning of published weights by one setting or another: rate, batch, head first, augmentation, running average.

    python scripts/full_tuning.py RUN --id DATA --near DATA --json FILE [--size 96] [--epochs 5] [--batch-size 32] ...

RUN is a run of `ssod-edge train` whose data is where it was; all of its photos but those that validate are trained on,
by the loop's optimizer, schedule and crops, without made images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms import v2

from ssod_edge.config import TrainConfig
from ssod_edge.data.images import whole_dataset
from ssod_edge.data.sources import ImageSource, model_labels
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.scores import ood_scores
from ssod_edge.files import write_json
from ssod_edge.training.batches import EvalImages, TrainImages
from ssod_edge.training.model import SSODClassifier, build_model, normalise
from ssod_edge.training.run import Run
from ssod_edge.training.schedule import learning_rate, make_optimizer


def read(source: ImageSource, indices: np.ndarray, model: SSODClassifier) -> Tensor:
    """uint8 [N, 3, S, S]."""
    images = EvalImages(source, indices, model.preprocess)
    return torch.stack([images[position][0] for position in range(len(images))])


def prepared(images: Tensor, model: SSODClassifier) -> Tensor:
    return normalise(images, model.preprocess).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def in_batches(function: Any, images: Tensor, model: SSODClassifier) -> Tensor:
    model.eval()
    return torch.cat([function(prepared(part, model)) for part in images.split(64)])


def judge(model: SSODClassifier, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and loss of labelled sets, and GEN's AUROC of "test" against "near"."""
    logits = {name: in_batches(lambda x: model(x)[0], images, model) for name, (images, _) in sets.items()}
    gen = {name: ood_scores(found.numpy(), np.zeros(len(found)))["gen"] for name, found in logits.items()}
    figures = {"near_gen": detection_metrics(gen["test"], gen["near"], bootstrap=0)["auroc"]}
    for name in ("val", "test"):
        labels = sets[name][1]
        figures[f"{name}_accuracy"] = float((logits[name].argmax(1) == labels).float().mean())
        figures[f"{name}_loss"] = float(F.cross_entropy(logits[name], labels))
    return {name: round(value, 4) for name, value in figures.items()}


def fit_last_layer(model: SSODClassifier, images: Tensor, labels: np.ndarray) -> None:
    """Logistic regression on the untouched last features, as the model's last layer."""
    z = in_batches(model.features, images, model).numpy()
    mean, deviation = z.mean(0), z.std(0) + 1e-6
    found = LogisticRegression(C=0.01, max_iter=200).fit((z - mean) / deviation, labels)
    weight = found.coef_ / deviation
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(weight))
        model.classifier.bias.copy_(torch.from_numpy(found.intercept_ - weight @ mean))


def tune(model: SSODClassifier, photos: TrainImages, train: np.ndarray, config: TrainConfig, change: Any) -> ModelEmaV3:
    """Train everything; returns the running average."""
    optimizer, average = make_optimizer(model, config), ModelEmaV3(model, use_warmup=True)
    steps = len(train) // config.batch_size
    for epoch in range(config.epochs):
        model.train()
        photos.start_epoch(epoch, config.preprocess.input_size)
        order = np.random.default_rng((config.seed, epoch)).permutation(train)
        for step in range(steps):
            chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
            images, labels, _ = zip(*(photos[int(index)] for index in chosen), strict=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * steps + step, steps)
            x = prepared(torch.stack([change(image) for image in images]), model)
            loss = F.cross_entropy(model.classifier(model.features(x)), torch.tensor(labels))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            average.update(model, step=epoch * steps + step + 1)
        print(f"epoch {epoch + 1}/{config.epochs}  loss of the last batch {float(loss.detach()):.3f}", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--id", required=True, help="known photos that the run has not seen")
    parser.add_argument("--near", required=True, help="unknown ones")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--head-first", action="store_true", help="begin with a last layer by logistic regression")
    parser.add_argument("--augment", action="store_true", help="also change colours, and erase a part of every fourth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    run = Run.at(given.run)
    source, splits = run.splits("go to the folder where it was trained")
    preprocess = replace(run.model.preprocess, input_size=given.size)
    asked = {name: getattr(given, name) for name in ("epochs", "batch_size", "lr", "seed")}
    config = TrainConfig(run.model.backbone_name, str(run.meta["data"]), preprocess=preprocess, **asked)
    torch.manual_seed(given.seed)
    model = build_model(config.backbone, source.classes, preprocess, pretrained=True)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train = np.sort(np.concatenate([splits.train, splits.calib]))
    sets = {"val": (read(source, splits.val, model), torch.from_numpy(source.labels[splits.val]))}
    for name, data in (("test", given.id), ("near", given.near)):
        others = whole_dataset(data, labelled=name == "test")
        labels = model_labels(others.source.labels, others.source.classes, source.classes)
        sets[name] = (read(others.source, others.indices, model), torch.from_numpy(labels))
    record: dict[str, Any] = dict(vars(given))
    if given.head_first:
        fit_last_layer(model, read(source, train, model), source.labels[train])
        record["head_alone"] = judge(model, sets)
    colours = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.0), v2.RandomErasing(0.25)])
    photos = TrainImages(source, preprocess, given.seed, config.crop_scale_min, config.hflip)
    average = tune(model, photos, train, config, colours if given.augment else lambda image: image)
    record |= {"weights": judge(model, sets), "average": judge(average.module, sets)}
    write_json(given.json, record)
    print(record["weights"], record["average"])


if __name__ == "__main__":
    main()
