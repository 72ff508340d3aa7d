"""`ssod-edge teach`: new classes in an export, from a few photos, without PyTorch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from small import random_images

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.files import sha256_file
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import load_spec, save_spec
from ssod_edge.training.model import build_model

CLASSES = ("a", "b", "c", "d", "e")
SIZE = 64


def write_photos(folder: Path, classes: str, each: int, seed: int) -> Path:
    """Images of a colour and a pattern for each class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        colour = np.random.default_rng((5, ord(name))).integers(0, 256, 3)
        for index, image in enumerate(random_images(each, seed=rng.integers(1 << 30)).numpy()):
            mixed = 0.4 * image.transpose(1, 2, 0) + 0.6 * colour + rng.normal(0, 3, (SIZE, SIZE, 3))
            path = folder / name / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(path)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `train --tune head` on five classes."""
    root = tmp_path_factory.mktemp("teach")
    torch.manual_seed(3)
    save_file(build_model("test_efficientnet", CLASSES, Preprocess(input_size=SIZE)).backbone.state_dict(), root / "w")
    (root / "w").rename(root / "w.safetensors")
    photos = write_photos(root / "photos", "abcde", 30, seed=1)
    backbone = ["--backbone", "test_efficientnet", "--size", SIZE, "--weights", root / "w.safetensors"]
    done = run("train", photos, *backbone, "--workers", 0, "--tune", "head", "-o", root / "runs", "--name", "run")
    assert done.exit_code == 0, done.output
    return root / "runs" / "run"


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Its export, on both engines in both precisions. Nobody changes it."""
    done = run("export", trained, "--score", "gen+mahalanobispp")
    assert done.exit_code == 0, done.output
    assert "features.npz: " in done.output
    return trained / "export"


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_class_is_known_afterwards_on_every_engine(exported, tmp_path):
    before = snapshot(exported)
    photos = write_photos(tmp_path / "new", "fg", 10, seed=2)
    done = run("teach", exported, photos, "-o", tmp_path / "taught", "--alike", "--max-drop", 5)
    assert done.exit_code == 0, done.output
    assert snapshot(exported) == before
    spec, old = load_spec(tmp_path / "taught"), load_spec(exported)
    assert spec.classes == (*CLASSES, "f", "g")
    assert [a.name for a in spec.artifacts] == [a.name for a in old.artifacts]
    assert all(a.verification["passed"] and a.threshold is not None for a in spec.artifacts)
    assert spec.source["taught"]["photos"] == {"f": 10, "g": 10}
    assert "checkpoint_sha256" not in spec.source and len(spec.source["parent_sha256"]) == 64
    fresh = write_photos(tmp_path / "fresh", "abcdefg", 10, seed=3)
    for artifact in spec.artifacts:
        with ssod_edge.open(tmp_path / "taught", artifact=artifact.name) as model:
            right = {
                name: np.mean([model.predict(path).class_name == name for path in (fresh / name).iterdir()])
                for name in "abcdefg"
            }
        assert min(right["f"], right["g"]) >= 0.7 and np.mean(list(right.values())) >= 0.85, right
