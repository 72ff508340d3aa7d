"""What a small branch on the maps of an untouched network brings, beside the last layer alone and tuned upper blocks.

    python scripts/branch_trial.py RUN --id DATA --ood NAME=DATA ... --json FILE

RUN was trained with --tune head, and its data is where it was. The branch: 1x1 convolutions on the maps of the last
four stages, averaged onto the last grid, and two depthwise blocks; its mean and maximum stand beside the features
that the last layer reads. It is trained on maps that are computed once, of each photo, its mirror image and a
disturbed copy. All three are judged by the score that an export of them takes by default.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssod_edge.config import prior_score
from ssod_edge.data.images import whole_dataset
from ssod_edge.data.named import parse_named_data
from ssod_edge.data.sources import ImageSource, model_labels
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.metrics import detection_metrics
from ssod_edge.detect.regression import LEAST_DEVIATION, fit_head
from ssod_edge.detect.sums import fit_score
from ssod_edge.files import write_json
from ssod_edge.training.batches import load_batches
from ssod_edge.training.features import Versions
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.run import Run
from ssod_edge.training.stages import pooled, stage_maps
from ssod_edge.training.upper import Lesson, border_maps, cut, tune_upper, tuned_features

MAPS, WIDTH, EPOCHS, BATCH, RATE, DECAY = 4, 96, 25, 64, 1e-3, 0.05
PLAIN, MIRRORED, DISTURBED = range(3)
#: Of known photos that are accepted.
TPR = 0.95


class Mirrored(Versions):
    mirrored = True


class Branch(nn.Module):
    """Maps of several stages -> [N, 2 * MAPS * WIDTH]: mean and maximum over the places of the last grid."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.inner = nn.ModuleList([nn.Conv2d(width, WIDTH, 1) for width in widths])
        full = len(widths) * WIDTH
        self.blocks = nn.Sequential(*(part for _ in range(2) for part in (
            nn.Conv2d(full, full, 3, padding=1, groups=full), nn.Conv2d(full, full, 1), nn.GroupNorm(1, full),
            nn.Hardswish(),
        )))  # fmt: skip

    def forward(self, maps: list[Tensor]) -> Tensor:
        grid = maps[-1].shape[2:]
        on_grid = [F.adaptive_avg_pool2d(conv(m), grid) for conv, m in zip(self.inner, maps, strict=True)]
        found = self.blocks(torch.cat(on_grid, dim=1))
        return torch.cat([found.mean(dim=(2, 3)), found.amax(dim=(2, 3))], dim=1)


@torch.inference_mode()
def read(model: SSODClassifier, source: ImageSource, workers: int) -> tuple[list[Tensor], Tensor]:
    """Maps of the last stages, half [N, 3, C, h, w] each, and features float32 [N, 3, Dall]; PLAIN, MIRRORED, ..."""
    places = [place for place in model.stages if isinstance(place, int)][-MAPS:]
    maps: list[list[Tensor]] = [[] for _ in places]
    features = []
    for versions, *_ in load_batches(Mirrored(source, None, model.preprocess), workers, batch_size=32):
        x = normalise(versions.flatten(0, 1), model.preprocess).contiguous(memory_format=torch.channels_last)
        last, found = stage_maps(model.backbone, x, model.stages)
        z = model.backbone.forward_head(last, pre_logits=True)  # type: ignore[operator]
        features.append(torch.cat([*map(pooled, found), z], dim=1).unflatten(0, (-1, 3)))
        for kept, place in zip(maps, places, strict=True):
            kept.append(found[model.stages.index(place)].half().unflatten(0, (-1, 3)))
    return [torch.cat(part) for part in maps], torch.cat(features)


