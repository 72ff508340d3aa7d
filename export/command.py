"""The `export` and `package` commands: choose what is exported, say what happens, and show what came out.

PyTorch is imported where a model is exported from a run, and nowhere else: a device has none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from ssod_edge.config import Fit
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED, UsageError
from ssod_edge.export.bundle import write_bundle
from ssod_edge.export.deploy import deploy
from ssod_edge.export.engines.artifact import CPU_TARGETS, DEFAULT_PRECISIONS, TARGETS, check_engines
from ssod_edge.export.engines.tensorrt import PlanOptions, parse_batch, runs_here
from ssod_edge.export.release import Targets
from ssod_edge.export.staging import check_place
from ssod_edge.optional import require
from ssod_edge.runtime.open import ENGINES, PLAN_ENGINES, is_installed
from ssod_edge.spec import Artifact, Spec
from ssod_edge.terminal import Screen, printable, printable_lines

if TYPE_CHECKING:
    from ssod_edge.export.graph.source import Source

UNTRAINED_WARNING = (
    "WARNING: there is no trained run of '{backbone}' under '{runs}': exporting UNTRAINED weights. They show how fast "
    "the backbone runs; their classes and verdicts mean nothing, and predict refuses them without --allow-untrained."
)
NO_IMAGES_NOTE = (
    "note: without images there is no threshold, so nothing can be told known from unknown. "
    "Add --id DATA, or fit one later with: ssod-edge calibrate"
)


@dataclass(frozen=True)
class SourceOptions:
    """Which model to export.

    Attributes:
        run: a run folder or checkpoint; None takes the newest run of `backbone`, or its untrained weights.
        runs: folder of runs.
        backbone: an alias or a timm name.
        weights, pretrained: export these instead of a run; see `ssod_edge.export.graph.source.from_weights`.
        data: in-distribution images for the thresholds; None takes the run's calibration split.
        classes: file of class names for `weights` and `pretrained`.
        size, fit, roi: see `ssod_edge.config.Preprocess`, of weights that were not trained here.
    """

    run: str | None = None
    runs: str = "runs"
    backbone: str | None = None
    weights: str | None = None
    pretrained: bool = False
    data: str | None = None
    classes: str | None = None
    size: int | None = None
    fit: Fit | None = None
    roi: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class TargetOptions:
    """What to make of it.

    Attributes:
        out: the export folder; None is `export` inside the run folder, or a bundle's name without `.tar`, here.
        precisions: of "fp32", "fp16" and "int8"; none given makes the first two, or all that a bundle holds.
        target: see `engines_for`.
        tpr: share of in-distribution images that must stay known, in (0, 1).
        batch: "MIN,OPT,MAX" of TensorRT's plans.
        version_compatible: see `ssod_edge.export.engines.tensorrt.PlanOptions`.
        golden: a folder for what `ssod_edge.runtime.golden` writes.
        frame: a folder for what `ssod_edge.export.frame` writes.
        triton: a folder for what `ssod_edge.export.triton` writes.
        channels: the order of a frame's colours in both.
    """

    out: str | None = None
    precisions: tuple[str, ...] = ()
    target: str = "all"
    tpr: float = 0.95
    batch: str = "1,1,8"
    version_compatible: bool = False
    golden: str | None = None
    frame: str | None = None
    triton: str | None = None
    channels: Literal["RGB", "BGR", "NV12"] = "RGB"

    def targets(self) -> Targets:
        """The engines that are meant, and how plans are built.

        Raises:
            UsageError: `batch` is not as in `parse_batch`; or it, version-compatible plans or frames in NV12 are asked
                for and nothing is made that could have them.
        """
        engines, plans = engines_for(self.target), PlanOptions(parse_batch(self.batch), self.version_compatible)
        if plans.batch != PlanOptions().batch and not set(engines) & set(PLAN_ENGINES):
            raise UsageError(
                f"--batch is for TensorRT's plans, and this makes: {', '.join(engines)}. These take any number of "
                "images"
            )
        if self.version_compatible and "tensorrt" not in engines:
            raise UsageError(
                f"--version-compatible is for the plans of --target tensorrt, and this makes: {', '.join(engines)}"
            )
        if self.channels == "NV12" and (self.triton is not None or "openvino" not in engines):
            raise UsageError(
                "--channels NV12: only OpenVINO takes it, with --frame; ONNX Runtime and Triton take RGB or BGR"
            )
        return Targets(self.precisions, engines, self.tpr, plans)


def run_export(
    source: SourceOptions,
    target: TargetOptions,
    score: str | None = None,
    calib: str | None = None,
    max_drop: float = 1.0,
    features: Sequence[str] = (),
    stored: bool = True,
) -> int:
    """Export, and print a table of the artifacts; returns the exit code: 1 if calibration images were left out.

    Args:
        score, max_drop, features, stored: see `ExportOptions`.
        calib: in-distribution images to quantise with; None takes those of the thresholds.
    """
    asked = target.targets()
    if target.out is not None:
        check_place(Path(target.out))
    precisions = asked.precisions or DEFAULT_PRECISIONS
    engines = (ENGINES[engine] for engine in asked.engines if engine in CPU_TARGETS)
    require(["torch", "onnx", "onnxscript", *engines, *(["nncf"] if "int8" in precisions else [])], "export")
    from ssod_edge.data.images import whole_dataset
    from ssod_edge.export.graph.build import ExportOptions, export_source

    started = time.monotonic()
    chosen = tuple(dict.fromkeys(features))
    options = ExportOptions(precisions, asked.engines, asked.target_tpr, asked.plans, score, max_drop, chosen, stored)
    if calib is not None and "int8" not in precisions:
        raise UsageError("--calib names images to quantise with; it needs --int8")
    check_engines(options.engines)
    model = choose_source(source)
    if calib is not None:
        model = replace(model, images=replace(model.images, int8=whole_dataset(calib)))
    if not model.trained:
        say(UNTRAINED_WARNING.format(backbone=model.model.backbone_name, runs=source.runs), "bold red")
    elif model.images.thresholds is None:
        say(NO_IMAGES_NOTE, "yellow")
    folder = Path(target.out) if target.out else model.folder / "export"
    check_place(folder)
    _finish(export_source(model, target.out, options, say), folder, started, target)
    return EXIT_SOME_FAILED if model.images.unreadable else EXIT_OK


def run_deploy(bundle: str, target: TargetOptions, data: str | None = None) -> int:
    """`export --from`: make artifacts on a device, and print their table; returns the exit code, as `run_export` does.

    See `ssod_edge.export.deploy.deploy` for `bundle` and `data`.
    """
    started = time.monotonic()
    unreadable: dict[str, None] = {}
    folder = Path(Path(bundle).name.removesuffix(".tar") if target.out is None else target.out)
    spec = deploy(bundle, folder, target.targets(), data, unreadable.setdefault, say)
    for message in unreadable:
        say(f"left out: {message}")
    _finish(spec, folder, started, target)
    return EXIT_SOME_FAILED if unreadable else EXIT_OK


def _finish(spec: Spec, folder: Path, started: float, target: TargetOptions) -> None:
    """Show what was made, and write what clients in other languages need."""
    show(spec, folder, started)
    if target.frame is not None:
        from ssod_edge.export.frame import write_frame_graphs

        made = ", ".join(write_frame_graphs(folder, target.frame, target.channels, say))
        say(f"graphs of {made} that take a frame in {target.frame}")
    if target.triton is not None:
        from ssod_edge.export.triton import write_triton

        made = ", ".join(write_triton(folder, target.triton, target.channels, say))
        say(f"models {made} for Triton in {target.triton}")
    if target.golden is not None:
        from ssod_edge.runtime.golden import write_golden

        say(f"golden inputs and outputs of {', '.join(write_golden(folder, target.golden, say))} in {target.golden}")


def run_package(folder: str, out: str, bench: str | None = None) -> int:
    """`package`: pack an export into one file; returns the exit code. See `ssod_edge.export.bundle.write_bundle`."""
    spec = write_bundle(folder, out, bench, say=partial(say, style="yellow"))
    held = ", ".join(artifact.name for artifact in spec.artifacts)
    names = ", ".join(map(printable, spec.classes[:20])) + (", ..." if len(spec.classes) > 20 else "")
    say(f"packed {held} into {out}, {Path(out).stat().st_size / 1e6:.1f} MB; {len(spec.classes)} classes: {names}")
    return EXIT_OK


def engines_for(target: str) -> tuple[str, ...]:
    """The engines of a target: "onnx", "openvino", "tensorrt", "tensorrt-rtx" or "all".

    "all" is what is installed, and of the two that build for a GPU those whose plans run on the one that is here. A
    plan for another machine is made when its target is asked for by name.
    """
    if target == "all":
        installed = [engine for engine in TARGETS if is_installed(engine)]
        return tuple(e for e in installed if e in CPU_TARGETS or runs_here(e)) or CPU_TARGETS
    return ("onnxruntime" if target == "onnx" else target.replace("-", "_"),)


def choose_source(options: SourceOptions) -> Source:
    """The model that is meant.

    Raises:
        UsageError: the options contradict each other, or there is nothing to export.
    """
    from ssod_edge.export.graph.source import from_run, from_weights, untrained
    from ssod_edge.training.run import Run

    run, runs, backbone = options.run, options.runs, options.backbone
    shape: dict[str, Any] = {"input_size": options.size, "fit": options.fit, "roi": options.roi}
    if options.weights or options.pretrained:
        if run or not backbone or (options.weights and options.pretrained):
            raise UsageError("give --backbone NAME with either --weights FILE or --pretrained, and no run")
        return from_weights(backbone, options.weights, runs, options.data, options.classes, **shape)
    if options.classes:
        raise UsageError("--classes belongs to --weights or --pretrained; a run knows its classes")
    if run and backbone:
        raise UsageError("give a run, or --backbone for the newest run of it, not both")
    if run is None:
        try:
            run = str(Run.newest(runs, backbone).folder)
        except UsageError:
            if backbone is None:
                raise
            if options.data:
                raise UsageError("untrained weights have no threshold; leave --id out, or train first") from None
            return untrained(backbone, runs, **shape)
    if given := [f"--{name}" for name in ("size", "fit", "roi") if getattr(options, name) is not None]:
        raise UsageError(
            f"{', '.join(given)}: for weights that were not trained here. A run keeps what it was trained with; "
            "to change it, train again"
        )
    return from_run(run, options.data)


def say(line: str, style: str = "") -> None:
    Screen(err=True, soft_wrap=True).print(Text(printable_lines(line), style))


def show(spec: Spec, folder: Path, started: float) -> None:
    """The table of an export on standard output, then where it is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("artifact", no_wrap=True)
    for heading in ("size", "max |dlogit|", "agreement", "flips", "threshold", "verified"):
        table.add_column(heading, justify="right", no_wrap=True)
    for artifact in spec.artifacts:
        table.add_row(*_row(artifact, folder))
    # Off a terminal a row is one line.
    Screen(wide=200).print(table)
    say(f"exported to {folder} in {time.monotonic() - started:.0f} s")


def _row(artifact: Artifact, folder: Path) -> tuple[str, ...]:
    size = sum((folder / name).stat().st_size for name in artifact.files) / 1e6
    figures, threshold = artifact.verification, artifact.threshold
    if figures is None:
        return artifact.name, f"{size:.1f} MB", "-", "-", "-", "none", "on first run"

    def number(name: str, style: str) -> str:  # of an artifact that is kept, another release may have written them
        value = figures.get(name)
        return format(value, style) if isinstance(value, (int, float)) else "-"

    flips = number("decision_flips", "")
    return (
        artifact.name,
        f"{size:.1f} MB",
        number("max_abs_logit_diff", ".1e"),
        number("class_agreement", ".1%"),
        flips if flips == "-" else f"{flips}/{number('n', '')}",
        "none" if threshold is None else f"{threshold.value:.4f}",
        f"yes, {figures.get('precision', '-')} on {figures.get('device', '-')}",
    )
