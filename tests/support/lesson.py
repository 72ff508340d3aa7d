"""What tests of teaching share: photos of classes that a small network tells apart, and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image
from small import random_images

from ssod_edge.cli import main
from ssod_edge.files import sha256_file

CLASSES = ("a", "b", "c", "d", "e")
SIZE = 64


def write_photos(folder: Path, classes: str, each: int, seed: int) -> Path:
    """Images of a colour and a pattern for each class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        write_class(folder / name, each, rng)
    return folder


def write_class(folder: Path, each: int, rng: np.random.Generator, suffix: str = ".png") -> None:
    """Images of the class that the folder is called after: its colour depends on the name alone."""
    folder.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng((5, *map(ord, folder.name))).integers(0, 256, 3)
    for index, image in enumerate(random_images(each, seed=rng.integers(1 << 30)).numpy()):
        mixed = 0.4 * image.transpose(1, 2, 0) + 0.6 * colour + rng.normal(0, 3, (SIZE, SIZE, 3))
        Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(folder / f"{index:03}{suffix}")


def train_run(root: Path) -> Path:
    """A run of `train --tune head` on five classes; the photos are in root/photos."""
    # Here, because most who need photos need no torch.
    import torch
    from safetensors.torch import save_file

    from ssod_edge.config import Preprocess
    from ssod_edge.training.model import build_model

    torch.manual_seed(3)
    weights = root / "w.safetensors"
    save_file(build_model("test_efficientnet", CLASSES, Preprocess(input_size=SIZE)).backbone.state_dict(), weights)
    photos = write_photos(root / "photos", "abcde", 30, seed=1)
    backbone = ["--backbone", "test_efficientnet", "--size", SIZE, "--weights", weights]
    done = run("train", photos, *backbone, "--workers", 0, "--tune", "head", "-o", root / "runs", "--name", "run")
    assert done.exit_code == 0, done.output
    return root / "runs" / "run"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def snapshot(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
