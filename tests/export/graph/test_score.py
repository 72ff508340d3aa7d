"""Detectors in the exported graph: on every engine that runs here, in every precision, and through a whole export."""

from __future__ import annotations

import copy
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper
from small import CLASSES, make_model, random_images, run_onnx, write_images, write_run
from torch import Tensor, nn

from ssod_edge.bench.plain import cut_plain
from ssod_edge.cli import main
from ssod_edge.config import DETECTORS, SCORES, Preprocess, score_parts
from ssod_edge.data.images import Images, Subset, whole_dataset
from ssod_edge.detect.choice import DISTANCES, Candidates, fit_all, single_scores
from ssod_edge.detect.fit import FitData, fit
from ssod_edge.detect.made_images import CHOICE_KINDS
from ssod_edge.detect.scores import ood_scores
from ssod_edge.detect.sums import FittedScore, ScoreSum, fit_score, held_out_scores
from ssod_edge.errors import ArtifactError, UsageError, VerificationError
from ssod_edge.export.bundle import write_bundle
from ssod_edge.export.deploy import deploy
from ssod_edge.export.graph.auto_score import multiply_adds
from ssod_edge.export.graph.build import ExportOptions, export_source
from ssod_edge.export.graph.fp16 import to_fp16
from ssod_edge.export.graph.onnx import fused_graph, head_rows
from ssod_edge.export.graph.reference import run_eager
from ssod_edge.export.graph.score import ShippedScore, fit_data, ship_score, want_score
from ssod_edge.export.graph.score_graph import MOST_ROUNDING, FusedScore, lost_to_rounding, score_of_graph
from ssod_edge.export.graph.source import Source, from_run, untrained
from ssod_edge.export.int8.quantize import float_scope
from ssod_edge.export.onnx_file import check_fused
from ssod_edge.export.release import Say, Targets
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.verify import verify_runner
from ssod_edge.spec import DETECTOR_NAME, load_spec
from ssod_edge.training.model import SSODClassifier, normalise

SIZE, WIDTH = 32, 48