def train_branch(
    maps: list[Tensor], features: Tensor, head: tuple[Tensor, Tensor], labels: Tensor, train: np.ndarray, seed: int
) -> tuple[Branch, Tensor, Tensor]:
    """The branch, and weight [M, Db + Dall] and bias of the last layer on [branch | features]."""
    torch.manual_seed(seed)
    both = features[train][:, [PLAIN, DISTURBED]].flatten(0, 1)
    mean, deviation = both.mean(0), both.std(0).clamp_min(LEAST_DEVIATION)
    branch = Branch([m.shape[2] for m in maps])
    weight = nn.Parameter(head[0] * deviation)
    bias = nn.Parameter(head[1] + head[0] @ mean)
    own = nn.Linear(2 * len(maps) * WIDTH, len(weight), bias=False)
    nn.init.zeros_(own.weight)
    optimizer = torch.optim.AdamW(
        [{"params": [*branch.parameters(), *own.parameters()]}, {"params": [weight, bias], "lr": RATE / 10}],
        lr=RATE, weight_decay=DECAY,
    )  # fmt: skip
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, RATE / 10], total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        order, total = rng.permutation(train), 0.0
        for start in range(0, len(order) - BATCH + 1, BATCH):
            index, version = torch.from_numpy(order[start : start + BATCH]), torch.from_numpy(rng.integers(0, 3, BATCH))
            z = (features[index, version] - mean) / deviation
            logits = own(branch([m[index, version].float() for m in maps])) + F.linear(z, weight, bias)
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*branch.parameters(), *own.parameters(), weight, bias], 5.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * BATCH
        if epoch % 6 == 0:
            print(f"epoch {epoch + 1}/{EPOCHS}  loss {total / (len(order) // BATCH * BATCH):.4f}", flush=True)
    with torch.no_grad():
        scaled = weight / deviation
        return branch.eval(), torch.cat([own.weight, scaled], dim=1), bias - scaled @ mean


@torch.inference_mode()
def with_branch(branch: Branch, maps: list[Tensor], features: Tensor) -> Tensor:
    """[branch | features] of one version of images."""
    batches = range(0, len(features), 64)
    return torch.cat(
        [torch.cat([branch([m[i : i + 64].float() for m in maps]), features[i : i + 64]], 1) for i in batches]
    )


