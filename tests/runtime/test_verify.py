"""Artifacts against their reference: what passes, and every way to fail."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from colour import BIAS, WEIGHT, colour_images, colour_outputs, edit_graph, edit_spec, write_reference

import ssod_edge.runtime.verify
from ssod_edge.errors import ArtifactError, VerificationError
from ssod_edge.runtime.open import Runner, open_runner
from ssod_edge.runtime.verify import TOLERANCES, Verification, check_passed, load_reference, record, verify_runner
from ssod_edge.spec import Spec, load_spec

MakeExport = Callable[..., Path]
ARTIFACTS = ("onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16")


def verify(folder: Path, artifact: str = "onnx-fp32", threshold: float | None = None) -> Verification:
    with open_runner(folder, artifact=artifact, verify=False, allow_untrained=True) as runner:
        return verify_runner(runner, folder, threshold)


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_a_faithful_artifact_passes_with_its_figures(export: Path, artifact: str) -> None:
    figures = verify(export, artifact)
    assert figures.passed and figures.failures == ()
    assert (figures.n, figures.decision_flips, figures.decision_flip_share) == (40, 0, 0.0)
    assert figures.class_agreement == 1.0
    # On 64-bit Arm ONNX Runtime computes fp16 in fp16; on x86-64 it widens it.
    halves = 0.1 if platform.machine() == "aarch64" else 1e-2
    largest = 1e-4 if artifact.endswith("fp32") else halves
    assert 0 <= figures.mean_abs_logit_diff <= figures.max_abs_logit_diff < largest
    assert figures.relative_logit_error < TOLERANCES[artifact[-4:]].noise
    logits, id_logit = colour_outputs(load_reference(export, load_spec(export))["image"])
    scale = 1 + max(np.abs(logits).max(), np.abs(id_logit).max())
    assert figures.logit_tolerance == pytest.approx(TOLERANCES[artifact[-4:]].logit * scale)
    assert json.loads(json.dumps(figures.to_dict(), allow_nan=False)) == figures.to_dict()


def test_figures_are_those_of_the_drift(export: Path) -> None:
    edit_graph(export, "onnx-fp32", bias=BIAS + np.array([0.5, 0, 0, 0], np.float32))
    figures = verify(export)
    assert figures.max_abs_logit_diff == pytest.approx(0.5, abs=1e-4)
    assert figures.mean_abs_logit_diff == pytest.approx(0.5 / 3, abs=1e-4)
    assert figures.max_abs_id_logit_diff < 1e-4
    logits, id_logit = colour_outputs(load_reference(export, load_spec(export))["image"])
    squares = np.square(logits).sum() + np.square(id_logit).sum()
    assert figures.relative_logit_error == pytest.approx(0.5 * np.sqrt(40 / squares), rel=1e-3)
    assert not figures.passed
    assert "max_abs_logit_diff is 0.5" in figures.failures[0]


def test_the_bound_depends_on_the_precision(export: Path) -> None:
    """A drift between the two bounds: too much for fp32, not for fp16."""
    shift = np.array([0.04] * 4, np.float32)
    for artifact, passes in (("onnx-fp32", False), ("onnx-fp16", True)):
        edit_graph(export, artifact, bias=BIAS + shift)
        assert verify(export, artifact).passed is passes


def test_the_id_logit_is_checked(export: Path) -> None:
    edit_graph(export, "onnx-fp32", bias=BIAS + np.array([0, 0, 0, 0.5], np.float32))
    figures = verify(export)
    assert figures.max_abs_logit_diff < 1e-4
    assert [reason.split()[0] for reason in figures.failures] == ["max_abs_id_logit_diff", "relative_logit_error"]


class Altered:
    """An open runner whose outputs pass through `alter`: graphs that would do it are tedious to draw."""

    def __init__(self, runner: Runner, **alter: Callable[[np.ndarray], np.ndarray]) -> None:
        self.runner, self.alter = runner, alter
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(len(inputs["image"]))
        outputs = self.runner.infer(inputs)
        return {name: self.alter[name](value) if name in self.alter else value for name, value in outputs.items()}


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        ({"ood_score": lambda score: -score}, "max_abs_score_diff"),
        ({"probs": lambda probs: np.clip(probs, 0.05, 0.95)}, "max_abs_prob_diff"),
        ({"logits": lambda logits: logits[:, ::-1].copy()}, "share of changed classes"),
        ({"ood_score": lambda score: score + 0.001}, None),
    ],
)
def test_each_output_is_checked(export: Path, alter: dict, reason: str | None) -> None:
    with open_runner(export, artifact="onnx-fp32") as runner:
        figures = verify_runner(Altered(runner, **alter), export)
    assert figures.passed is (reason is None)
    assert reason is None or any(text.startswith(reason) for text in figures.failures)


@pytest.mark.parametrize("name", ["logits", "probs", "id_logit", "ood_score"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("trained", [True, False])
def test_one_number_that_is_not_finite_fails(
    make_export: MakeExport, tmp_path: Path, name: str, value: float, trained: bool
) -> None:
    folder = make_export(tmp_path, trained=trained)

    def spoil(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.flat[-1] = value
        return values

    with open_runner(folder, artifact="onnx-fp32", allow_untrained=True) as runner:
        figures = verify_runner(Altered(runner, **{name: spoil}), folder)
    assert not figures.passed
    json.dumps(figures.to_dict(), allow_nan=False)
    with pytest.raises(VerificationError):
        check_passed(runner.artifact, figures)


def test_nan_weights_fail_in_a_real_graph(export: Path) -> None:
    edit_graph(export, "onnx-fp32", weight=np.full_like(WEIGHT, np.nan))
    figures = verify(export)
    assert not figures.passed and figures.to_dict()["max_abs_logit_diff"] is None


def test_flips_are_counted_at_the_threshold_and_one_is_allowed(export: Path) -> None:
    with np.load(export / "reference.npz") as reference:
        scores = np.sort(reference["score_energy"])
    with open_runner(export, artifact="onnx-fp32") as runner:
        raised = Altered(runner, ood_score=lambda score: score + 1e-3)
        for crossing, passes in ((1, True), (3, False)):
            # scores[9 - crossing + 1 .. 9] + 0.001 lie above the threshold, and below it without
            threshold = float(scores[9])
            gap = scores[9] - scores[10 - crossing : 10]
            raised.alter["ood_score"] = lambda score, gap=gap: score + gap.max() + 1e-5
            figures = verify_runner(raised, export, threshold)
            assert figures.decision_flips == crossing
            assert figures.decision_flip_share == crossing / 40
            assert any(reason.startswith("decision_flips") for reason in figures.failures) is not passes


def test_the_artifacts_own_threshold_is_the_default(export: Path) -> None:
    def far(spec):
        artifact = spec.artifact("onnx-fp32")
        return spec.with_artifact(replace(artifact, threshold=replace(artifact.threshold, value=1e9)))

    with open_runner(export, artifact="onnx-fp32") as runner:
        lowered = Altered(runner, ood_score=lambda score: score - 1e3)
        assert verify_runner(lowered, export, threshold=-500.0).decision_flips == 40
        edit_spec(export, far)
    with open_runner(export, artifact="onnx-fp32") as runner:
        lowered = Altered(runner, ood_score=lambda score: score - 1e3)
        assert verify_runner(lowered, export).decision_flips == 0


def test_untrained_weights_are_checked_on_logits_alone(make_export: MakeExport, tmp_path: Path) -> None:
    folder = make_export(tmp_path, trained=False)
    with open_runner(folder, artifact="onnx-fp32", allow_untrained=True) as runner:
        figures = verify_runner(Altered(runner, ood_score=lambda score: -score), folder, threshold=0.0)
    assert figures.passed and figures.decision_flips is None and figures.decision_flip_share is None
    edit_graph(folder, "onnx-fp32", bias=BIAS + 1)
    assert not verify(folder).passed


@pytest.mark.parametrize(
    ("artifact", "factor", "passes"),
    [
        ("onnx-fp32", 1.0, True),
        ("onnx-fp32", 0.0, False),
        ("onnx-fp32", -1.0, False),
        ("onnx-fp16", 0.0, True),  # there they may be smaller than the rounding
    ],
)
def test_untrained_logits_are_near_0_and_have_to_be_right_all_the_same(
    make_export: MakeExport, tmp_path: Path, artifact: str, factor: float, passes: bool
) -> None:
    """A fresh classifier's weights are small: no difference of its logits is large."""
    folder, tiny = make_export(tmp_path, trained=False), 1e-5
    with np.load(folder / "reference.npz") as file:
        arrays = {name: value * np.float32(tiny) if "logit" in name else value for name, value in file.items()}
    np.savez(folder / "reference.npz", **arrays)
    edit_spec(folder, lambda spec: spec, rehash=True)
    smaller = {name: lambda values: values * np.float32(tiny * factor) for name in ("logits", "id_logit")}
    with open_runner(folder, artifact=artifact, allow_untrained=True, verify=False) as runner:
        even = Altered(runner, probs=lambda probs: np.full_like(probs, 1 / 3), **smaller)
        figures = verify_runner(even, folder)
    assert figures.max_abs_logit_diff < 1e-3
    assert [reason.split()[0] for reason in figures.failures] == ([] if passes else ["relative_logit_error"])