class Tiny(nn.Module):
    """What the export needs of a model: one convolution, a ReLU and a pooling, traced in a blink."""

    classes, backbone_name, preprocess = CLASSES, "tiny", Preprocess(input_size=SIZE)
    last_width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, WIDTH, 3, stride=2)
        self.classifier, self.ood = nn.Linear(WIDTH, len(CLASSES)), nn.Linear(WIDTH, 1)
        nn.init.normal_(self.classifier.weight)

    @property
    def backbone(self) -> nn.Module:
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))

    def forward_head(self, x: Tensor, pre_logits: bool = True) -> Tensor:
        return x.mean(dim=(2, 3))

    def features(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def head(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier(z), self.ood(z).squeeze(1)

    def head_weight(self) -> tuple[Tensor, Tensor]:
        both = self.classifier, self.ood
        return torch.cat([layer.weight for layer in both]), torch.cat([layer.bias for layer in both])


@pytest.fixture(scope="module")
def tiny() -> SSODClassifier:
    return Tiny().eval()  # type: ignore[return-value]


def pictures(n: int, seed: int) -> Tensor:
    return random_images(n, seed=seed, size=SIZE)


def fit_tiny(tiny: SSODClassifier, name: str) -> FittedScore:
    logits, id_logit, features = run_eager(tiny, pictures(200, seed=5).numpy())
    weight, bias = (part[: len(CLASSES)].detach().numpy() for part in tiny.head_weight())
    data = FitData(features, logits.argmax(axis=1), logits, weight, bias, id_logit)
    with pytest.MonkeyPatch.context() as patch:
        if name == "vim-principal":
            patch.setattr("ssod_edge.detect.fit.RANK", 8)
        fitted = fit_score(name.removesuffix("-principal").removesuffix("-plain"), data)
    return replace(fitted, centers={}) if name.endswith("-plain") else fitted  # type: ignore[call-arg]


SUMS = (
    "gen+mahalanobispp+residual",
    "gen+mahalanobispp",
    "ssod+energy+mahalanobis+rmd",
    "posterior+knn",
    "msp+maxlogit+knn+vim",
    "ssod+gen",
)
#: Sums of earlier releases, which have no centers.
PLAIN = tuple(f"{name}-plain" for name in ("ssod+energy+mahalanobis+rmd", "msp+rmdpp+knn+vim"))
GRAPHS = (*DETECTORS, "vim-principal", *SUMS, *PLAIN)


@pytest.fixture(scope="module", params=GRAPHS)
def fused(request: pytest.FixtureRequest, tiny: SSODClassifier) -> tuple[FittedScore, onnx.ModelProto]:
    detector = fit_tiny(tiny, request.param)
    return detector, fused_graph(tiny, detector.name, trained=True, detector=detector)


def run_openvino(graph: onnx.ModelProto, images: Tensor) -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(io.BytesIO(graph.SerializeToString()))
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({"image": images.numpy()})["ood_score"])


def test_every_engine_gives_the_score_in_double_precision(tiny, fused) -> None:
    detector, graph = fused
    images = pictures(9, seed=3)
    logits, id_logit, features = run_eager(tiny, images.numpy())
    expected = detector.score(features, logits, id_logit)
    bound = (1e-3 if "mahalanobispp" in detector.name else 1e-4) * float(np.ptp(expected))
    found = run_onnx(graph, images)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(found["ood_score"], expected, rtol=1e-5, atol=bound)
    np.testing.assert_allclose(run_openvino(graph, images), expected, rtol=1e-5, atol=bound)
    assert np.ptp(expected) > 1e-3


def test_reduced_precision_leaves_the_whole_detector_in_fp32(tiny, fused) -> None:
    detector, graph = fused
    rows = head_rows(tiny, detector)
    images = pictures(64, seed=3)
    half, _ = to_fp16(graph, rows, images.numpy())
    halves = {tensor.name for tensor in half.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    assert len(halves) == 2  # weight and bias of the one convolution
    expected, found = run_onnx(graph, images)["ood_score"], run_onnx(half, images)["ood_score"]
    assert np.abs(found - expected).max() < 0.03 * np.ptp(expected)
    quantised = [node for node in graph.graph.node if node.name not in float_scope(graph, rows)]
    assert {node.op_type for node in quantised} <= {"Conv", "Relu"}


@pytest.mark.parametrize("name", SCORES)
def test_fp16_looks_for_overflow_in_what_the_network_computes(tiny, name: str) -> None:
    """And not in the constants of a score, such as the minus infinity with which msp leaves out the largest logit."""
    images = pictures(16, seed=3).numpy()
    _, report = to_fp16(fused_graph(tiny, name, trained=True), len(CLASSES) + 1, images)
    with torch.no_grad():
        values = tiny.backbone.conv(normalise(torch.from_numpy(images), tiny.preprocess))
    assert report.largest == pytest.approx(float(values.abs().max()), rel=1e-4)


def test_tensorrt_builds_the_graph(fused, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(fused[1].SerializeToString()), parser.get_error(0)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 3, SIZE, SIZE), (1, 3, SIZE, SIZE), (4, 3, SIZE, SIZE))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_the_plain_classifier_has_no_row_of_the_detector(tiny, fused) -> None:
    _, graph = fused
    plain = onnx.ModelProto()
    plain.CopyFrom(graph)
    cut_plain(plain, len(CLASSES))
    gemms = [node for node in plain.graph.node if node.op_type in ("Gemm", "MatMul")]
    weights = {tensor.name: tuple(tensor.dims) for tensor in plain.graph.initializer}
    assert [weights[node.input[1]] for node in gemms] == [(len(CLASSES), WIDTH)]


def test_a_gemm_beside_the_fused_one_is_refused(tiny, fused) -> None:
    detector, graph = fused
    rows = head_rows(tiny, detector)
    head = check_fused(graph, rows)
    with pytest.raises(VerificationError, match=f"{rows + 1} rows"):
        check_fused(graph, rows + 1)
    twin = onnx.ModelProto()
    twin.CopyFrom(graph)
    twin.graph.node.append(helper.make_node("Gemm", list(head.input), ["twin"], transB=1))
    with pytest.raises(VerificationError, match="must be alone"):
        check_fused(twin, rows)
    deep = onnx.ModelProto()  # a second layer on the logits: not what "fused" means
    deep.CopyFrom(graph)
    (last,) = (node for node in deep.graph.node if "ood_score" in node.output)
    last.output[0] = "before"
    deep.graph.node.append(helper.make_node("MatMul", [head.output[0], "w"], ["more"]))
    deep.graph.node.append(helper.make_node("Add", ["before", "more"], ["ood_score"]))
    with pytest.raises(VerificationError, match="exactly one Gemm, found 2"):
        check_fused(deep, rows)


def end_of_graph(model: SSODClassifier, score: FittedScore, z: torch.Tensor) -> np.ndarray:
    """What `FusedScore` gives for features."""
    fused = FusedScore(score, model.head_weight())
    logits, id_logit = model.head(z)
    rows = torch.nn.functional.linear(z, torch.from_numpy(fused.weight), torch.from_numpy(fused.bias))
    assert rows.shape[1] == score.rows
    found: np.ndarray = fused(z, logits, logits.softmax(1), id_logit, rows.split(fused.sizes, dim=1)).numpy()
    return found


@pytest.mark.parametrize("name", [*GRAPHS, "energy+knn+vim+mahalanobis"])
def test_the_graph_is_exact_for_features_of_any_size(tiny: SSODClassifier, name: str) -> None:
    detector = fit_tiny(tiny, name)
    _, _, features = run_eager(tiny, pictures(40, seed=9).numpy())
    z = torch.from_numpy(features * np.geomspace(0.1, 10, 40, dtype=np.float32)[:, None])
    with torch.no_grad():
        found = end_of_graph(tiny, detector, z)
        expected = detector.score(z.numpy(), *(part.numpy() for part in tiny.head(z)))
    # A difference of squares loses more, the further out a feature lies along the principal space, and the less
    # features vary: here to a thousandth of their length.
    bound = 1e-3 if name in ("vim-principal", "mahalanobispp") else 1e-4
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * np.ptp(expected))


