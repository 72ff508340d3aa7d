"""What a new run takes over from a trained run or a taught export (`train --from`): settings, trunk and class rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssod_edge.config import resolve_backbone
from ssod_edge.data.layout import same_name
from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import real_path, sha256_file, unicode_path
from ssod_edge.json_reader import read_json
from ssod_edge.optional import load
from ssod_edge.runtime.export import Export
from ssod_edge.spec import SPEC_NAME, TRUNK_SHA256
from ssod_edge.training.checkpoint import BEST, is_checkpoint
from ssod_edge.training.model import SSODClassifier
from ssod_edge.training.run import Run


@dataclass(frozen=True)
class Begun:
    """Where a new run begins.

    Attributes:
        path: of the run or export, as it was given.
        run: that its trunk is of.
        taught: the export, if it was taught: its classes and rows are not the run's.
    """

    path: str
    run: Run
    taught: Export | None = None

    @classmethod
    def at(cls, path: str, runs: str | Path = "runs") -> Begun:
        """The run or export that is meant by a path.

        An ONNX graph does not hold the trunk as training needs it, because batch norms are part of its convolutions. So
        the trunk comes from the run, which is found by the hash of its checkpoint.

        Args:
            path: a run folder, an export folder, or a checkpoint file.
            runs: folder of runs.

        Raises:
            UsageError: it is none of these, its weights are random, or the run of an export is not there.
            ArtifactError: a file is damaged.
        """
        place = Path(path)
        if (place / SPEC_NAME).is_file():
            begun = cls._of_export(path, Export.at(place), Path(runs))
        else:
            begun = cls(path, Run.at(place))
            if not is_checkpoint(begun.run.checkpoint):
                raise UsageError(f"--from takes the folder of a run or of an export, and '{path}' is neither")
        if begun.run.meta.get("trained") is not True:
            raise UsageError(f"the weights of '{path}' are random: there is nothing to begin from. Leave --from out")
        return begun

    @classmethod
    def _of_export(cls, path: str, export: Export, runs: Path) -> Begun:
        source, taught = export.spec.source, "taught" in export.spec.source
        digest, name = source.get(TRUNK_SHA256 if taught else "checkpoint_sha256"), str(source.get("run", ""))
        around = real_path(export.folder).parent
        for checkpoint in _checkpoints((around, around.parent, runs), name):
            if digest and sha256_file(checkpoint) == digest:
                return cls(path, Run.at(checkpoint), export if taught else None)
        raise UsageError(
            f"'{path}' holds no trunk that training can go on with, and the run '{name}' that it came from lies "
            f"neither beside it nor in '{runs}'. Name the folder of that run with -o, or begin from the run: --from RUN"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes."""
        return self.run.model.classes if self.taught is None else self.taught.spec.classes

    @property
    def sha256(self) -> str:
        """Of the checkpoint, or what a taught export's `ssod.json` says of itself; hex."""
        if self.taught is None:
            return self.run.checkpoint_sha256
        return str(read_json(self.taught.folder / SPEC_NAME).get("sha256"))

    def options(self, options: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        """The settings of a new run: its own, and what is given beside it.

        Args:
            options: of `ssod_edge.recipes.train_config`; what is None is not given.
            asked: fields of `Preprocess` that are given; None: not.

        Raises:
            UsageError: what is given contradicts it.
        """
        model = self.run.model
        if options.get("weights") is not None:
            raise UsageError("--from and --weights both say what training starts from: give one of them")
        backbone = options.get("backbone")
        given = {"--backbone": backbone and resolve_backbone(backbone), "--head": options.get("head")}
        given |= {"--" + name.replace("input_", ""): value for name, value in asked.items()}
        own = {"--backbone": model.backbone_name, "--head": model.head_kind}
        own |= {"--" + name.replace("input_", ""): getattr(model.preprocess, name) for name in asked}
        for name, value in given.items():
            if value is not None and value != own[name]:
                raise UsageError(
                    f"{name} {_shown(value)} contradicts '{self.path}', which has {_shown(own[name])}: leave {name} "
                    "out, or --from"
                )
        return {
            **options,
            "backbone": model.backbone_name,
            "head": model.head_kind,
            "preprocess": model.preprocess,
            "weights": str(self.run.checkpoint),
            "begun_from": self.path,
            "begun_sha256": self.sha256,
        }

    def rows(self) -> tuple[Tensor, Tensor]:
        """The last layer's rows of its classes, float32 [M, Dall] and [M].

        Raises:
            MissingExtraError: onnx is not installed, which a taught export is read with.
            ArtifactError: its fp32 graph is damaged.
        """
        if self.taught is not None:
            return _rows_of(self.taught)
        weight, bias = self.run.model.head_weight()
        return weight[:-1].detach(), bias[:-1].detach()

    def give_rows(self, model: SSODClassifier) -> str:
        """Put the rows of the classes that both have into a model; its other rows are new.

        What a branch made is not begun with: the rows do without its columns, which stand first.

        Returns:
            a line on which classes are new and which are gone.
        """
        places = {same_name(name): place for place, name in enumerate(self.classes)}
        kept = [(row, places[same_name(name)]) for row, name in enumerate(model.classes) if same_name(name) in places]
        classifier = model.classifier
        weight, bias = self.rows()
        weight = weight[:, -classifier.in_features :]
        with torch.no_grad():
            nn.init.normal_(classifier.weight, std=0.01)
            if classifier.bias is not None:
                nn.init.zeros_(classifier.bias)
            for row, place in kept:
                classifier.weight[row] = weight[place]
                if classifier.bias is not None:
                    classifier.bias[row] = bias[place]
        here = {same_name(name) for name in model.classes}
        new = [name for name in model.classes if same_name(name) not in places]
        gone = [name for name in self.classes if same_name(name) not in here]
        said = [f"new: {', '.join(new)}"] * bool(new) + [f"gone: {', '.join(gone)}"] * bool(gone)
        return f"from '{self.path}': {len(kept)} of its {len(places)} classes; {'; '.join(said) or 'none is new'}"


def _checkpoints(roots: tuple[Path, ...], name: str) -> Iterator[Path]:
    """Where the checkpoint of a run of this name may lie; a run may have been renamed."""
    for folder in (roots[0], *(root / name for root in roots if name)):
        if (folder / BEST).is_file():
            yield folder / BEST
    for root in roots[1:]:
        yield from sorted(root.glob(f"*/{BEST}"))


def _rows_of(export: Export) -> tuple[Tensor, Tensor]:
    """Rows of the classes of an export, from the last Gemm of its fp32 graph."""
    onnx = load("onnx", "reading a taught export", "teach")
    graphs = [a for a in export.spec.artifacts if (a.engine, a.precision) == ("onnxruntime", "fp32")]
    if not graphs:
        raise ArtifactError(f"'{export.folder}' holds no ONNX graph in fp32. Teach it again")
    with unicode_path(export.check(graphs[0])) as name:
        graph = onnx.load(name).graph
    producer = {output: node for node in graph.node for output in node.output}
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    node = producer["logits"]
    while node.op_type != "Gemm":  # the classes are the first part of what it gives
        node = producer[node.input[0]]
    weight, bias = (np.array(onnx.numpy_helper.to_array(arrays[name]), np.float32) for name in node.input[1:])
    count = len(export.spec.classes)
    return torch.from_numpy(weight[:count]), torch.from_numpy(bias[:count])


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
