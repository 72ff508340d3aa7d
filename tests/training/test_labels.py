"""Labels that look wrong, and copies, in a run of `train --tune head`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.data.sources import open_dataset
from ssod_edge.data.splits import Splits
from ssod_edge.detect.regression import fit_head
from ssod_edge.training.labels import LABELS, unseen_probs, write_labels, wrong_labels
from ssod_edge.training.model import build_model
from ssod_edge.training.run import Run

SIZE = 64


def noisy(per_class: int = 60, swapped: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 32] of three classes, labels of which some are swapped, and which."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), per_class)
    z = 1.2 * rng.normal(size=(3, 32))[truth] + rng.normal(size=(len(truth), 32))
    chosen = rng.permutation(len(truth))[:swapped]
    labels = truth.copy()
    labels[chosen] = (truth[chosen] + rng.integers(1, 3, swapped)) % 3
    return z.astype(np.float32), labels, np.sort(chosen)


def test_swapped_labels_are_found_among_those_that_are_fitted_to_and_those_that_are_not() -> None:
    z, labels, swapped = noisy()
    order = np.random.default_rng(1).permutation(len(z))
    splits = Splits(np.sort(order[:120]), np.sort(order[120:150]), np.sort(order[150:]))
    head = fit_head(z[splits.train], z[splits.train], labels[splits.train], 3)
    probs = unseen_probs(head, z, splits.train)
    assert probs is not None and np.allclose(probs.sum(axis=1), 1, atol=1e-5)
    found = wrong_labels(labels, probs)
    assert len(np.intersect1d(found, swapped)) >= 7 and len(found) <= 9
    assert np.isin(swapped, splits.train).any() and not np.isin(swapped, splits.train).all()
    others = probs[found].max(axis=1) - probs[found, labels[found]]
    assert (np.diff(others) <= 0).all() and others[0] > 0.9, "the surest first"


def test_the_probabilities_are_of_fits_that_an_image_was_left_out_of() -> None:
    z, labels, swapped = noisy()
    z = np.concatenate([z, np.eye(len(z), dtype=np.float32) * 50], axis=1)  # each image can be learnt by heart
    head = fit_head(z, z, labels, 3)
    assert head.left_out is not None
    by_heart = head.logits(z).argmax(axis=1)
    assert (by_heart[swapped] == labels[swapped]).all()
    assert (head.left_out.argmax(axis=1)[swapped] != labels[swapped]).mean() > 0.7


def test_clean_labels_of_classes_that_differ_give_no_table(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(2), 20)
    probs = np.where(np.eye(2)[labels] > 0, 0.99, 0.01).astype(np.float32)
    assert len(wrong_labels(labels, probs)) == 0
    probs[3] = 0.4, 0.6  # unsure: below what is usual of the other class
    assert len(wrong_labels(labels, probs)) == 0
    head = fit_head(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), np.arange(2), 2)  # no folds of one image
    assert unseen_probs(head, np.eye(2, dtype=np.float32), np.arange(2)) is None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 30 images, each of a colour under patches of its own; "b, c" has a comma."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("a", "b, c", "d")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(30):
            coarse = rng.integers(0, 256, (8, 8, 3)).repeat(SIZE // 8, axis=0).repeat(SIZE // 8, axis=1)
            colour = np.eye(3)[label] * 255
            Image.fromarray((0.35 * coarse + 0.65 * colour).astype(np.uint8)).save(folder / f"{index:02}.png")
    return tmp_path / "photos"


def train(tmp_path: Path, photos: Path, name: str, *options: str) -> tuple[str, Path]:
    weights = tmp_path / "model.safetensors"
    if not weights.exists():
        torch.manual_seed(3)
        save_file(
            build_model("test_efficientnet", ("a", "b"), Preprocess(input_size=SIZE)).backbone.state_dict(), weights
        )
    arguments = ["--backbone", "test_efficientnet", "--size", str(SIZE), "--weights", str(weights), "--workers", "0"]
    result = CliRunner().invoke(
        main, ["train", str(photos), *arguments, "-o", str(tmp_path / "runs"), "--name", name, *options]
    )
    assert result.exit_code == 0, result.stderr
    return result.stderr, tmp_path / "runs" / name


def test_a_run_names_swapped_labels_in_a_table(tmp_path: Path, photos: Path) -> None:
    moved = [("a", "b, c", "03"), ("b, c", "d", "07"), ("d", "a", "11")]
    for label, other, name in moved:
        (photos / label / f"{name}.png").rename(photos / other / f"moved{name}.png")
    said, run = train(tmp_path, photos, "run", "--tune", "head")
    rows = list(csv.DictReader((run / LABELS).read_text().splitlines()))
    assert f"{len(rows)} labels look wrong, or are hard to tell: see '{run / LABELS}'" in said and len(rows) <= 6
    found = {(row["image"], row["label"], row["looks_like"]) for row in rows}
    assert found >= {(f"{other}/moved{name}.png", other, label) for label, other, name in moved}
    assert all(0.3 < float(row["probability"]) <= 1 for row in rows)


def test_a_run_keeps_copies_together_and_one_that_starts_from_it_keeps_its_splits(tmp_path: Path, photos: Path) -> None:
    names = [f"{index:02}.png" for index in range(0, 30, 2)]
    for name in names:
        with Image.open(photos / "a" / name) as image:
            image.save(photos / "a" / f"{name[:2]}again.jpg", quality=98)  # other bytes, the same picture
    shutil.copy(photos / "d" / "00.png", photos / "a" / "odd.png")
    said, run = train(tmp_path, photos, "run", "--tune", "head")
    record = json.loads((run / "splits.json").read_text())
    assert "copies: 1 of 106 images have the bytes of another one, and 30 look nearly like another" in said
    assert said.count("'a/odd.png' (a) and 'd/00.png' (d)") == 1, "said once, though they are divided twice"
    assert record["copies"] == {
        "exact": 1, "near": 30, "near_from_cosine": 0.85, "in_two_splits": 0,
        "other_labels": [["a/odd.png", "d/00.png"]],
    }  # fmt: skip
    source = open_dataset(str(photos))
    part = np.zeros(len(source), int)
    part[record["val"]], part[record["calib"]] = 1, 2
    of = {source.source(index): part[index] for index in range(len(source))}
    assert all(of[f"a/{name}"] == of[f"a/{name[:2]}again.jpg"] for name in names)
    assert Run.at(run).splits("")[1].hash == record["splits_hash"]
    options = ("--tune", "all", "--epochs", "1", "--batch-size", "8")
    said, _ = train(tmp_path, photos, "next", *options, "--weights", str(run / "best.safetensors"))
    assert json.loads((tmp_path / "runs" / "next" / "splits.json").read_text())["splits_hash"] == record["splits_hash"]


def test_a_table_takes_any_file_name(tmp_path: Path, photos: Path) -> None:
    source = open_dataset(str(photos))
    source.source = lambda index: '"x,\udcff".png'
    probs = np.full((90, 3), 0.05, np.float32)
    probs[np.arange(90), source.labels] = 0.9
    probs[4] = 0.02, 0.95, 0.03
    assert write_labels(tmp_path, source, probs).startswith("1 label looks wrong, or is hard")
    lines = (tmp_path / LABELS).read_bytes().splitlines()
    assert lines[1] == b'"""x,\xff"".png",a,"b, c",0.950'