@pytest.mark.parametrize("classes", [2, 4, 1000])
@pytest.mark.parametrize("spread", [0.1, 3, 30, 1000])
def test_gen_in_the_graph_is_gen(classes: int, spread: float) -> None:
    """Also where a softmax in fp32 has nothing left of the other classes."""
    logits = (spread * np.random.default_rng(classes).normal(size=(200, classes))).astype(np.float32)
    expected, x = ood_scores(logits, np.zeros(200))["gen"], torch.from_numpy(logits)
    found = score_of_graph("gen", x, torch.softmax(x, dim=1), x[:, 0]).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-3)


def test_gen_in_the_graph_ranks_sure_images() -> None:
    """Until beyond a margin of 87, where the probabilities of the others are no numbers in fp32 any more."""
    x = torch.stack([torch.linspace(0.5, 700, 400), torch.zeros(400), torch.zeros(400)], 1)
    found = score_of_graph("gen", x, torch.softmax(x, dim=1), x[:, 0])
    assert (found.diff() < 0).all() and (found > 0).all()


@pytest.mark.parametrize(
    "name", ["vim", "residual", "mahalanobis", "rmd", "mahalanobispp", "rmdpp", "knn", "gen+mahalanobispp+residual"]
)
def test_the_graph_reads_the_last_features_where_the_score_does(tiny: SSODClassifier, name: str) -> None:
    logits, id_logit, features = run_eager(tiny, pictures(200, seed=5).numpy())
    weight, bias = (part[: len(CLASSES)].detach().numpy() for part in tiny.head_weight())
    data = FitData(features, logits.argmax(axis=1), logits, weight, bias, id_logit, last=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssod_edge.detect.fit.CANCELLATION", 1e9)
        fitted = fit_score(name, data)
    z = torch.from_numpy(run_eager(tiny, pictures(40, seed=9).numpy())[2])
    with torch.no_grad():
        found = end_of_graph(tiny, fitted, z)
        expected = fitted.score(z.numpy(), *(part.numpy() for part in tiny.head(z)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.ptp(expected))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_model: SSODClassifier) -> Path:
    """A run with 84 training images, 84 for the thresholds and no validation split, of a small real network."""
    root = tmp_path_factory.mktemp("score")
    write_images(root / "data", 168)
    write_run(root / "run", small_model, str(root / "data"))
    return root / "run"


def shipped_by(source: Source, name: str | None, say: Say, earlier: Export | None = None) -> ShippedScore:
    """The score of an export: decided on, its images divided, then fitted or chosen."""
    wanted = want_score(source, name, earlier, say)
    return ship_score(replace(source, images=wanted.divide(source.images, source.folds is not None, say)), wanted, say)


@pytest.mark.slow
def test_a_detector_goes_all_the_way_to_a_device(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    spec = export_source(from_run(run), None, ExportOptions(("fp32", "fp16"), score="rmd"), lines.append)
    assert spec.score == {"name": "rmd", "evidence": "chosen when exporting"}
    assert spec.detector["images"] == 84 and "train split" in spec.detector["data"]
    assert spec.detector["settings"]["classes"] == len(CLASSES)
    assert {artifact.name for artifact in spec.artifacts} >= {"onnx-fp32", "onnx-fp16", "openvino-fp32"}
    assert all(a.verification["passed"] and a.threshold.n == 84 for a in spec.artifacts)  # type: ignore[index,union-attr]
    image = {"image": random_images(2, seed=8).numpy()}
    with open_runner(run, engine="eager") as eager, open_runner(run / "export", artifact="onnx-fp32") as fused:
        expected, found = eager.infer(image)["ood_score"], fused.infer(image)["ood_score"]
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert eager.artifact.threshold is not None and verify_runner(eager, run / "export").passed
    bundle = tmp_path / "small.tar"
    write_bundle(run, bundle)
    deployed = deploy(bundle, tmp_path / "device", Targets(("fp32",), ("openvino",)))
    assert deployed.detector == spec.detector and (tmp_path / "device" / DETECTOR_NAME).is_file()
    (run / "export" / DETECTOR_NAME).write_bytes(b"")
    with pytest.raises(ArtifactError, match="was changed or cut short"):
        open_runner(run, engine="eager")
    with pytest.raises(ArtifactError, match="was changed or cut short"):
        write_bundle(run, bundle)
    # One that is asked for the same, if only by silence, makes it again; one that needs none leaves none behind.
    one = ExportOptions(("fp32",), ("onnxruntime",))
    assert export_source(from_run(run), None, one, lines.append).detector == spec.detector
    assert any("was changed or cut short" in line and "made anew" in line for line in lines)
    assert export_source(from_run(run), None, replace(one, score="energy")).detector == {}
    assert not (run / "export" / DETECTOR_NAME).exists()


def test_auto_chooses_on_images_that_nothing_else_uses(run: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    source = replace(from_run(run), model=tiny)
    shipped = shipped_by(source, "auto", lines.append)
    rows = shipped.choice["candidates"]
    least, lead = min(row["regret"] for row in rows.values() if row["cost"] <= 0.01), shipped.choice["lead"]
    assert rows[shipped.name]["regret"] <= least + lead and rows[shipped.name]["cost"] <= 0.01
    assert lead == pytest.approx(1 / np.sqrt(42))
    assert any(f"{shipped.name} " in line and "<- shipped" in line for line in lines)
    assert lines[-1].startswith("shipped: gen+mahalanobispp, unless the largest regret of another is 15 points less")
    singles = {name for name in rows if "+" not in name}
    assert singles == {*SCORES, *DETECTORS}
    assert len(rows) - len(singles) == 4 * 7 * 2 + 7
    assert {"ssod+gen+mahalanobispp", "ssod+gen+mahalanobispp+residual"} <= set(rows)
    for row in rows.values():
        assert set(row["auroc"]) == set(row["fpr"]) == {*CHOICE_KINDS, "mistaken"}
        assert set(row["figures"]) == {*row["auroc"], "disturbed"}
        assert 0 <= row["figures"]["disturbed"] <= (1 + row["accepted"]) / 2
        for kind, figure in row["auroc"].items():
            assert row["figures"][kind] == pytest.approx((figure + 1 - row["fpr"][kind]) / 2)
    assert any("part that chooses" in line for line in lines)  # this run has no validation images
    divided = source.images.divide(True, lines.append)
    assert shipped.choice["known"] == divided.choices.description and len(divided.thresholds) == 42  # type: ignore
    # With nothing allowed, what costs nothing is left.
    monkeypatch.setattr("ssod_edge.detect.choice.MOST_COST", 0.0)
    assert not set(score_parts(shipped_by(source, "auto", lines.append).name)) & set(DISTANCES)


def test_an_export_that_names_no_score_chooses_one(run: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    source = replace(from_run(run), model=tiny, outliers=("shuffle", "zoom"))
    few = shipped_by(source, None, lines.append)
    assert (few.name, few.choice) == ("energy", {})
    assert any("it takes 200 training images and as many held-out ones" in line for line in lines)
    assert source.images.thresholds is not None
    choices, thresholds = source.images.thresholds.halves("validation", "rest")
    source = replace(source, images=replace(source.images, choices=choices, thresholds=thresholds))
    monkeypatch.setattr("ssod_edge.detect.choice.LEAST_UNASKED", 40)
    lines.clear()
    chosen, asked = shipped_by(source, None, lines.append), shipped_by(source, "auto", lambda line: None)
    assert (chosen.name, chosen.evidence, chosen.choice) == (asked.name, asked.evidence, asked.choice)
    # The images of the thresholds had no say.
    assert source.images.divide(True, lines.append) == source.images and "validation" in chosen.choice["known"]
    (line,) = (line for line in lines if line.startswith(f"score {chosen.name}: AUROC"))
    assert "--score auto shows all" in line and not any("<- shipped" in line for line in lines)
    # A network that was not trained with made outliers, and one with too few images to choose by.
    for outliers, least in (((), 40), (("zoom",), 200)):
        monkeypatch.setattr("ssod_edge.detect.choice.LEAST_UNASKED", least)
        unasked = shipped_by(replace(source, outliers=outliers), None, lines.append)
        assert (unasked.name, unasked.choice) == ("gen+mahalanobispp", {})
        assert isinstance(unasked.detector, ScoreSum) and unasked.detector.centers
    # It is standardised by the held-out images, of which there are enough.
    logits = run_eager(tiny, choices.read(tiny.preprocess, choices.indices)[0])[0]
    center = ood_scores(logits, np.zeros(len(logits)))["gen"].mean()
    assert unasked.detector.centers["gen"] == pytest.approx(center, rel=1e-5)
    assert unasked.record["held_out"] == choices.description
    # What cannot be chosen or fitted costs no export.
    monkeypatch.setattr("ssod_edge.detect.choice.LEAST_UNASKED", 40)
    monkeypatch.setattr("ssod_edge.export.graph.score.LEAST_IMAGES", 1000)
    assert shipped_by(source, None, lines.append).name == "energy"
    assert lines[-1].startswith("no score can be chosen") and lines[-1].endswith("so it is energy")
    assert shipped_by(replace(source, outliers=()), None, lines.append).name == "energy"
    assert lines[-1].startswith("the score gen+mahalanobispp cannot be fitted")
    monkeypatch.setattr("ssod_edge.data.images.LEAST_IMAGES", 1000)
    with pytest.raises(UsageError, match="at least 1000 images"):
        shipped_by(source, "auto", lines.append)


def test_auto_is_not_told_by_images_that_training_taught(run: Path, tiny) -> None:
    lines: list[str] = []
    source = replace(from_run(run), model=tiny, outliers=("shuffle", "rotate"))
    shipped = shipped_by(source, "auto", lines.append)
    kinds = set(shipped.choice["candidates"]["energy"]["figures"])
    assert kinds == {*CHOICE_KINDS, "mistaken", "disturbed"} - {"shuffle"}
    assert any("trained to reject them: shuffle" in line for line in lines)


@pytest.mark.parametrize(
    "score", [pytest.param("auto", marks=pytest.mark.slow), "energy+rmd", pytest.param("msp", marks=pytest.mark.slow)]
)
def test_an_export_keeps_the_score_of_the_one_that_is_there(
    run: Path, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    lines: list[str] = []
    source = replace(from_run(run), model=tiny)
    place = tmp_path / "export"
    options = ExportOptions(("fp32",), ("onnxruntime",), score=score)
    first = export_source(source, place, options)
    monkeypatch.setattr("ssod_edge.export.graph.score.fit_data", lambda *given: pytest.fail("it was fitted again"))
    again = export_source(source, place, ExportOptions(("fp32",), ("openvino",)), lines.append)
    assert {artifact.name for artifact in again.artifacts} == {"onnx-fp32", "openvino-fp32"}
    assert replace(again, artifacts=()) == replace(first, artifacts=())
    assert len({artifact.threshold.n for artifact in again.artifacts if artifact.threshold}) == 1
    assert any(f"score {first.score_name}, as in the export that is there" in line for line in lines)
    # The same weights under another name have the same score, other weights have no part in it.
    renamed = replace(source, facts={**source.facts, "run": "another"})
    assert shipped_by(renamed, None, lines.append, Export(place, again)).evidence == first.score["evidence"]
    other = replace(source, facts={**source.facts, "checkpoint_sha256": "0" * 64})
    assert shipped_by(other, None, lines.append, Export(place, again)).name == "energy"


def test_a_score_of_other_images_is_made_anew(run: Path, tiny, tmp_path: Path) -> None:
    write_images(tmp_path / "more", 200)
    place, lines = tmp_path / "export", []
    source = replace(from_run(run), model=tiny)
    elsewhere = replace(source, images=Images(thresholds=whole_dataset(str(tmp_path / "more"))))
    export_source(elsewhere, place, ExportOptions(("fp32",), ("onnxruntime",), score="rmd"))
    again = export_source(source, place, ExportOptions(("fp32",), ("onnxruntime",)), lines.append)
    assert again.score_name == "rmd" and "train split" in again.detector["data"]
    assert any("of other images: it is made anew" in line for line in lines)


def test_an_export_knows_what_its_run_was_taught(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    assert from_run(run).outliers == ()
    (run / "config.json").write_text('{"backbone": "x", "data": "y", "loss": {"outliers": ["zoom", "blend"]}}')
    assert from_run(run).outliers == ("zoom", "blend")


@pytest.mark.parametrize("name", ["energy+rmd", "ssod+gen+vim"])
def test_the_sum_that_auto_ships_is_the_one_it_measured(run: Path, tiny, monkeypatch, name: str) -> None:
    """Its figures come from arrays that were added up; the graph gets the state of `sum_of`."""
    source = replace(from_run(run), model=tiny)
    data = fit_data(source, lambda line: None)
    detectors = {part: fit(part, data) for part in DETECTORS}  # type: ignore[arg-type]
    known = run_eager(tiny, pictures(60, seed=4).numpy())
    candidates = Candidates(detectors, held_out_scores(single_scores(detectors, ood_row=True), detectors, known))
    images = pictures(20, seed=6).numpy()
    state = candidates.state(name)
    assert state is not None
    logits, id_logit, features = run_eager(tiny, images)
    found = state.score(features, logits, id_logit)
    np.testing.assert_allclose(candidates.scores(logits, id_logit, features)[name], found, rtol=1e-5, atol=1e-5)


def test_auto_leaves_out_an_ood_row_that_was_not_trained(run: Path, tiny) -> None:
    model = copy.deepcopy(tiny)
    nn.init.zeros_(model.ood.weight)
    shipped = shipped_by(replace(from_run(run), model=model), "auto", lambda line: None)
    assert not {"ssod", "posterior"} & set(shipped.choice["candidates"])


def test_auto_counts_mistakes_only_where_there_are_labels(run: Path, tiny) -> None:
    """`tiny` is untrained, so that most of its classes are wrong."""
    source = replace(from_run(run), model=tiny)
    calibration = source.images.thresholds
    assert calibration is not None
    shipped = shipped_by(source, "auto", lambda line: None)
    assert 20 <= shipped.choice["mistaken"] <= 42
    nameless = copy.copy(calibration.source)
    nameless.classes = tuple(f"not {name}" for name in calibration.source.classes)  # type: ignore[misc]
    without = replace(source, images=replace(source.images, thresholds=replace(calibration, source=nameless)))
    found = shipped_by(without, "auto", lambda line: None).choice
    assert found["mistaken"] == 0 and set(found["candidates"]["energy"]["auroc"]) == set(CHOICE_KINDS)


def test_untrained_weights_ship_energy_and_no_detector(tmp_path: Path) -> None:
    source = untrained("mobilenetv3_small_050", tmp_path, 32)
    lines: list[str] = []
    assert shipped_by(source, "auto", lines.append).name == "energy" and "untrained" in lines[0]
    with pytest.raises(UsageError, match="fitted on training images"):
        shipped_by(source, "vim", lines.append)


def test_images_are_divided_so_that_none_has_two_uses(run: Path) -> None:
    whole = whole_dataset(str(run.parent / "data"))
    lines: list[str] = []
    divided = Images(thresholds=whole).divide(True, lines.append)
    parts = [set(part.indices.tolist()) for part in (divided.training, divided.choices, divided.thresholds) if part]
    assert [len(part) for part in parts] == [84, 42, 42] and len(set.union(*parts)) == 168
    assert any("not at hand" in line for line in lines)
    with pytest.raises(UsageError, match="Name some: --id DATA"):
        Images().divide(False, lines.append)
    few = Subset(whole.source, whole.indices[:40], "few")
    with pytest.raises(UsageError, match="at least 32 images to fit a detector, got 20. Name more with --id DATA"):
        Images(thresholds=few).divide(False, lines.append)
    own = replace(few, indices=whole.indices[:20])
    with pytest.raises(UsageError, match="got 20. Train on more, or ship a score without a state"):
        Images(training=own, thresholds=whole).divide(False, lines.append)


def test_multiply_adds_are_counted(tiny: SSODClassifier) -> None:
    side = (SIZE - 3) // 2 + 1
    assert multiply_adds(tiny) == side**2 * WIDTH * 27 + (len(CLASSES) + 1) * WIDTH


def layers_alone(model: SSODClassifier) -> int:
    """Multiply-adds of the convolutions and linear layers of the trunk, and of the fused head, by their shapes."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * layer.weight[0].numel()  # type: ignore[index,operator]

    for layer in model.backbone.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.features(torch.zeros(1, 3, model.preprocess.input_size, model.preprocess.input_size))
    return total + model.head_weight()[0].numel()


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "test_resnet"])
def test_multiply_adds_of_a_cnn_are_those_of_its_layers(backbone: str) -> None:
    model = make_model(backbone)
    found = multiply_adds(model)
    assert found == layers_alone(model) > 1e6


def test_multiply_adds_count_attention() -> None:
    """Queries with keys, and weights with values: twice N * N * D for N tokens in each block."""
    model = make_model("test_vit")
    blocks, tokens = model.backbone.blocks, model.backbone.patch_embed.num_patches + 1
    found = multiply_adds(model)
    assert found == layers_alone(model) + len(blocks) * 2 * tokens**2 * model.backbone.embed_dim


def test_the_command_line_knows_the_scores(run: Path, tmp_path: Path) -> None:
    wrong = CliRunner().invoke(main, ["export", str(run), "--score", "best"])
    assert wrong.exit_code == 2 and "or a sum of some such as energy+rmd, got 'best'" in wrong.output
    out = tmp_path / "export"
    done = CliRunner().invoke(
        main, ["export", str(run), "--score", "rmdpp", "--fp32", "--target", "onnx", "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert load_spec(out).score_name == "rmdpp"


def test_normalised_features_are_those_of_the_model(small_model: SSODClassifier) -> None:
    images = random_images(3, seed=2)
    with torch.no_grad():
        expected = small_model.features(normalise(images, small_model.preprocess)).numpy()
    np.testing.assert_array_equal(run_eager(small_model, images.numpy())[2], expected)


def collapsed(noise: float, seed: int = 1) -> FitData:
    """Features of a network that learned its images by heart: classes far apart, and hardly anything within."""
    rng, labels = np.random.default_rng(seed), np.arange(400) % 3
    means, weight = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
    features = (100 * means[labels] + noise * rng.normal(size=(400, WIDTH))).astype(np.float32)
    return FitData(features, labels, features @ weight.T, weight, np.zeros(3, np.float32), features[:, 0])


def test_a_detector_that_fp32_does_not_hold_is_no_candidate() -> None:
    lines: list[str] = []
    for noise, least, most in ((10, 0, 0.1), (1e-3, 10, np.inf)):
        held_out = collapsed(noise, seed=2)
        assert least < lost_to_rounding(fit("rmd", collapsed(noise)), held_out.features, held_out.logits) < most
    rounding = lambda detector: lost_to_rounding(detector, held_out.features, held_out.logits)  # noqa: E731
    fits = lambda detector: rounding(detector) <= MOST_ROUNDING  # noqa: E731
    assert "rmd" not in fit_all(collapsed(1e-3), fits, lines.append)
    assert any(line.startswith("no candidate: rmd: fp32 does not hold it") for line in lines)


@pytest.mark.slow
def test_a_transformer_ships_a_detector(tmp_path: Path) -> None:
    """Its blocks are linear layers too, and KNN's norm reads the features without one."""
    write_images(tmp_path / "data", 168)
    write_run(tmp_path / "run", make_model("test_vit"), str(tmp_path / "data"))
    result = CliRunner().invoke(main, ["export", str(tmp_path / "run"), "--fp32", "--fp16", "--score", "knn"])
    assert result.exit_code == 0, result.output
    spec = load_spec(tmp_path / "run" / "export")
    assert spec.score_name == "knn" and {artifact.precision for artifact in spec.artifacts} == {"fp32", "fp16"}
    assert all(artifact.threshold for artifact in spec.artifacts)