def judge(
    known: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    unknown: dict[str, np.ndarray],
    head: tuple[np.ndarray, np.ndarray],
    distance: int,
    score: str,
) -> dict[str, Any]:
    """Accuracy of test photos, and the score's AUROC, and what is accepted where 95 of 100 validation photos are.

    Args:
        known: features of "train", "train_disturbed", "val", "val_disturbed" and "test".
        labels: of "train", "val" and "test".
    """  # fmt: skip

    def outputs(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (z @ head[0].T + head[1]).astype(np.float32), np.zeros(len(z), np.float32), z

    fitted = np.concatenate([known["train"], known["train_disturbed"]])
    logits, id_logit, _ = outputs(fitted)
    data = FitData(fitted, np.tile(labels["train"], 2), logits, *head, id_logit, distance)
    state = fit_score(score, data, outputs(known["val"]))

    def scores(z: np.ndarray) -> np.ndarray:
        found = outputs(z)
        return state.score(found[2], found[0], found[1])

    test, limit = scores(known["test"]), np.quantile(scores(known["val"]), TPR, method="higher")
    figures: dict[str, Any] = {
        "accuracy": float((outputs(known["test"])[0].argmax(1) == labels["test"]).mean()),
        "val_accuracy": float((outputs(known["val"])[0].argmax(1) == labels["val"]).mean()),
        "accepted": float((test <= limit).mean()),
        "disturbed_accepted": float((scores(known["val_disturbed"]) <= limit).mean()),
    }
    for name, z in unknown.items():
        found = scores(z)
        auroc = detection_metrics(test, found, bootstrap=0)["auroc"]
        figures[name] = {"auroc": auroc, "accepted": float((found <= limit).mean())}
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--id", required=True, help="known photos that the run has not seen")
    parser.add_argument("--ood", action="append", required=True, metavar="NAME=DATA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--without-upper", action="store_true", help="leave the tuned blocks out")
    parser.add_argument("--json", required=True)
    return parser.parse_args()


def main() -> None:
    given = parse()
    run = Run.at(given.run)
    source, splits = run.splits("go to the folder where it was trained")
    model, train = run.model.eval(), np.sort(np.concatenate([splits.train, splits.calib]))
    named = parse_named_data(given.ood)
    test = whole_dataset(given.id, labelled=True).source
    labels = {
        "train": source.labels[train],
        "val": source.labels[splits.val],
        "test": model_labels(test.labels, test.classes, source.classes),
    }
    sets = {"own": source, "test": test, **{name: whole_dataset(data).source for name, data in named.items()}}
    started = time.process_time()
    read_sets = {name: read(model, images, given.workers) for name, images in sets.items()}
    record: dict[str, Any] = {**vars(given), "cpu_seconds": {"maps of all sets": time.process_time() - started}}

    def rows(take: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Features of known and unknown photos by `take(name, version)`, [N, D]."""
        own = {version: take("own", version).numpy() for version in (PLAIN, DISTURBED)}
        known = {
            "train": own[PLAIN][train], "train_disturbed": own[DISTURBED][train],
            "val": own[PLAIN][splits.val], "val_disturbed": own[DISTURBED][splits.val],
            "test": take("test", PLAIN).numpy(),
        }  # fmt: skip
        return known, {name: take(name, PLAIN).numpy() for name in named}

    z = read_sets["own"][1]
    started = time.process_time()
    fit = fit_head(z[train, PLAIN].numpy(), z[train, DISTURBED].numpy(), labels["train"], len(source.classes))
    record["cpu_seconds"]["head"] = time.process_time() - started
    plain = rows(lambda name, version: read_sets[name][1][:, version])
    head = fit.weight.astype(np.float32), fit.bias.astype(np.float32)
    record["head"] = judge(plain[0], labels, plain[1], head, model.last_width, prior_score("head"))
    print("head", record["head"], flush=True)

    started = time.process_time()
    start = torch.from_numpy(head[0]), torch.from_numpy(head[1])
    branch, weight, bias = train_branch(*read_sets["own"], start, torch.from_numpy(source.labels), train, given.seed)
    record["cpu_seconds"]["branch"] = time.process_time() - started
    record["branch_parameters"] = sum(p.numel() for p in branch.parameters())
    found = rows(lambda n, v: with_branch(branch, [m[:, v] for m in read_sets[n][0]], read_sets[n][1][:, v]))
    last = weight.detach().numpy(), bias.detach().numpy()
    record["branch"] = judge(*_split(found, labels), last, model.last_width, prior_score("head"))
    print("branch", record["branch"], flush=True)
    # The distance over the branch's features too: they move behind the others.
    own = weight.shape[1] - z.shape[2]
    moved = tuple({name: np.roll(part, -own, axis=1) for name, part in group.items()} for group in found)
    turned = np.roll(last[0], -own, axis=1), last[1]
    record["branch_distance"] = judge(*_split(moved, labels), turned, model.last_width + own, prior_score("head"))
    print("branch_distance", record["branch_distance"], flush=True)

    if given.without_upper:
        write_json(given.json, record)
        return
    started = time.process_time()
    record["upper"] = _upper(model, source, sets, named, splits.val, train, labels, given)
    record["cpu_seconds"]["upper"] = time.process_time() - started
    print("upper", record["upper"], flush=True)
    write_json(given.json, record)


def _split(found: Any, labels: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    return found[0], labels, found[1]


def _upper(
    model: SSODClassifier,
    source: ImageSource,
    sets: dict[str, ImageSource],
    named: Any,
    val: np.ndarray,
    train: np.ndarray,
    labels: dict[str, np.ndarray],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """The upper blocks tuned as `--tune upper` does, from the same photos."""  # fmt: skip
    parts = cut(model)
    maps, features = border_maps(model, parts, source, given.workers, lambda n: None)
    fit = fit_head(features.plain[train], features.disturbed[train], labels["train"], len(source.classes))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(fit.weight))
        model.classifier.bias.copy_(torch.from_numpy(fit.bias))
    tune_upper(model, parts, maps, features, Lesson(source.labels, train, given.seed), lambda e, loss: None)
    tuned = tuned_features(parts, maps)
    known = {
        "train": tuned.plain[train], "train_disturbed": tuned.disturbed[train],
        "val": tuned.plain[val], "val_disturbed": tuned.disturbed[val],
    }  # fmt: skip
    others = {}
    for name in ("test", *named):
        found, _ = border_maps(model, parts, sets[name], given.workers, lambda n: None)
        others[name] = tuned_features(parts, found).plain
    known["test"] = others.pop("test")
    head = model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy()
    return judge(known, labels, others, head, 0, prior_score("upper"))


if __name__ == "__main__":
    main()
