"""From a bundle to a device's own artifacts: verified, with a threshold that is justified, or nothing changed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from colour import BIAS, edit_graph, edit_spec, write_colours
from PIL import Image

import ssod_edge
from ssod_edge.cli import main
from ssod_edge.errors import ArtifactError, MissingExtraError, UsageError, VerificationError
from ssod_edge.export.bundle import write_bundle
from ssod_edge.export.deploy import _doubt, deploy
from ssod_edge.export.release import Targets
from ssod_edge.files import sha256_file
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.verify import Verification
from ssod_edge.spec import Spec, Threshold, load_spec

MakeExport = Callable[..., Path]
EVERY = ["onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16"]


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def reference_scores(export: Path) -> np.ndarray:
    with np.load(export / "reference.npz") as reference:
        return np.sort(reference["score_energy"])


def with_threshold(value: float, data: str = "calib") -> Callable[[Spec], Spec]:
    threshold = Threshold(value, 0.95, 100, data, 0.95)
    return lambda spec: replace(spec, artifacts=tuple(replace(a, threshold=threshold) for a in spec.artifacts))


@pytest.fixture
def bundle(export: Path, tmp_path: Path) -> Path:
    """A bundle whose threshold lies between the 38th and the 39th of 40 reference scores."""
    edit_spec(export, with_threshold(float(reference_scores(export)[37:39].mean())))
    write_bundle(export, tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "device" / "model"


def test_an_artifact_that_is_kept_may_lack_figures(export: Path, bundle: Path) -> None:
    """Those of the colour classifier say that they were verified, and no more."""
    done = CliRunner().invoke(main, ["export", "--from", str(bundle), "-o", str(export), "--target", "onnx", "--fp32"])
    assert done.exit_code == 0, done.output
    kept = next(line.split() for line in done.stdout.splitlines() if line.startswith("openvino-fp32"))
    assert kept[3:6] == ["-", "-", "-"] and kept[-4:] == ["yes,", "fp32", "on", "CPU"]


def test_artifacts_are_made_and_verified(export: Path, bundle: Path, out: Path) -> None:
    spec = deploy(bundle, out)
    assert spec == load_spec(out) and [a.name for a in spec.artifacts] == EVERY
    for artifact in spec.artifacts:
        figures = artifact.verification or {}
        assert figures["passed"] and (figures["n"], figures["device"]) == (40, "CPU")
        assert artifact.opset == 18 and "onnx" in artifact.versions, "how the graph came about"
    assert "openvino" in spec.artifact("openvino-fp32").versions
    assert "onnxruntime" not in spec.artifact("openvino-fp32").versions
    assert snapshot(out)["model-fp16.onnx"] == snapshot(export)["model-fp16.onnx"]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)
    for name in EVERY:
        with open_runner(export, artifact=name) as there, open_runner(out, artifact=name) as here:
            expected, found = there.infer({"image": pixels}), here.infer({"image": pixels})
        np.testing.assert_allclose(found["ood_score"], expected["ood_score"], atol=1e-2 if "fp16" in name else 1e-4)


def test_only_what_belongs_to_the_artifacts_is_released(bundle: Path, out: Path) -> None:
    deploy(bundle, out, Targets(("fp16",), ("openvino",)))
    assert set(snapshot(out)) == {
        "openvino-fp16/model.bin", "openvino-fp16/model.xml", "reference.npz", "ssod.json",
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_an_artifact_that_travelled_keeps_its_threshold(export: Path, bundle: Path, out: Path) -> None:
    for artifact in deploy(bundle, out, Targets(engines=("onnxruntime",))).artifacts:
        assert artifact.threshold == load_spec(export).artifact(artifact.name).threshold
        assert "taken over" not in artifact.threshold.data


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_new_artifact_takes_over_a_threshold_with_the_evidence(
    export: Path, bundle: Path, out: Path, precision: str
) -> None:
    (made,) = deploy(bundle, out, Targets((precision,), ("openvino",))).artifacts
    graph = load_spec(export).artifact(f"onnx-{precision}").threshold
    evidence = f"calib; fitted to onnx-{precision} and taken over: 0 of 40 reference images change sides"
    assert made.threshold == replace(graph, data=evidence)
    assert made.verification["decision_flips"] == 0


def test_where_all_of_the_reference_is_known_its_own_quantile_decides(export: Path, tmp_path: Path, out: Path) -> None:
    """As where the reference is photos that the model was trained on, and the threshold is that of others."""
    value = float(reference_scores(export)[-1]) + 1
    edit_spec(export, with_threshold(value))
    write_bundle(export, tmp_path / "b.tar")
    (made,) = deploy(tmp_path / "b.tar", out, Targets(("fp32",), ("openvino",))).artifacts
    assert made.threshold is not None and made.threshold.value == value
    assert "0 of 40 reference images change sides at the 95% quantile of their own scores" in made.threshold.data


def test_no_threshold_is_taken_over_at_which_all_of_the_reference_is_unknown(
    export: Path, tmp_path: Path, out: Path
) -> None:
    edit_spec(export, with_threshold(float(reference_scores(export)[-1]) - 9))
    write_bundle(export, tmp_path / "b.tar")
    lines: list[str] = []
    (made,) = deploy(tmp_path / "b.tar", out, Targets(("fp32",), ("openvino",)), say=lines.append).artifacts
    assert made.threshold is None and made.verification["decision_flips"] is None
    assert "openvino-fp32: no threshold: all 40 reference images are unknown" in lines[-1]
    assert "calibrate DIR --id DATA" in lines[-1]


def test_at_that_quantile_too_images_that_change_sides_are_a_doubt() -> None:
    figures = Verification(
        **{field.name: None for field in fields(Verification) if field.init} | {"n": 40, "decision_flips": 2}
    )
    assert _doubt(figures, 0.0) == "2 of 40 reference images change sides at the ONNX graph's, at most 1 may"
    assert _doubt(replace(figures, decision_flips=1), 0.0) is None


def test_no_threshold_is_taken_over_at_which_images_change_sides(export: Path, tmp_path: Path, out: Path) -> None:
    with np.load(export / "reference.npz") as reference:
        arrays = dict(reference)
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, 40)  # within what fp16 may drift
    value = float(np.median(arrays["score_energy"]))
    flips = int(((arrays["score_energy"] <= value) != (arrays["score_energy"] + noise <= value)).sum())
    assert flips > 1, "or the test shows nothing"
    arrays["score_energy"] = arrays["score_energy"] + noise.astype(np.float32)
    np.savez(export / "reference.npz", **arrays)
    edit_spec(export, with_threshold(value), rehash=True)
    write_bundle(export, tmp_path / "b.tar")
    lines: list[str] = []
    (made,) = deploy(tmp_path / "b.tar", out, Targets(("fp16",), ("openvino",)), say=lines.append).artifacts
    assert made.threshold is None and made.verification["passed"]
    assert f"no threshold: {flips} of 40 reference images change sides" in lines[-1]


def test_without_a_threshold_in_the_bundle_there_is_none(export: Path, tmp_path: Path, out: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, artifacts=tuple(replace(a, threshold=None) for a in spec.artifacts)))
    write_bundle(export, tmp_path / "b.tar")
    lines: list[str] = []
    spec = deploy(tmp_path / "b.tar", out, say=lines.append)
    assert [a.threshold for a in spec.artifacts] == [None] * 4
    assert sum("no threshold: the bundle has none" in line for line in lines) == 4


@pytest.mark.slow
def test_untrained_weights_are_deployed_for_their_latency(make_export: MakeExport, tmp_path: Path, out: Path) -> None:
    write_bundle(make_export(tmp_path / "untrained", trained=False), tmp_path / "b.tar")
    lines: list[str] = []
    spec = deploy(tmp_path / "b.tar", out, say=lines.append)
    assert [(a.threshold, a.verification["passed"]) for a in spec.artifacts] == [(None, True)] * 4
    assert not any("threshold" in line for line in lines), "there is nothing to calibrate"
    with pytest.raises(UsageError, match="untrained"):
        deploy(tmp_path / "b.tar", out, data=str(write_colours(tmp_path / "photos", 10)))


def test_images_on_the_device_give_every_artifact_its_own_threshold(bundle: Path, tmp_path: Path, out: Path) -> None:
    photos = write_colours(tmp_path / "photos", 10)
    spec = deploy(bundle, out, data=str(photos), targets=Targets(target_tpr=0.9))
    for artifact in spec.artifacts:
        threshold = artifact.threshold
        assert (threshold.n, threshold.target_tpr, threshold.data) == (30, 0.9, "folder 'photos', 30 images")
        with ssod_edge.open(out, artifact=artifact.name) as model:
            known = sum(v.known is True for v in model.predict_many(sorted(photos.rglob("*.png"))))
        assert known == 28, "ceil(31 * 0.9)"


@pytest.mark.parametrize(("data", "message"), [("demo", "takes a folder"), ("{}/empty", "holds no images")])
def test_other_images_than_a_folder_are_refused_at_once(bundle: Path, tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        deploy(bundle, tmp_path / "out", data=data.format(tmp_path))
    assert not (tmp_path / "out").exists()


def test_what_the_model_was_trained_on_gives_no_threshold(export: Path, tmp_path: Path, out: Path) -> None:
    photos = write_colours(tmp_path / "photos", 10)
    edit_spec(export, lambda spec: replace(spec, source={"data": str(photos), "splits_hash": "0" * 64}))
    write_bundle(export, tmp_path / "b.tar")
    with pytest.raises(UsageError, match="the model was trained on .*photos'.* not trained on"):
        deploy(tmp_path / "b.tar", out, data=str(photos))
    assert not out.exists()


def test_too_few_images_release_nothing(bundle: Path, tmp_path: Path, out: Path) -> None:
    photos = write_colours(tmp_path / "photos", 1)
    with pytest.raises(UsageError, match="at least 19"):  # before the work
        deploy(bundle, out, data=str(photos))
    assert not out.parent.exists()
    for index in range(19):
        (photos / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match="at least 19"):
        deploy(bundle, out, data=str(photos))
    assert not list(out.parent.iterdir())


def test_an_int8_ir_is_taken_as_it_is(export: Path, tmp_path: Path, out: Path) -> None:
    """It stands for the precision that a device cannot make: an fp32 one under that name would be made from ONNX."""
    ir = replace(load_spec(export).artifact("openvino-fp32"), versions={"nncf": "3.4.0"})
    edit_spec(export, lambda spec: spec.with_artifact(ir))
    write_bundle(export, tmp_path / "b.tar")
    assert "nncf" not in deploy(tmp_path / "b.tar", out, Targets(("fp32",), ("openvino",))).artifacts[0].versions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssod_edge.export.bundle.travels", lambda artifact: True)
        write_bundle(export, tmp_path / "b.tar")
    assert deploy(tmp_path / "b.tar", out, Targets(("fp32",), ("openvino",))).artifacts[0].versions == {"nncf": "3.4.0"}


def test_what_is_not_made_again_is_kept(bundle: Path, out: Path) -> None:
    deploy(bundle, out, Targets(engines=("openvino",)))
    (out / "notes.txt").write_text("mine")
    lines: list[str] = []
    spec = deploy(bundle, out, Targets(("fp32",), ("onnxruntime",)), say=lines.append)
    assert [a.name for a in spec.artifacts] == ["onnx-fp32", "openvino-fp32", "openvino-fp16"]
    assert "kept openvino-fp16 of the earlier export" in lines and (out / "notes.txt").exists()


def test_drift_releases_nothing(export: Path, tmp_path: Path, out: Path) -> None:
    write_bundle(export, tmp_path / "good.tar")
    deploy(tmp_path / "good.tar", out)
    before = snapshot(out)
    edit_graph(export, "onnx-fp32", bias=BIAS + 0.1)
    write_bundle(export, tmp_path / "b.tar")
    with pytest.raises(VerificationError, match=r"(?s)nothing is released: .*onnx-fp32.*\n.*openvino-fp32"):
        deploy(tmp_path / "b.tar", out)
    assert snapshot(out) == before and [path.name for path in out.parent.iterdir()] == ["model"]


def test_a_damaged_bundle_leaves_nothing(bundle: Path, out: Path) -> None:
    bundle.write_bytes(bundle.read_bytes()[: bundle.stat().st_size // 2])
    with pytest.raises(ArtifactError):
        deploy(bundle, out)
    assert not list(out.parent.iterdir())


def test_a_missing_engine_is_named_before_the_work(bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"exporting for openvino needs .*pip install 'ssod-edge\[openvino\]'"):
        deploy(bundle, out, Targets(engines=("openvino",)))
    assert not out.parent.exists()


def test_a_precision_that_is_not_there_is_refused_with_the_fix(export: Path, tmp_path: Path, out: Path) -> None:
    edit_spec(export, lambda spec: replace(spec, artifacts=spec.artifacts[:1]))
    write_bundle(export, tmp_path / "b.tar")
    with pytest.raises(UsageError, match="no ONNX graph in fp16; it has: fp32.*export RUN --target onnx --fp16"):
        deploy(tmp_path / "b.tar", out, Targets(("fp16",), ("openvino",)))
    assert [a.name for a in deploy(tmp_path / "b.tar", out, Targets(engines=("openvino",))).artifacts] == [
        "openvino-fp32"
    ]


# The command


def test_from_package_to_verdict(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edit_spec(export, with_threshold(float(reference_scores(export)[37:39].mean())))
    run = CliRunner().invoke
    assert run(main, ["package", "export", "-o", "door.tar"]).exit_code == 0
    done = run(main, ["export", "--from", "door.tar", "--target", "openvino", "--fp32"])
    assert done.exit_code == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["artifact", "openvino-fp32"]
    assert "exported to door in" in done.stderr
    Image.new("RGB", (30, 30), (220, 20, 20)).save("red.png")
    verdict = json.loads(run(main, ["predict", "door", "red.png", "--json"]).stdout)
    assert (verdict["class_name"], verdict["known"], verdict["engine"]) == ("red", True, "openvino")


def test_images_that_cannot_be_read_are_named(bundle: Path, tmp_path: Path) -> None:
    photos = write_colours(tmp_path / "photos", 10)
    (photos / "red" / "0.png").write_bytes(b"broken")
    arguments = ["export", "--from", str(bundle), "-o", str(tmp_path / "out"), "--id", str(photos), "--target", "onnx"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and done.stderr.count("left out: ") == 1 and "0.png" in done.stderr
    assert load_spec(tmp_path / "out").artifacts[0].threshold.n == 29


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN"], 2, "cannot be given with --from"),
        (["--backbone", "resnet18", "--size", "64"], 2, "--backbone, --size cannot be given with --from"),
        (["--from", "{}/nowhere.tar"], 2, "does not exist. Make one with: ssod-edge package"),
        (["-o", "{}/photos"], 2, "holds other files than an export"),
        (["--from", "{}"], 2, "is not a file. Make one with: ssod-edge package"),
        (["--tpr", "1.5"], 2, "must lie between 0 and 1"),
        (["--batch", "1,4,8", "--target", "onnx"], 2, "--batch is for TensorRT's plans, and this makes: onnx"),
        (["--version-compatible", "--target", "onnx"], 2, "for the plans of --target tensorrt, and this makes: onnx"),
    ],
)
def test_errors(bundle: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    write_colours(tmp_path / "photos", 10)
    given = ["--from", str(bundle), "-o", str(tmp_path / "out"), *(a.format(tmp_path) for a in arguments)]
    done = CliRunner().invoke(main, ["export", *given])
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_copied_folder_is_an_export_like_any_other(bundle: Path, out: Path, tmp_path: Path) -> None:
    """What was deployed can be packed again, where its graphs are."""
    deploy(bundle, out)
    shutil.copytree(out, tmp_path / "again")
    packed = write_bundle(tmp_path / "again", tmp_path / "again.tar")
    assert [a.name for a in packed.artifacts] == ["onnx-fp32", "onnx-fp16"]