def test_both_one_image_and_batches_are_run(export: Path) -> None:
    with open_runner(export, artifact="onnx-fp32") as runner:
        altered = Altered(runner)
        verify_runner(altered, export)
    assert altered.batches == [1, 8, 8, 8, 8, 7]


def test_one_reference_image_is_enough(export: Path) -> None:
    write_reference(export, colour_images(1))
    edit_spec(export, lambda spec: spec, rehash=True)
    figures = verify(export)
    assert figures.passed and figures.n == 1


def test_a_changed_reference_is_refused(export: Path) -> None:
    with open_runner(export, artifact="onnx-fp32") as runner:
        write_reference(export, colour_images(40, seed=9))
        with pytest.raises(ArtifactError, match=r"reference\.npz"):
            verify_runner(runner, export)


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        b"",
        {"image": colour_images(2)},
        {"image": colour_images(1)[:0], "logits": np.ones((0, 3)), "id_logit": np.ones(0), "score_energy": np.ones(0)},
        {"image": colour_images(2), "logits": np.zeros((2, 7)), "id_logit": np.zeros(2), "score_energy": np.zeros(2)},
        {"image": np.array([None, {}]), "logits": 0, "id_logit": 0, "score_energy": 0},
    ],
    ids=["no archive", "empty", "arrays missing", "no images", "other classes", "pickled objects"],
)  # fmt: skip
def test_a_reference_of_another_kind_is_refused(export: Path, content: bytes | dict) -> None:
    path = export / "reference.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    edit_spec(export, lambda spec: spec, rehash=True)
    with pytest.raises(ArtifactError, match=r"reference\.npz"):
        verify(export)


