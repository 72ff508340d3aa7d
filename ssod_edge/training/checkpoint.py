"""Checkpoints: tensors in safetensors, everything else as JSON metadata, written by one rename.

A run folder holds `config.json`, `splits.json`, `metrics.jsonl`, `last.safetensors` (to resume from) and
`best.safetensors` (the model that evaluation and export read). Loading never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from ssod_edge.errors import ArtifactError, UsageError
from ssod_edge.files import write_atomic
from ssod_edge.json_reader import parse_json
from ssod_edge.training.model import SSODClassifier

#: 2: the metadata has a hash of its own.
SCHEMA_VERSION = 2
#: Of tensors that are `ssod_edge.detect.folds.Folds`.
FOLDS = "folds."
BEST, LAST = "best.safetensors", "last.safetensors"
#: Of tensors that are the running average of a model's, in `LAST`.
AVERAGE = "average."


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON metadata atomically.

    Raises:
        OutputError: read-only folder or full disk; the previous checkpoint is unchanged.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"schema_version": SCHEMA_VERSION, "tensors_sha256": tensors_hash(contiguous), **meta}
    text = json.dumps(meta)
    data = save(contiguous, metadata={"ssod_edge": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote: (tensors, metadata).

    Metadata that is asked for and not there is an ArtifactError too.

    Raises:
        UsageError: there is no such file.
        ArtifactError: cut short, not a checkpoint of ssod-edge, or of a newer schema.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint '{path}' does not exist. Train one with: ssod-edge train DATA")
    try:
        # In one piece: safetensors opens a path twice, and training may put a newer file there in between.
        content = path.read_bytes()
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text, recorded = header["__metadata__"]["ssod_edge"], header["__metadata__"].get("sha256")
        meta = parse_json(text)
        tensors = load(content)
    except KeyError:
        raise ArtifactError(f"'{path}' was not written by ssod-edge") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"checkpoint '{path}' is damaged or cut short ({error})") from error
    version = meta.get("schema_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"checkpoint '{path}' is damaged: its metadata has no schema version")
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"checkpoint '{path}' has schema version {version}; this release reads up to {SCHEMA_VERSION}. "
            "Install a newer one (docs/install.md)"
        )
    hashes = {
        "metadata's": version < 2 or hashlib.sha256(text.encode()).hexdigest() == recorded,
        "tensors'": tensors_hash(tensors) == meta.get("tensors_sha256"),
    }
    if changed := [whose for whose, matches in hashes.items() if not matches]:
        raise ArtifactError(
            f"checkpoint '{path}' was changed after it was written: its {changed[0]} hash does not match"
        )
    return tensors, _Metadata(path, meta)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file says that `save_checkpoint` wrote it; it may still be damaged."""
    try:
        with safe_open(path, "pt") as file:
            return "ssod_edge" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


class _Metadata(dict):
    """A checkpoint's metadata, which names the file where something is missing."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(f"checkpoint '{self.path}' is damaged: its metadata has no '{key}'")


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of contiguous tensors, hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def trunk_hash(model: SSODClassifier) -> str:
    """SHA-256 of what computes the features, hex: the backbone without its classifier, and a branch if there is one."""
    classifier = f"{model.backbone.default_cfg['classifier']}."
    state = {name: value for name, value in model.backbone.state_dict().items() if not name.startswith(classifier)}
    if model.branch is not None:
        state |= {f"branch.{name}": value for name, value in model.branch.state_dict().items()}
    return tensors_hash({name: value.cpu().contiguous() for name, value in state.items()})


def model_meta(model: SSODClassifier) -> dict[str, Any]:
    """What `ssod_edge.training.run.Run` needs to build the model again."""
    return {
        "backbone": model.backbone_name,
        "classes": list(model.classes),
        "preprocess": asdict(model.preprocess),
        "head": model.head_kind,
        **({} if model.branch is None else {"branch": asdict(model.branch.shape)}),
    }


def load_state(model: SSODClassifier, tensors: dict[str, Tensor], path: Path, prefix: str = "model.") -> None:
    """Copy the tensors named "model.*" into a model; raises ArtifactError if they are of another one."""
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"'{path}' holds another model than {model.backbone_name}: {str(error)[:300]}") from error


def model_tensors(model: SSODClassifier, prefix: str = "model.") -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat tensors, "optimizer.<index>.<name>"."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(value) for i, s in state.items() for name, value in s.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors named "optimizer.*" back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
