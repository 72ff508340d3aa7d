"""Published weights: from a stand-in of the hub, its cache, or a package; and what happens where none can be had."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from servers import serving
from small import write_images

from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.errors import UsageError
from ssod_edge.training import published
from ssod_edge.training.checkpoint import load_checkpoint, trunk_hash
from ssod_edge.training.model import build_model
from ssod_edge.training.published import check_published, packaged_weights

REPOSITORY = "/timm/test_efficientnet.r160_in1k/resolve/"
TRAIN = ["--backbone", "test_efficientnet", "--size", "32", "--epochs", "1", "--batch-size", "32"]
SPLITS = ["--val-fraction", "0.15", "--calib-fraction", "0.15"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds of test_efficientnet: seeded random numbers, and 1000 classes."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("hub") / "model.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return path


@pytest.fixture
def hub(weights: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, paths that were asked for) of a stand-in of the hub."""
    content, asked = weights.read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            found = self.path.startswith(REPOSITORY) and self.path.endswith("/model.safetensors")
            self.send_response(200 if found else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if self.path.endswith("/model.safetensors"):
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as address:
        yield address, asked


def train(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the hub's client reads its environment when it is imported."""
    if not (folder / "data").exists():
        write_images(folder / "data", 210)
    command = [sys.executable, "-m", "ssod_edge", "train", "data", *TRAIN, *SPLITS, *options]
    variables = {**os.environ, "HF_HOME": str(folder / "cache"), **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


def test_training_starts_from_the_weights_that_the_hub_publishes(
    weights: Path, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    done = train(tmp_path, "--name", "first", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    assert any(path.startswith(REPOSITORY) for path in asked)
    assert json.loads((tmp_path / "runs" / "first" / "config.json").read_text())["weights"] == "published"
    meta = load_checkpoint(tmp_path / "runs" / "first" / "best.safetensors")[1]
    same = build_model("test_efficientnet", tuple("abcdefg"), Preprocess(32), weights=weights)
    assert meta["started_from"] == {"weights": "published", "sha256": trunk_hash(same)}
    # From then on the cache has them, where nothing can be reached too.
    again = train(tmp_path, "--name", "second", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert load_checkpoint(tmp_path / "runs" / "second" / "best.safetensors")[1]["started_from"] == meta["started_from"]
    resumed = train_more(tmp_path, "second")
    assert resumed.returncode == 0, resumed.stderr
    assert load_checkpoint(tmp_path / "runs" / "second" / "last.safetensors")[1]["started_from"] == meta["started_from"]


def train_more(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Resume a run for one more epoch, without any hub or cache."""
    path = folder / "runs" / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "epochs": 2}))
    command = [sys.executable, "-m", "ssod_edge", "train", "--resume", f"runs/{name}"]
    variables = {**os.environ, "HF_HOME": str(folder / "none"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("HF_HUB_OFFLINE", "1", "cannot be had"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "http://127.0.0.1:9 does not answer: "),  # nor is it asked again
    ],
)
def test_without_a_hub_one_error_names_the_ways_out(tmp_path: Path, variable: str, value: str, reason: str) -> None:
    done = train(tmp_path, **{variable: value})
    assert reason in done.stderr
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    for way in ("--weights FILE", "--weights none", "HF_ENDPOINT", "--backbone efficientnet_lite0"):
        assert way in done.stderr
    assert not (tmp_path / "runs").exists()


def test_random_weights_reach_for_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, "--weights", "none", "--name", "run", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "runs" / "run" / "best.safetensors")[1]["started_from"] is None


def test_a_backbone_without_published_weights_says_so() -> None:
    with pytest.raises(UsageError, match="no published weights of .*--weights none"):
        check_published(next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights))


def test_the_package_that_the_extra_train_installs_holds_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    path = packaged_weights("tf_efficientnet_lite0")
    if path is None:
        pytest.skip("needs the extra train")
    monkeypatch.setattr(timm, "create_model", None)  # nothing is asked of a hub
    check_published("tf_efficientnet_lite0")
    monkeypatch.undo()
    classes = tuple(map(str, range(1000)))
    model = build_model("efficientnet_lite0", classes, Preprocess(64), pretrained=True)
    stored = torch.load(path, weights_only=True)
    torch.testing.assert_close(model.backbone.state_dict()["conv_stem.weight"], stored["_conv_stem.weight"])
    torch.testing.assert_close(model.classifier.weight.detach(), stored["_fc.weight"])
    few = build_model("efficientnet_lite0", ("a", "b"), Preprocess(64), pretrained=True)
    assert few.classifier.weight.shape[0] == 2 and trunk_hash(few) == trunk_hash(model)


def test_a_package_that_is_not_there_leaves_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert published.packaged_weights("tf_efficientnet_lite0") is None


def test_a_published_checkpoint_of_another_model_is_refused(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["conv_stem.weight"] = torch.zeros(4, 3, 3, 3)
    save_file(state, tmp_path / "wrong.safetensors")
    write_images(tmp_path / "data", 210)
    arguments = ["train", str(tmp_path / "data"), *TRAIN, *SPLITS, "-o", str(tmp_path / "runs")]
    result = CliRunner().invoke(main, [*arguments, "--weights", str(tmp_path / "wrong.safetensors")])
    assert result.exit_code == 4 and "weights of another model" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damaged", ["list.txt", "table.csv", "photos.tar", "photos.parquet"])
def test_data_that_cannot_be_read_is_told_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 4)
    Path(damaged).write_text("no class\nof the photos\n")
    asked: list[str] = []
    monkeypatch.setattr("ssod_edge.training.session.check_published", asked.append)
    data = f"photos@{damaged}" if damaged == "list.txt" else damaged
    result = CliRunner().invoke(main, ["train", data, "--backbone", "test_efficientnet"])
    assert result.exit_code in (2, 4) and damaged in result.output and not asked, result.output
