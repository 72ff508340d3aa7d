"""What an export starts from: a run, weights from elsewhere, or untrained weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small import CLASSES, random_images, write_run

from ssod_edge.cli import main
from ssod_edge.errors import UsageError
from ssod_edge.export.command import SourceOptions, choose_source
from ssod_edge.export.graph.build import export_run
from ssod_edge.export.graph.source import from_run, from_weights, imagenet_classes, untrained
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import load_spec
from ssod_edge.training.checkpoint import BEST
from ssod_edge.training.model import SSODClassifier


def test_changed_training_data_has_no_calibration_split(
    small_run: Path, small_model: SSODClassifier, tmp_path: Path
) -> None:
    shutil.copytree(small_run.parent / "data", tmp_path / "data")
    write_run(tmp_path / "run", small_model, str(tmp_path / "data"))
    (tmp_path / "data" / "a" / "000.png").rename(tmp_path / "data" / "a" / "zzz.png")
    with pytest.raises(UsageError, match="changed since training"):
        from_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UsageError, match="--id"):
        from_run(tmp_path / "run")


def test_the_training_data_by_its_name_gives_the_images_that_were_held_out(small_run: Path) -> None:
    given, own = from_run(small_run, str(small_run / ".." / "data")), from_run(small_run)
    assert given.images.thresholds is not None and own.images.thresholds is not None
    np.testing.assert_array_equal(given.images.thresholds.indices, own.images.thresholds.indices)
    assert given.images.thresholds.description == own.images.thresholds.description


def test_the_train_part_of_the_training_data_sets_no_threshold(small_run: Path) -> None:
    with pytest.raises(UsageError, match="trained on images of .*data/train.*or the whole data set"):
        from_run(small_run, str(small_run.parent / "data" / "train"))


def test_an_edited_calibration_split_is_refused(small_run: Path, small_model: SSODClassifier, tmp_path: Path) -> None:
    write_run(tmp_path / "run", small_model, str(small_run.parent / "data"))
    path = tmp_path / "run" / "splits.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "calib": [*record["calib"], 1]}))
    with pytest.raises(UsageError, match="changed after training"):
        from_run(tmp_path / "run")


def test_a_score_of_an_untrained_ood_row_is_refused(
    small_model: SSODClassifier, small_run: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(small_model)
    torch.nn.init.zeros_(model.ood.weight)
    write_run(tmp_path / "run", model, str(small_run.parent / "data"))
    with pytest.raises(UsageError, match="OOD row"):
        export_run(tmp_path / "run", score="ssod")
    assert not (tmp_path / "run" / "export").exists()


def test_choose_source(small_run: Path, tmp_path: Path) -> None:
    runs = str(small_run.parent)
    assert choose_source(SourceOptions(str(small_run))).checkpoint == small_run / BEST
    assert choose_source(SourceOptions(str(small_run / BEST))).folder == small_run
    assert choose_source(SourceOptions(None, runs)).folder == small_run
    assert choose_source(SourceOptions(None, runs, "test_efficientnet")).trained
    fresh = choose_source(SourceOptions(None, str(tmp_path), "mobilenetv3_small_050", size=32))
    assert not fresh.trained and len(fresh.model.classes) == 1000 and fresh.model.preprocess.input_size == 32
    assert fresh.folder == tmp_path / "mobilenetv3_small_050-untrained"
    shaped = SourceOptions(None, str(tmp_path), "test_resnet", size=64, fit="pad", roi=(0, 0, 9, 8))
    assert choose_source(shaped).model.preprocess == untrained("test_resnet", tmp_path, 64).model.preprocess.changed(
        fit="pad", roi=(0, 0, 9, 8)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": None, "runs": "nothing-here"}, "there is no run"),
        ({"run": "x", "backbone": "resnet18"}, "not both"),
        ({"run": "x", "backbone": "resnet18", "pretrained": True}, "and no run"),
        ({"run": None, "weights": "w.pth"}, "--backbone"),
        ({"run": "x", "classes": "names.txt"}, "--classes"),
        ({"run": "x", "size": 64}, "--size: for weights that were not trained here"),
        ({"run": "x", "fit": "pad", "roi": (0, 0, 9, 9)}, "--fit, --roi: .* A run keeps what it was trained with"),
        ({"run": None, "runs": "nothing-here", "backbone": "resnet18", "data": "demo"}, "leave --id out"),
        ({"run": None, "runs": "nothing-here", "backbone": "resnet-18"}, "unknown backbone"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_source(SourceOptions(**arguments))


def test_weights_from_a_file_must_have_the_named_classes(
    small_model: SSODClassifier, small_run: Path, tmp_path: Path
) -> None:
    torch.save(small_model.backbone.state_dict(), tmp_path / "w.pth")
    arguments = ("test_efficientnet", str(tmp_path / "w.pth"), tmp_path)
    with pytest.raises(UsageError, match="does not have 1000 classes"):
        from_weights(*arguments)
    source = from_weights(
        *arguments, data=str(small_run.parent / "data"), input_size=48, fit="squash", roi=(0, 0, 9, 8)
    )
    settings = source.model.preprocess
    assert (settings.input_size, settings.fit, settings.roi) == (48, "squash", (0, 0, 9, 8))
    assert source.trained and source.model.classes == CLASSES and source.facts["weights"] == "w.pth"
    assert torch.equal(source.model.classifier.weight, small_model.classifier.weight)
    (tmp_path / "names.txt").write_text("\n".join(reversed(CLASSES)))
    assert from_weights(*arguments, classes_file=str(tmp_path / "names.txt")).model.classes == CLASSES[::-1]
    (tmp_path / "names.txt").write_text("a\na\n")
    with pytest.raises(UsageError, match="twice"):
        from_weights(*arguments, classes_file=str(tmp_path / "names.txt"))


def test_a_checkpoint_is_not_exported_without_its_ood_row(small_run: Path) -> None:
    with pytest.raises(UsageError, match="is a run's checkpoint. Export it with: ssod-edge export "):
        from_weights("mobilenetv3_small_050", str(small_run / "best.safetensors"))


def test_imagenet_classes_are_in_label_order() -> None:
    classes = imagenet_classes()
    assert len(classes) == len(set(classes)) == 1000
    assert list(classes) == sorted(classes)
    assert (classes[0], classes[999]) == ("n01440764_tench", "n15075141_toilet_tissue")


def test_untrained_weights_have_the_biases_of_a_trained_network() -> None:
    """OpenVINO drops an addition of zero, and NNCF then takes the gates for other convolutions."""
    backbone = untrained("test_resnet", input_size=64).model.backbone
    biases = [value for name, value in backbone.named_parameters() if name.endswith("bias")]
    assert biases and all(value.abs().min() > 0 for value in biases)


def test_untrained_weights_are_exported_loudly_and_refused_by_predict(tmp_path: Path) -> None:
    runs = str(tmp_path)
    arguments = ["export", "--backbone", "test_efficientnet", "--fp16", "--size", "32", "--runs", runs]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "UNTRAINED" in result.stderr and "onnx-fp16" in result.stdout and "openvino-fp16" in result.stdout
    folder = tmp_path / "test_efficientnet-untrained"
    spec = load_spec(folder / "export")
    assert not spec.trained and all(artifact.threshold is None for artifact in spec.artifacts)
    with pytest.raises(UsageError, match="allow-untrained"):
        open_runner(folder)
    with open_runner(folder, allow_untrained=True) as runner:
        logits = runner.infer({"image": random_images(1, size=32).numpy()})["logits"]
    with open_runner(folder, engine="eager", allow_untrained=True) as runner:
        expected = runner.infer({"image": random_images(1, size=32).numpy()})["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_the_training_data_in_another_place_gives_the_images_that_were_held_out(
    small_run: Path, small_model: SSODClassifier, tmp_path: Path
) -> None:
    shutil.copytree(small_run.parent / "data", tmp_path / "data")
    write_run(tmp_path / "run", small_model, str(tmp_path / "data"))
    own = from_run(tmp_path / "run").images.thresholds
    (tmp_path / "data").rename(tmp_path / "moved")
    found = from_run(tmp_path / "run", str(tmp_path / "moved"))
    assert own is not None and found.images.thresholds is not None and found.images.training is not None
    np.testing.assert_array_equal(found.images.thresholds.indices, own.indices)
    assert "moved', calib split" in found.images.thresholds.description
    shutil.copytree(tmp_path / "moved", tmp_path / "others")
    (tmp_path / "others" / "a" / "000.png").unlink()
    others = from_run(tmp_path / "run", str(tmp_path / "others")).images.thresholds
    assert others is not None and len(others.indices) == len(others.source)