def test_check_passed_gives_the_figures(export: Path) -> None:
    edit_graph(export, "onnx-fp32", bias=BIAS + 1)
    with pytest.raises(VerificationError, match=r"'onnx-fp32'.*40 reference images.*max_abs_logit_diff is 1") as error:
        check_passed(load_spec(export).artifact("onnx-fp32"), verify(export))
    assert error.value.exit_code == 4


def test_record_keeps_what_others_wrote_meanwhile(export: Path) -> None:
    mine = replace(load_spec(export).artifact("onnx-fp32"), verification={"passed": True, "n": 1})
    theirs = replace(load_spec(export).artifact("onnx-fp16"), verification={"passed": True, "n": 2})
    record(export, theirs)
    record(export, mine)
    spec = load_spec(export)
    assert (spec.artifact("onnx-fp32"), spec.artifact("onnx-fp16")) == (mine, theirs)
    assert [a.name for a in spec.artifacts] == ["onnx-fp32", "openvino-fp32", "onnx-fp16", "openvino-fp16"]


def test_two_that_record_at_once_keep_both(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ssod_edge.runtime.verify.load_spec

    def slow(folder: Path) -> Spec:
        spec = read(folder)
        time.sleep(0.1)  # the other one has read by now, if nothing keeps it from it
        return spec

    monkeypatch.setattr(ssod_edge.runtime.verify, "load_spec", slow)
    changed = [
        replace(load_spec(export).artifact(name), verification={"passed": True, "n": n})
        for n, name in enumerate(("onnx-fp32", "onnx-fp16"))
    ]
    threads = [threading.Thread(target=record, args=(export, artifact)) for artifact in changed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [load_spec(export).artifact(artifact.name) for artifact in changed] == changed
