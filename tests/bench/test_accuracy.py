"""What the bench compares: accuracy columns by hand, the images it takes, and the plain classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from colour import CLASSES, SIZE, colour_images, edit_graph, edit_spec, write_colours
from PIL import Image

from ssod_edge.bench.accuracy import ImageSet, accuracy_figures, run_backends
from ssod_edge.bench.images import BenchImages, choose_images, query_images
from ssod_edge.bench.plain import PLAIN_OUTPUTS, Pair, choose_pairs, cut_plain, cut_plain_ir, export_plain, open_plain
from ssod_edge.config import Preprocess
from ssod_edge.data.named import NamedData, Via
from ssod_edge.data.pixels import read_pixels
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.runtime.engines.openvino import read_ir
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.spec import Threshold, load_spec

THRESHOLD = Threshold(value=-2.5, target_tpr=0.95, n=100, data="others", fitted_tpr=0.95)


@pytest.mark.parametrize("pair", [Pair("onnxruntime", "fp32"), Pair("openvino", "fp32"), Pair("openvino", "fp16")])
def test_plain_classifier_is_the_same_without_the_row(export: Path, tmp_path: Path, pair: Pair) -> None:
    images = colour_images(7)
    export_plain(Export.at(export), pair, tmp_path)
    with open_plain(tmp_path) as plain, open_runner(export, artifact=pair.fused) as fused:
        assert plain.artifact.name == f"plain-{pair.fused}"
        outputs, expected = plain.infer({"image": images}), fused.infer({"image": images})
    assert tuple(outputs) == PLAIN_OUTPUTS == ("logits", "probs")
    for name in PLAIN_OUTPUTS:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-4, atol=1e-4)


def test_pairs_are_those_that_the_export_has(export: Path) -> None:
    spec = load_spec(export)
    assert choose_pairs(spec) == [Pair("onnxruntime", "fp32"), Pair("openvino", "fp32")]
    half = replace(spec, artifacts=tuple(a for a in spec.artifacts if a.precision == "fp16"))
    assert choose_pairs(half) == [Pair("onnxruntime", "fp16"), Pair("openvino", "fp16")]
    assert choose_pairs(replace(spec, artifacts=(spec.artifact("openvino-fp16"),))) == [Pair("openvino", "fp16")]


def test_plain_graph_keeps_nothing_of_the_ood_row(export: Path) -> None:
    model = onnx.load(export / "model-fp32.onnx")
    cut_plain(model, len(CLASSES))
    assert [node.op_type for node in model.graph.node] == [
        "Cast", "Div", "Cast", "Conv", "GlobalAveragePool", "Flatten", "Cast", "Gemm", "Softmax",
    ]  # fmt: skip
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert shapes == {"scale": [], "kernel": [3, 3, 1, 1], "weight": [3, 3], "bias": [3]}


@pytest.mark.parametrize(("classes", "message"), [(4, "has 3 classes, not 4"), (2, "has 3 classes, not 2")])
def test_another_graph_is_refused(export: Path, classes: int, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        cut_plain(onnx.load(export / "model-fp32.onnx"), classes)


def test_a_gemm_without_the_ood_row_is_refused(export: Path) -> None:
    model = onnx.load(export / "model-fp32.onnx")
    cut_plain(model, len(CLASSES))
    with pytest.raises(ArtifactError, match=r"does not have 3 \+ 1 rows"):
        cut_plain(model, len(CLASSES))


def test_an_openvino_graph_that_is_cut_already_is_refused(export: Path) -> None:
    model = cut_plain_ir(read_ir(export / "openvino-fp32" / "model.xml"), len(CLASSES))
    assert [port.get_any_name() for port in model.outputs] == ["logits", "probs"] and len(model.inputs) == 1
    with pytest.raises(ArtifactError, match=r"does not have 3 \+ 1 rows"):
        cut_plain_ir(model, len(CLASSES))


def test_a_graph_without_a_gemm_is_refused(export: Path) -> None:
    model = onnx.load(export / "model-fp32.onnx")
    next(node for node in model.graph.node if node.op_type == "Gemm").op_type = "MatMul"
    with pytest.raises(ArtifactError, match="does not end in a Gemm"):
        cut_plain(model, len(CLASSES))


def outputs(classes: list[int], scores: list[float]) -> dict[str, np.ndarray]:
    return {"logits": np.eye(3, dtype=np.float32)[classes], "ood_score": np.array(scores, np.float32)}


def test_accuracy_columns_by_hand() -> None:
    labels = np.array([0, 1, 2, 2])
    known = {"eager": outputs([0, 1, 2, 0], [-9, -8, -7, -1]), "int": outputs([0, 1, 1, 0], [-9, -3, -7, -1])}
    unknown = {
        "near": {"eager": outputs([0, 0], [-8.5, 0]), "int": outputs([0, 0], [-2, -2])},
        "far": {"eager": outputs([0], [5]), "int": outputs([0], [-0.5])},
    }
    figures = accuracy_figures("int", THRESHOLD, labels, known, unknown, "eager", CLASSES)
    assert figures["top1"] == 0.5
    assert figures["agreement"] == 0.75
    # near: 3 of 4 ID scores lie below -2, for both images; far: all of them below -0.5.
    assert figures["ood_sets"]["near"] == {"auroc": 0.75, "fpr_at_id_tpr95": 1.0, "n_ood": 2, "false_accept": 0.0}
    assert figures["ood_sets"]["far"] == {"auroc": 1.0, "fpr_at_id_tpr95": 0.0, "n_ood": 1, "false_accept": 0.0}
    assert (figures["auroc"], figures["fpr_at_id_tpr95"]) == (0.875, 0.5)
    assert figures["decision_flips"] == 1  # the first near image: known to the eager model at -2.5, not to this one
    eager = accuracy_figures("eager", THRESHOLD, labels, known, unknown, "eager", CLASSES)
    assert (eager["agreement"], eager["decision_flips"], eager["top1"]) == (None, None, 0.75)
    # of the scores -9, -3, -7, -1 one lies above -2.5; of the eager model's near images -8.5 lies below it
    assert (figures["false_reject"], figures["false_accept"]) == (0.25, 0.0)
    assert (eager["false_reject"], eager["false_accept"]) == (0.25, 0.25)
    at = figures["deployment"]
    assert at["threshold"]["value"] == -2.5 and at["id_tpr"] == 0.75
    assert at["selective_accuracy"] == pytest.approx(2 / 3)  # of the three that are accepted, the third is wrong
    assert {name: found["rate"] for name, found in at["rejected_by_class"].items()} == dict(
        zip(CLASSES, (0, 0, 0.5), strict=True)
    )
    assert at["ood"]["near"]["false_accept"] == 0 and eager["deployment"]["ood"]["near"]["false_accept"] == 0.5
    stranger = accuracy_figures("int", THRESHOLD, np.array([0, 1, 2, -1]), known, unknown, "eager", CLASSES)
    assert stranger["deployment"] is None and stranger["false_reject"] == 0.25
    alone = accuracy_figures("int", THRESHOLD, labels, known, {}, "eager", CLASSES)
    assert (alone["false_reject"], alone["false_accept"]) == (0.25, None)


def test_accuracy_without_eager_ood_or_threshold() -> None:
    known = {"plain": {"logits": np.eye(3, dtype=np.float32)}, "int": outputs([0, 1, 2], [1, 2, 3])}
    for name in known:
        figures = accuracy_figures(name, None, np.array([0, 1, 1]), known, {}, None, CLASSES)
        assert figures.pop("top1") == pytest.approx(2 / 3)
        assert figures.pop("ood_sets") == {}
        assert set(figures.values()) == {None}


class Photos:
    """Images in memory; one that is None cannot be read."""

    def __init__(self, pixels: list[np.ndarray | None]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def picture(self, index: int) -> bytes | np.ndarray:
        pixels = self.pixels[index]
        return b"" if pixels is None else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def photo_set(n: int, missing: tuple[int, ...] = (), name: str = "id", labels: np.ndarray | None = None) -> ImageSet:
    photos = Photos([None if i in missing else pixels for i, pixels in enumerate(colour_images(n))])
    return ImageSet(name, "photos", photos, np.arange(n), labels)


def test_each_image_is_read_once_for_all_backends_and_a_bad_one_is_left_out(export: Path) -> None:
    images, counted = photo_set(70, missing=(3, 69)), []
    with open_runner(export, engine="openvino") as one, open_runner(export, engine="onnxruntime") as other:
        found = run_backends({"one": one, "other": other}, images, one.spec.preprocess, counted.append)
        expected = one.infer({"image": np.delete(colour_images(70), (3, 69), axis=0)})
    assert counted == [32, 32, 4]
    assert found.rows == [i for i in range(70) if i not in (3, 69)]
    assert found.unreadable == ["image bytes: it is empty"] * 2
    np.testing.assert_allclose(found.outputs["one"]["logits"], expected["logits"], rtol=1e-6)
    np.testing.assert_allclose(found.outputs["other"]["ood_score"], expected["ood_score"], rtol=1e-4)


def test_no_readable_image_gives_no_outputs(export: Path) -> None:
    with open_runner(export) as runner:
        found = run_backends({"one": runner}, photo_set(2, missing=(0, 1)), runner.spec.preprocess)
    assert found.outputs == {}
    assert len(found.unreadable) == 2


def test_output_that_is_not_finite_is_an_error_of_that_backend(export: Path) -> None:
    edit_graph(export, "onnx-fp32", bias=np.array([np.nan, 0, 0, 0], np.float32))
    with open_runner(export, engine="openvino") as good, open_runner(export, artifact="onnx-fp32") as bad:
        found = run_backends({"good": good, "bad": bad}, photo_set(40), good.spec.preprocess)
    assert list(found.outputs) == ["good"]
    assert "the output of 'bad' is not finite" in str(found.errors["bad"])


def test_without_data_the_reference_is_timed(export: Path) -> None:
    spec = load_spec(export)
    images = choose_images(Export(export, spec), NamedData())
    assert images.sets == ()
    assert "no recorded validation split" in str(images.note)
    found, origin = query_images(images, Export.at(export), 5)
    assert [image.size for image in found] == [(SIZE, SIZE)] * 5
    assert origin == f"5 images of reference.npz, {SIZE}x{SIZE}, as JPEG in memory"
    with pytest.raises(UsageError, match="--ood needs in-distribution images"):
        choose_images(Export(export, spec), NamedData(ood_data={"far": "demo:shapes"}))


def test_query_images_are_spread_and_the_unreadable_left_out(export: Path) -> None:
    found, origin = query_images(BenchImages(photo_set(100, missing=(0, 99))), Export.at(export), 5)
    assert len(found) == 3
    assert origin.startswith("3 images of photos")
    with pytest.raises(ArtifactError, match="none of 5 images"):
        query_images(BenchImages(photo_set(3, missing=(0, 1, 2))), Export.at(export), 5)


def test_named_data_are_opened(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra train")
    data = write_colours(tmp_path / "data")
    (data / "zebra").mkdir()
    Image.new("RGB", (9, 9)).save(data / "zebra" / "1.png")
    spec = load_spec(export)
    images = choose_images(
        Export(export, spec), NamedData(id_data=str(data), ood_data={"far": str(data / "zebra")}, via_size=8)
    )
    assert [(s.name, len(s.indices), s.via) for s in images.sets] == [("id", 12, Via(8)), ("far", 1, Via(8))]
    assert images.known is not None
    assert images.known.labels is not None
    names = [spec.classes[label] for label in images.known.labels]
    assert names == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4, "the model's numbering, not the folder's"
    settings = Preprocess(input_size=16)
    assert np.array_equal(images.known.read(0, settings), read_pixels(data / "blue" / "0.png", settings, via=Via(8)))
    with pytest.raises(UsageError, match="shares no class with the model"):
        choose_images(Export(export, replace(spec, classes=("cat", "dog"))), NamedData(id_data=str(data)))
    with pytest.raises(UsageError, match="does not exist"):
        choose_images(Export(export, spec), NamedData(id_data=str(tmp_path / "none")))


def test_quick_takes_some_images_of_all(export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra train")
    monkeypatch.setattr("ssod_edge.bench.images.QUICK_IMAGES", 4)
    images = choose_images(Export.at(export), NamedData(id_data=str(write_colours(tmp_path / "data"))), quick=True)
    assert images.known is not None
    assert images.known.indices.tolist() == [0, 4, 7, 11]


def test_the_recorded_split_is_used_only_while_the_data_are_the_same(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra train")
    from ssod_edge.data.sources import open_dataset
    from ssod_edge.data.splits import Splits

    data = write_colours(tmp_path / "data")
    splits = Splits(np.array([0, 2, 3, 4, 7, 8, 10, 11]), np.array([1, 5, 9]), np.array([6]))
    facts = {
        "data": str(data),
        "data_fingerprint": open_dataset(str(data)).fingerprint,
        "splits_hash": splits.hash,
    }
    edit_spec(export, lambda spec: replace(spec, source=facts))
    spec = load_spec(export)
    record = tmp_path / "splits.json"
    record.write_text(json.dumps({"val": [1, 5, 9], "calib": [6]}))
    images = choose_images(Export(export, spec), NamedData())
    assert images.known is not None
    assert images.known.indices.tolist() == [1, 5, 9]
    assert images.note is None
    for edited, reason in (
        ('{"val": [1, 5, 0], "calib": [6]}', "was changed after training"),
        ("{", "no readable splits.json"),
    ):
        record.write_text(edited)
        images = choose_images(Export(export, spec), NamedData())
        assert images.known is None
        assert reason in str(images.note)
    (data / "red" / "0.png").rename(data / "red" / "other.png")
    assert "changed since the run" in str(choose_images(Export(export, spec), NamedData()).note)
