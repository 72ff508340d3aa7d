"""Ten inputs of an export with what comes out, for whoever writes a client in another language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssod_edge.errors import EngineError, MissingExtraError, UsageError
from ssod_edge.files import make_directory, sha256_file, write_atomic, write_bytes, write_json
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import open_runner
from ssod_edge.runtime.runner import Array, Runner
from ssod_edge.runtime.verify import TOLERANCES, logit_scale, score_tolerance
from ssod_edge.spec import SPEC_NAME, Artifact, Spec

GOLDEN = "golden.json"
#: Images of the reference, from the most known to the least; the rest is noise, which is unknown.
FROM_REFERENCE = 8
NOISE = 2


def write_golden(folder: str | Path, out: str | Path, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Write the inputs and, of each artifact that runs here, its outputs and verdicts.

    `NN.bin` is the graph's input as bytes: uint8, channel by channel (red, green, blue), row by row. `NN.png` shows the
    same. The further inputs of an artifact are files of bytes too, little-endian. `golden.json` has the rest: shapes,
    outputs, and how far those of another client may be off.

    Args:
        folder: an export folder, or the run folder that holds it.
        out: a folder, which is made; of files of these names earlier ones are replaced.
        say: gets a line for each artifact that is left out.

    Returns:
        the artifacts that are in it.

    Raises:
        UsageError: no artifact of the export runs here.
        ArtifactError: the export is damaged.
        OutputError: the folder cannot be written.
    """
    export = Export.at(folder)
    reference, place = export.reference(), make_directory(out)
    images, found = choose(reference, export.spec), dict[str, Any]()
    for artifact in export.spec.artifacts:
        try:
            with open_runner(export.folder, artifact=artifact.name, allow_untrained=True) as runner:
                found[artifact.name] = _describe(runner, artifact, reference, images, place)
        except (EngineError, MissingExtraError) as error:
            say(f"left out {artifact.name}, which does not run here: {error}")
    if not found:
        raise UsageError(f"no artifact of '{export.folder}' runs here, so there are no golden outputs")
    names = [f"{number:02d}" for number in range(len(images))]
    inputs = [
        write_input(place, name, image.tobytes(), image.transpose(1, 2, 0))
        for name, image in zip(names, images, strict=True)
    ]
    write_json(place / GOLDEN, _document(export, inputs, found))
    return list(found)


def write_input(place: Path, name: str, data: bytes, shown: Array) -> dict[str, str]:
    """Write `NAME.bin` with these bytes and `NAME.png` with these pixels, uint8 [H, W, 3], RGB; what tells of them."""
    write_bytes(place / f"{name}.bin", data)
    write_atomic(place / f"{name}.png", Image.fromarray(np.ascontiguousarray(shown)).save)
    return {"file": f"{name}.bin", "sha256": sha256_file(place / f"{name}.bin"), "picture": f"{name}.png"}


def choose(reference: dict[str, Array], spec: Spec) -> Array:
    """uint8 [10, 3, S, S]: reference images, evenly spread from the most known to the least, and noise."""
    order = np.argsort(reference[f"score_{spec.score_name}"], kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(FROM_REFERENCE, len(order))).round().astype(int)]
    size = spec.preprocess.input_size
    noise = np.random.default_rng(0).integers(0, 256, (NOISE, 3, size, size), np.uint8)
    return np.concatenate([reference["image"][chosen], noise])


def _describe(
    runner: Runner, artifact: Artifact, reference: dict[str, Array], images: Array, place: Path
) -> dict[str, Any]:
    parts = [runner.infer({"image": image[None]}) for image in images]
    beside = {}
    for name, value in (runner.verdict_inputs() if artifact.threshold else {}).items():  # else their defaults will do
        file = f"{artifact.name}-{name}.bin"
        write_bytes(place / file, value.astype(value.dtype.newbyteorder("<")).tobytes())
        beside[name] = {"dtype": str(value.dtype), "shape": list(value.shape), "file": file}
    return {
        "engine": artifact.engine,
        "precision": runner.precision,
        "file": artifact.main_file,
        "sha256": artifact.files[artifact.main_file],
        "threshold": None if artifact.threshold is None else artifact.threshold.value,
        "inputs_beside": beside,
        **expected(runner.spec, artifact, reference, parts),
    }


def expected(
    spec: Spec, artifact: Artifact, reference: dict[str, Array], parts: Sequence[Mapping[str, Array]]
) -> dict[str, Any]:
    """The outputs of an artifact, N = 1 each, and how far those of another client may be off."""
    share, scale = TOLERANCES[artifact.precision].logit, logit_scale(reference)
    score = score_tolerance(spec.score_name, reference[f"score_{spec.score_name}"], share, scale)
    return {
        "tolerance": {"logits": share * scale, "ood_score": score},
        "outputs": [
            {
                **{name: value[0].tolist() for name, value in outputs.items() if name in spec.outputs},
                "class": spec.classes[int(outputs["logits"][0].argmax())],
            }
            for outputs in parts
        ],
    }


def _document(export: Export, inputs: list[dict[str, str]], artifacts: dict[str, Any]) -> dict[str, Any]:
    spec = export.spec
    size = spec.preprocess.input_size
    return {
        "about": "Give each input to an artifact of this export, with its inputs_beside: the outputs are these, within "
        "the tolerance. An image is known if its ood_score is at most the threshold.",
        "spec_sha256": sha256_file(export.folder / SPEC_NAME),
        "classes": list(spec.classes),
        "input": {"name": "image", "dtype": "uint8", "shape": [1, 3, size, size], "channels": "RGB"},
        "inputs": inputs,
        "artifacts": artifacts,
    }
