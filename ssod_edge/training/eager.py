"""The checkpoint itself, run by PyTorch: what every artifact is compared with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ssod_edge.config import DEFAULT_SCORE
from ssod_edge.detect.confidence import p_known, verdict_inputs
from ssod_edge.detect.metrics import conformal_threshold
from ssod_edge.detect.scores import ood_scores, probabilities
from ssod_edge.errors import ArtifactError, EngineError, UsageError
from ssod_edge.machine import engine_threads
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.runner import Array, Runner, check_images, check_process, closed_error
from ssod_edge.spec import SPEC_NAME, Artifact, Spec, Threshold
from ssod_edge.training.model import SSODClassifier, normalise
from ssod_edge.training.run import Run


class EagerRunner(Runner):
    """`ssod_edge.runtime.Runner` on a run's best checkpoint, in fp32 on the CPU.

    With an export beside it, the checkpoint must be the exported one; the score is the export's, with the state of its
    detector if it has one, and the threshold is that of an fp32 artifact, whose scores were verified to be these, or,
    where there is none, fitted to the eager scores in `reference.npz`. Without an export the score is the default and
    there is no threshold.

    Args:
        folder: a run folder, its export folder, or a checkpoint file.
        threads: of PyTorch, for the whole process; None leaves them as they are.
        allow_untrained: open weights that were not trained.

    Raises:
        ArtifactError: the checkpoint is damaged, or is not the one that was exported.
        EngineError: another device than the CPU.
        UsageError: no checkpoint there, or untrained weights that were not asked for.
    """

    engine = "eager"
    precision = "fp32"
    device = "CPU"

    def __init__(
        self, folder: Path, device: str = "auto", threads: int | None = None, allow_untrained: bool = False
    ) -> None:
        if device not in ("auto", "CPU"):
            raise EngineError(f"the eager engine runs on 'CPU' here, got device '{device}'")
        self._opened_in = os.getpid()
        run = Run.at(folder)
        model, checkpoint, digest = run.model, run.checkpoint, run.checkpoint_sha256
        export = Export.at(run.folder / "export") if (run.folder / "export" / SPEC_NAME).is_file() else None
        self.spec = _spec(model, run.meta.get("trained") is True) if export is None else export.spec
        if not self.spec.trained and not allow_untrained:
            raise UsageError(f"'{checkpoint}' holds untrained weights. Train a model, or pass --allow-untrained.")
        if len(self.spec.classes) != len(model.classes):
            raise ArtifactError(
                f"{SPEC_NAME} names {len(self.spec.classes)} classes, and '{checkpoint}' has {len(model.classes)}. "
                "Export the run again."
            )
        if export is not None and self.spec.source.get("checkpoint_sha256", digest) != digest:
            raise ArtifactError(f"'{checkpoint}' is not the checkpoint of this export. Export the run again.")
        self.artifact = Artifact(
            name="eager-fp32",
            engine=self.engine,
            precision=self.precision,
            files={checkpoint.name: digest},
            opset=0,
            versions={"torch": torch.__version__},
            threshold=None if export is None else _threshold(export),
        )
        self._detector = None if export is None else export.score_state(model.classifier.in_features)
        self._threads_before = torch.get_num_threads()  # a setting of the whole process: given back at the end
        if (limit := engine_threads(threads)) is not None:
            torch.set_num_threads(limit)
        self.details = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        self._model: SSODClassifier | None = model

    def __exit__(self, *_: object) -> None:
        self._model = None
        torch.set_num_threads(self._threads_before)

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch; see `ssod_edge.runtime.Runner.infer`."""
        check_process(self._opened_in)
        model = self._model  # another thread may close it meanwhile
        if model is None:
            raise closed_error()
        images = check_images(inputs, self.spec.preprocess.input_size)
        with torch.inference_mode():
            features = model.features(normalise(torch.from_numpy(images), model.preprocess))
            logits, id_logit = (output.float().numpy() for output in model.head(features))
        if self._detector is not None:
            score = self._detector.score(features.float().numpy(), logits, id_logit)
        else:
            score = ood_scores(logits, id_logit)[self.spec.score_name]  # type: ignore[index]
        inputs, score = verdict_inputs(self.artifact.threshold), np.asarray(score, np.float32)
        outputs = {
            "logits": logits,
            "probs": probabilities(logits / self.spec.temperature),
            "id_logit": id_logit,
            "ood_score": score,
            "p_known": p_known(score, inputs),
            "known": score <= inputs["threshold"],
            "features_pooled": features.float().numpy(),
        }
        return {name: outputs[name] for name in self.spec.outputs}


def _spec(model: SSODClassifier, trained: bool) -> Spec:
    return Spec(
        backbone=model.backbone_name,
        classes=model.classes,
        preprocess=model.preprocess,
        score={"name": DEFAULT_SCORE, "evidence": "default"},
        trained=trained,
        reference_sha256="",
    )


def _threshold(export: Export) -> Threshold | None:
    """That of the artifact that computes what PyTorch does: it comes from all calibration images. Without one, of
    another, where the model was trained on the images of the reference.
    """
    spec = export.spec
    found = {a.precision: a.threshold for a in spec.artifacts if a.threshold is not None}
    if not spec.trained or not found:
        return None
    if "fp32" in found or spec.source.get("pooled"):
        return found.get("fp32", next(iter(found.values())))
    target = next(iter(found.values())).target_tpr
    scores = np.asarray(export.reference()[f"score_{spec.score_name}"])
    return conformal_threshold(scores, target, "eager scores of reference.npz")
