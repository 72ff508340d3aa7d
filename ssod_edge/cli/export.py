"""From a trained network to what a device runs: artifacts, and the bundle that carries them there."""

from __future__ import annotations

from typing import Any

import click

from ssod_edge.cli.help import Command
from ssod_edge.cli.options import COUNT, check_paths, given, newest, shape, take, tpr
from ssod_edge.config import PRIOR_SCORE, SHIPPED_SCORES
from ssod_edge.spec import FEATURE_OUTPUTS


@click.command(
    cls=Command,
    everyday="backbone runs out fp16 fp32 int8 target score tpr data golden frame triton bundle",
)
@click.argument("run", required=False)
@newest("Without RUN: the newest run of this backbone, or its untrained weights.")
@click.option("-o", "--out", type=click.Path(), help="Export folder. Default: RUN/export.")
@click.option("--fp16", is_flag=True, help="Make fp16 artifacts. Default: fp32 and fp16.")
@click.option("--fp32", is_flag=True, help="Make fp32 artifacts.")
@click.option("--int8", is_flag=True, help="Make int8 artifacts, quantised with real images (extra int8).")
@click.option("--calib", metavar="DATA", help="Images to quantise with. Default: training images of the run.")
@click.option("--max-drop", type=float, default=1.0, help="Percentage points of accuracy and of AUROC int8 may cost.")
@click.option(
    "--target",
    type=click.Choice(["onnx", "openvino", "tensorrt", "tensorrt-rtx", "all"]),
    default="all",
    help="What runs the artifacts; all: what is installed and runs here. `tensorrt-rtx` also builds without a GPU, for "
    "any from Ampere on.",
)
@click.option("--batch", metavar="MIN,OPT,MAX", default="1,1,8", help="Images per run that a TensorRT plan is for.")
@click.option(
    "--version-compatible",
    is_flag=True,
    help="A TensorRT plan that later releases of its major version and the lean runtime open; larger, maybe slower.",
)
@click.option(
    "--score",
    metavar="NAME|NAME+NAME...|auto",
    help=f'Which score says "unknown". One of {", ".join(SHIPPED_SCORES)}, or a sum of some; auto: the best on '
    "held-out images for at most 1% more multiply-adds. Left out, it is that of the export that is there, else auto "
    f"for a network that was trained with spoiled copies (--outliers), else {PRIOR_SCORE} (and residual, where "
    "training left the features alone), or energy without training images.",
)
@tpr
@click.option("--id", "data", metavar="DATA", help="Images for the thresholds. Default: the run's calibration split.")
@click.option("--weights", type=click.Path(), help="Export this .safetensors or .pth file, trained elsewhere.")
@click.option("--pretrained", is_flag=True, help="Export timm's published weights.")
@click.option("--classes", metavar="FILE", help="Their class names, one a line. Default: of --id, or ImageNet.")
@click.option("--size", type=COUNT, help="Input size in pixels, of weights not trained here.")
@click.option(
    "--features",
    type=click.Choice(list(FEATURE_OUTPUTS)),
    multiple=True,
    help="Another output of the graph: what its last layer reads.",
)
@click.option(
    "--golden",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write ten inputs with their outputs and verdicts into DIR. To test a client in another language with.",
)
@click.option(
    "--frame",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write graphs into DIR that take a frame of any size and give its verdict. A frame is uint8 [height, width, "
    "3]; golden frames to test a client with come along.",
)
@click.option(
    "--triton",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write a model repository for NVIDIA Triton Inference Server into DIR. It has the verdict on pixels and on "
    "frames.",
)
@click.option(
    "--channels",
    type=click.Choice(["RGB", "BGR", "NV12"]),
    default="RGB",
    help="Colours of a frame, in order (--frame, --triton); NV12, as cameras and decoders give it, with OpenVINO.",
)
@click.option(
    "--no-features",
    "stored",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    help="Keep no features of images in the export: it cannot be taught.",
)
@shape
@click.option("--from", "bundle", metavar="BUNDLE", help="On a device: make the artifacts of what `package` wrote.")
def export(fp16: bool, fp32: bool, int8: bool, bundle: str | None, **options: Any) -> int:
    """Make verified artifacts for ONNX, OpenVINO and TensorRT.

    Each has a threshold of its own, above which an image is unknown. RUN is a run folder or a checkpoint; default: the
    newest run. With --backbone and no run of it, untrained weights are exported, to measure latency. With --from no
    PyTorch is needed, and --id takes a folder of images.
    """
    if bundle is None:
        check_paths(options["run"], weights=options["weights"], data=options["data"])
    from ssod_edge.export.command import SourceOptions, TargetOptions, run_deploy, run_export

    options["precisions"] = tuple(name for name, wanted in (("fp32", fp32), ("fp16", fp16), ("int8", int8)) if wanted)
    target = take(TargetOptions, options)
    if bundle is not None:
        if others := given(besides=("bundle", "data", "fp16", "fp32", "int8", *vars(target))):
            raise click.UsageError(f"{', '.join(others)} cannot be given with --from: a bundle holds its model")
        return run_deploy(bundle, target, options["data"])
    return run_export(take(SourceOptions, options), target, **options)


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("-o", "--out", type=click.Path(), default="bundle.tar", help="File of the bundle.")
@click.option("--bench", metavar="FILE", help="A record of bench --json to put in. Default: bench.json of DIR, if any.")
def package(folder: str, out: str, bench: str | None) -> int:
    """Pack an export into one file for a device.

    DIR is an export folder, or the run folder that holds it. The device makes its own engines of the file, without
    PyTorch: ssod-edge export --from BUNDLE --target onnx, openvino, ...
    """
    from ssod_edge.export.command import run_package

    return run_package(folder, out, bench)
