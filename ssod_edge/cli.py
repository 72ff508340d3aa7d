"""The command line: options, and one call into the module that does the work.

Every import of a module that does work sits inside its command, so that `--help` is quick and
`predict` never loads torch. A command ends with another code than 0 through `ctx.exit(code)`;
anything it raises becomes one line on stderr and an exit code in `Commands.invoke`.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from ssod_edge import __version__
from ssod_edge.config import DEFAULT_OUTLIERS, KERNELS, METHODS, OUTLIERS, RECIPES, SHIPPED_SCORES
from ssod_edge.errors import EXIT_INTERRUPTED, EXIT_SOME_FAILED, EXTRAS, SsodEdgeError, missing_extra


class Commands(click.Group):
    """The group of commands: lists them in the order of work, and turns errors into messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                # A name that the terminal's encoding has no letters for must not cost the whole table.
                if isinstance(sys.stdout, io.TextIOWrapper):
                    sys.stdout.reconfigure(errors="backslashreplace")
                return super().invoke(ctx)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the exit code is set
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # The reader (head, less) has gone: point stdout elsewhere, or the flush at exit complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(EXIT_SOME_FAILED)
        except (KeyboardInterrupt, Exception) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            message, code = describe(error)
            click.echo(message, err=True)
            ctx.exit(code)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # `--help` itself could not be written
            message, code = describe(error)
            click.echo(message, err=True)
            sys.exit(code)


def describe(error: BaseException) -> tuple[str, int]:
    """What the user reads for an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] in EXTRAS:
        error = missing_extra(error.name.split(".")[0], "this command")
    if isinstance(error, SsodEdgeError):
        return f"error: {error}", error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "error: out of memory. Use a smaller batch or input size, or free some memory.", EXIT_SOME_FAILED
    if isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        return f"error: {error.strerror or error}{':' if where else ''}{where}", EXIT_SOME_FAILED
    text = str(error) or "no message"
    return (
        f"error: {type(error).__name__}: {text}\nThis should not happen; see where it comes from with: "
        "ssod-edge --debug COMMAND ...",
        EXIT_SOME_FAILED,
    )


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="ssod-edge %(version)s")
@click.option("--debug", is_flag=True, envvar="SSOD_EDGE_DEBUG", show_default=False, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Train, check and ship image classifiers that know when to say "unknown"."""


def split_names(value: str) -> tuple[str, ...]:
    """("a, b") -> ("a", "b")."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def split_kinds(value: str) -> tuple[str, ...]:
    """("a, b") -> ("a", "b"), and "none" -> (). Nothing at all is refused: it would train without any."""
    if value.strip() == "none":
        return ()
    names = split_names(value)
    if not names:
        raise click.BadParameter(f"no kind in '{value}'; give some of {', '.join(OUTLIERS)}, or none")
    return names


def train_options(recipe: str = "short", many_seeds: bool = False) -> Callable[[Any], Any]:
    """The settings of `ssod_edge.config.TrainConfig` and its loss, under the same names.

    Args:
        recipe: the default one.
        many_seeds: the command has --seeds: --seed is not shown, and an error there.
    """
    options = [
        click.option(
            "--recipe",
            type=click.Choice(list(RECIPES)),
            default=recipe,
            help="short: AdamW; scratch: SGD, for more epochs without pretrained weights; paper: Appendix A.4.",
        ),
        click.option("--epochs", type=int, help="Passes over the training data. Default: 10, scratch 30, paper 60."),
        click.option("--batch-size", type=int, help="Images a step and process. Default: 128, scratch 64, paper 256."),
        click.option("--lr", type=float, help="Peak learning rate. Default: 2e-3, scratch 0.05, paper 1e-4."),
        click.option("--weight-decay", type=float, help="Default: 0.05, scratch 5e-4, paper 0.01."),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            help="What background patches teach: the OOD row (ssod, the paper's), the norm (lbf), both, or nothing. "
            "Default: ce with --outliers; paper ssod.",
        ),
        click.option("--gamma", type=float, help="Confidence from which a patch is ID (Eq. 12). Default: 0.95."),
        click.option("--alpha", type=float, help="Weight of the OOD loss (Eq. 14); 0 leaves it out. Default: 1."),
        click.option("--balance", type=click.Choice(["lwb", "lw", "dr"]), help="Table 5. Default: lwb."),
        click.option("--norm-weight", type=float, help="Weight of the background's norm (lbf). Default: 0.05."),
        click.option(
            "--outliers",
            callback=lambda _context, _option, value: None if value is None else split_kinds(value),
            metavar="KINDS|none",
            help=f"Images to make as OOD, comma-separated: {', '.join(OUTLIERS)}. Default: "
            f"{','.join(DEFAULT_OUTLIERS)}; none beside --method or --recipe paper.",
        ),
        click.option("--outlier-share", type=float, help="Made images, as a share of a batch. Default: 0.5."),
        click.option("--outlier-weight", type=float, help="Weight of their loss. Default: 1."),
        click.option(
            "--warmup-epochs",
            type=float,
            help="Epochs before the OOD loss. Default: 1, scratch with patches 10, paper 0.",
        ),
        click.option("--half-size-epochs", type=int, help="First epochs, at half the input size. Default: 0."),
        click.option("--crop-scale-min", type=float, help="Smallest random crop, share of the area. Default: 0.5."),
        click.option("--hflip", type=float, help="Probability of mirroring an image. Default: 0.5."),
        click.option("--val-fraction", type=float, help="Training images kept for choices. Default: 0.05."),
        click.option("--calib-fraction", type=float, help="Kept for thresholds and INT8. Default: 0.05."),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on a GPU, else fp32."),
        click.option(
            "--kernel", type=click.Choice(KERNELS), help="What samples patches. auto: compiled where it was built."
        ),
        click.option("--workers", type=int, help="Processes that read images. Default: 1."),
        click.option(
            "--seed", type=int, hidden=many_seeds, help="Of splits, order, augmentation and weights. Default: 0."
        ),
        click.option("--compile", is_flag=True, default=None, help="Use torch.compile."),
        click.option("--sync-bn", is_flag=True, default=None, help="Synchronise batch norm between GPUs."),
        click.option("--pretrained", is_flag=True, default=None, help="Start from timm's published weights."),
        click.option(
            "--weights", type=click.Path(), help="Start from a .safetensors or .pth file, or a run's checkpoint."
        ),
    ]

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@main.command()
@click.argument("data", required=False)
@click.option(
    "--backbone",
    default="mobilenetv3",
    help="An alias of the paper's Table 6, or a model of timm with one linear classifier.",
)
@click.option("--size", type=click.IntRange(min=1), help="Input height and width in pixels. Default: the backbone's.")
@click.option("--name", help="Name of the run folder. Default: BACKBONE-DATA.")
@click.option("-o", "--out", default="runs", help="Folder of runs.")
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run folder, with its own settings.")
@train_options()
@click.pass_context
def train(ctx: click.Context, /, data: str | None, resume: str | None, out: str, **options: Any) -> None:
    """Train a classifier that knows when to say "unknown".

    DATA is a folder of CLASS/IMAGE files, a .tar file in that layout, demo, torch/NAME:ROOT or hfds/NAME.
    DATA@LIST has only the classes that a text file names, one a line.
    Several processes: torchrun --nproc-per-node N -m ssod_edge train DATA ...
    """
    if (data is None) == (resume is None):
        raise click.UsageError("give DATA to train on, or --resume RUN to go on with a run")
    if resume is not None and (given := _given(ctx, besides=("data", "resume"))):
        raise click.UsageError(
            f"{', '.join(given)} cannot be given with --resume: a run goes on with its own settings and folder"
        )
    from ssod_edge.training.loop import resume_run, start_run

    run = start_run(data, out, options) if data is not None else resume_run(str(resume))
    click.echo(run)


def _given(ctx: click.Context, besides: tuple[str, ...]) -> list[str]:
    """The options that stand on the command line."""
    return [
        option.opts[-1]
        for option in ctx.command.params
        if option.name not in besides
        and ctx.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    ]


@main.command()
@click.argument("data")
@click.option(
    "--backbone",
    default="mobilenetv3",
    help="An alias of the paper's Table 6, or a model of timm with one linear classifier.",
)
@click.option("--size", type=click.IntRange(min=1), help="Input height and width in pixels. Default: the backbone's.")
@click.option("-o", "--out", required=True, help="Folder of the study; its runs lie in it.")
@click.option("--vary", multiple=True, metavar="SETTING=VALUE,...", help="Train with each value; repeatable: a grid.")
@click.option("--seeds", default="0,1,2", metavar="N,...", help="One run of each setting a seed.")
@click.option("--id", "id_data", metavar="DATA", help="ID images. Default: the runs' validation split.")
@click.option("--ood", multiple=True, metavar="NAME=DATA", help="OOD images; may be given several times.")
@click.option("--via", "via_size", type=click.IntRange(min=1), help="Resize every image to N pixels first (via32).")
@click.option("--baselines", metavar="all|NAME,...", help="Also run pytorch-ood's detectors, as in eval.")
@click.option("--fit-images", type=click.IntRange(min=1), help="Training images that baselines are fitted on.")
@click.option("--score", metavar="NAME|auto", help="Also export every run with this score, and evaluate it: `shipped`.")
@train_options(many_seeds=True)
def study(
    data: str, out: str, vary: tuple[str, ...], seeds: str, id_data: str | None, ood: tuple[str, ...],
    via_size: int | None, baselines: str | None, fit_images: int | None, score: str | None, **options: Any,
) -> None:  # fmt: skip
    """Train and evaluate a grid of settings, and show means and deviations over seeds.

    A setting is an option of train, with any of its values: --vary method=ce,ssod --vary outliers=none,rotate+zoom.
    What is done is not done again: run the same command once more after an interruption, or with more seeds. Processes
    of one command share the grid: start it once for each GPU, with CUDA_VISIBLE_DEVICES.
    """
    from ssod_edge.studies.study import run_study

    if not run_study(data, out, vary, seeds, id_data, ood, via_size, baselines, fit_images, options, score):
        sys.exit(EXIT_SOME_FAILED)


@main.command()
@click.argument("table", type=click.Choice(["imagenet", "cifar10", "hard", "alpha", "balance", "backbones"]))
@click.option("--root", required=True, metavar="DIR", help="Folder of the data sets; what is missing is named.")
@click.option("-o", "--out", required=True, help="Folder of the study; its runs, lists and table lie in it.")
@click.option("--check", is_flag=True, help="Find the data, make the lists, show the runs, and stop.")
@click.option("--lists", metavar="DIR", help="Use these image lists. Default: OUT/lists, made on first use.")
@click.option("--images", type=click.IntRange(min=20), default=10_000, help="Images of each ID and OOD set.")
@click.option("--vary", multiple=True, metavar="SETTING=VALUE,...", help="Another grid than the table's own.")
@click.option("--seeds", default="0", metavar="N,...", help="One run of each setting a seed.")
@click.option("--via", "via_size", type=click.IntRange(min=1), help="Resize every image to N pixels first (via32).")
@click.option("--baselines", metavar="all|NAME,...", help="Also run pytorch-ood's detectors, as in eval.")
@click.option("--fit-images", type=click.IntRange(min=1), help="Training images that baselines are fitted on.")
@click.option("--backbone", help="Another backbone than the table's.")
@click.option("--size", type=click.IntRange(min=1), help="Input height and width in pixels. Default: 224.")
@train_options("paper", many_seeds=True)
def reproduce(
    table: str, root: str, out: str, check: bool, lists: str | None, images: int,
    vary: tuple[str, ...], seeds: str, via_size: int | None, baselines: str | None, fit_images: int | None,
    **options: Any,
) -> None:  # fmt: skip
    """Run a table of the paper: train its models, evaluate them on its data sets, print it beside the paper's figures.

    Tables: imagenet (1), cifar10 (2), hard (3), alpha (4), balance (5), backbones (6). Settings are the paper's
    (--recipe paper), and options of train win over them. Run the same command again to go on after an interruption.
    """
    from ssod_edge.studies.protocols import run_reproduce

    if not run_reproduce(
        table, root, out, lists, images, vary, seeds, via_size, baselines, fit_images, check, options
    ):  # fmt: skip
        sys.exit(EXIT_SOME_FAILED)


@main.command()
@click.argument("run", required=False)
@click.option("--backbone", help="Without RUN: the newest run of this backbone.")
@click.option("--runs", default="runs", help="Folder of runs.")
@click.option("--id", "id_data", metavar="DATA", help="ID images. Default: the run's validation split.")
@click.option("--ood", multiple=True, metavar="NAME=DATA", help="OOD images; may be given several times.")
@click.option("--via", "via_size", type=click.IntRange(min=1), help="Resize every image to N pixels first (via32).")
@click.option("--bootstrap", type=click.IntRange(min=0), default=1000, help="Resamples of the intervals.")
@click.option(
    "--baselines", metavar="all|NAME,...", help="Also run pytorch-ood's detectors, and measure what they cost."
)
@click.option("--fit-images", type=click.IntRange(min=1), help="Training images they are fitted on. Default: all.")
@click.option("--json", "json_file", type=click.Path(), help="Where the figures go. Default: RUN/eval-PROTOCOL.json.")
@click.option("--png", "png_file", type=click.Path(), help="Histograms. Default: RUN/eval-PROTOCOL.png.")
@click.option(
    "--pictures", type=click.Path(), metavar="DIR", help="Write histograms, ROC, risk-coverage and t-SNE as PNG."
)
def eval(run: str | None, backbone: str | None, runs: str, ood: tuple[str, ...], **options: Any) -> None:
    """Measure ID accuracy, and every score against every OOD set.

    RUN is a run folder or a checkpoint. DATA as in train, DATA@LIST too.
    """
    from ssod_edge.evaluation.evaluate import run_eval

    run_eval(run, runs, backbone, ood, **options)


@main.command()
@click.argument("arguments", metavar="[RUN] IMAGE...", nargs=-1, required=True)
@click.option("--backbone", help="Without RUN: the newest run of this backbone.")
@click.option("--runs", default="runs", help="Folder of runs.")
@click.option("-o", "--out", type=click.Path(), help="A folder, or a .png for one image. Default: RUN/explain.")
@click.option("--gamma", type=float, help="Confidence from which a patch is ID (Eq. 12). Default: the run's.")
@click.option("--class", "class_name", metavar="NAME", help="Class to explain. Default: the predicted one.")
@click.pass_context
def explain(ctx: click.Context, /, arguments: tuple[str, ...], **options: Any) -> None:
    """Show which patches of an image count as ID, as OOD, or as neither, and their ID logit.

    RUN is a run folder or a checkpoint, IMAGE as in predict. Each image becomes a PNG.
    """
    from ssod_edge.evaluation.explain import run_explain

    ctx.exit(run_explain(arguments, **options))


@main.command()
@click.argument("run", required=False)
@click.option("--backbone", help="Without RUN: the newest run of this backbone, or its untrained weights.")
@click.option("--runs", default="runs", help="Folder of runs.")
@click.option("-o", "--out", type=click.Path(), help="Export folder. Default: RUN/export.")
@click.option("--fp16", is_flag=True, help="Make fp16 artifacts. Default: fp32 and fp16.")
@click.option("--fp32", is_flag=True, help="Make fp32 artifacts.")
@click.option("--int8", is_flag=True, help="Make int8 artifacts, quantised with real images (extra int8).")
@click.option("--calib", metavar="DATA", help="Images to quantise with. Default: those of the thresholds.")
@click.option("--max-drop", type=float, default=1.0, help="Points of top-1 and of AUROC that int8 may cost.")
@click.option(
    "--target",
    type=click.Choice(["onnx", "openvino", "tensorrt", "tensorrt-rtx", "all"]),
    default="all",
    help="all: what is installed and runs here. tensorrt-rtx also builds without a GPU, for any from Ampere on.",
)
@click.option("--batch", metavar="MIN,OPT,MAX", default="1,1,8", help="Images per run of a TensorRT plan.")
@click.option(
    "--version-compatible",
    is_flag=True,
    help="A TensorRT plan that later releases of its major version and the lean runtime open; larger, maybe slower.",
)
@click.option(
    "--score",
    metavar="NAME|NAME+NAME...|auto",
    help=f"OOD score in the graph: {', '.join(SHIPPED_SCORES)}, or a sum; auto: the best on held-out images for at "
    "most 1% more multiply-adds. Default: that of the export that is there, else auto for a network that was trained "
    "with made outliers, else energy.",
)
@click.option("--tpr", type=float, default=0.95, help="Share of in-distribution images to keep known.")
@click.option("--id", "data", metavar="DATA", help="Images for the thresholds. Default: the run's calibration split.")
@click.option("--weights", type=click.Path(), help="Export this .safetensors or .pth file, trained elsewhere.")
@click.option("--pretrained", is_flag=True, help="Export timm's published weights.")
@click.option("--classes", metavar="FILE", help="Their class names, one a line. Default: of --id, or ImageNet.")
@click.option("--size", type=click.IntRange(min=1), help="Input size in pixels, of weights not trained here.")
@click.option("--from", "bundle", metavar="BUNDLE", help="On a device: make the artifacts of what `package` wrote.")
@click.pass_context
def export(
    ctx: click.Context, /, run: str | None, fp16: bool, fp32: bool, int8: bool, bundle: str | None, **options: Any
) -> None:
    """Make verified ONNX, OpenVINO and TensorRT artifacts, each with its own threshold.

    RUN is a run folder or a checkpoint; default: the newest run. With --backbone and no run of it, untrained weights
    are exported, to measure latency. With --from no PyTorch is needed, and --id takes a folder of images.
    """
    from ssod_edge.export.command import SourceOptions, TargetOptions, run_deploy, run_export

    precisions = tuple(name for name, wanted in (("fp32", fp32), ("fp16", fp16), ("int8", int8)) if wanted)
    taken = {"out", "target", "tpr", "batch", "version_compatible"}
    target = TargetOptions(precisions=precisions, **{name: options.pop(name) for name in taken})
    if bundle is not None:
        if given := _given(ctx, besides=("bundle", "data", "fp16", "fp32", "int8", *taken)):
            raise click.UsageError(f"{', '.join(given)} cannot be given with --from: a bundle holds its model")
        ctx.exit(run_deploy(bundle, target, options["data"]))
    how = {name: options.pop(name) for name in ("score", "calib", "max_drop")}
    ctx.exit(run_export(SourceOptions(run, **options), target, **how))


@main.command()
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--backbone", help="Without DIR: the newest export of this backbone.")
@click.option("--runs", default="runs", help="Folder of runs.")
@click.option("--quick", is_flag=True, help="Seconds instead of minutes: fewer queries and images, more noise.")
@click.option("--id", "known", metavar="DATA", help="In-distribution images. Default: the run's validation split.")
@click.option("--ood", "unknown", metavar="NAME=DATA", multiple=True, help="Out-of-distribution images; repeatable.")
@click.option("--via", type=click.IntRange(min=1), help="Resize every image to this many pixels first, as in eval.")
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Images per query.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each engine. Default: its own choice.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write the record to FILE.")
@click.option("--compare", "compare_file", metavar="OLD.json", help="Show what moved since that record.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    folder: str | None,
    backbone: str | None,
    runs: str,
    json_file: str | None,
    compare_file: str | None,
    as_markdown: bool,
    unknown: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure latency and accuracy of every artifact of an export, beside the eager model.

    DIR is an export folder, or the run folder that holds it; default: the newest export.
    """
    from ssod_edge.bench.measurement import BenchOptions
    from ssod_edge.bench.run import parse_unknown, run_bench

    wanted = BenchOptions(unknown=parse_unknown(unknown), **options)
    ctx.exit(run_bench(folder, backbone, wanted, json_file, compare_file, as_markdown, runs))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("-o", "--out", type=click.Path(), default="bundle.tar", help="The bundle.")
@click.option("--bench", metavar="FILE", help="A record of bench --json to put in. Default: bench.json of DIR, if any.")
@click.pass_context
def package(ctx: click.Context, folder: str, out: str, bench: str | None) -> None:
    """Pack an export into one file, from which a device makes its engines.

    DIR is an export folder, or the run folder that holds it. On the device, without PyTorch:
    ssod-edge export --from BUNDLE --target onnx, openvino, ...
    """
    from ssod_edge.export.command import run_package

    ctx.exit(run_package(folder, out, bench))


@main.command()
@click.argument("folder", metavar="DIR")
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option("--camera", metavar="CAMERA", help="Instead of IMAGE: a number, a device file, or a GStreamer pipeline.")
@click.option("--smooth", type=float, metavar="SECONDS", help="Of a video: judge the mean over about this time.")
@click.option("--realtime", is_flag=True, help="Play a video file at its own speed, and drop frames rather than lag.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of a table.")
@click.option("--monitor", metavar="FILE", type=click.Path(), help="Keep count of the scores, and tell of a drift.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "tensorrt", "tensorrt_rtx", "openvino", "onnxruntime", "eager"]),
    default="auto",
)
@click.option("--precision", type=click.Choice(["auto", "fp32", "fp16", "int8"]), default="auto")
@click.option("--artifact", help="Name of the artifact to run, e.g. onnx-fp16.")
@click.option("--device", default="auto", help="Where to run: CPU, cuda:N, or an OpenVINO device such as GPU.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine. Default: its own choice.")
@click.option("--batch", type=click.IntRange(min=1), default=8, help="Images per run of the engine.")
@click.option("--allow-untrained", is_flag=True, help="Run untrained weights, whose verdicts mean nothing.")
@click.pass_context
def predict(
    ctx: click.Context,
    /,
    folder: str,
    images: tuple[str, ...],
    as_json: bool,
    batch: int,
    camera: str | None,
    smooth: float | None,
    realtime: bool,
    monitor: str | None,
    **options: Any,
) -> None:
    """Classify images, and say which ones are UNKNOWN to the model.

    DIR is an export folder, or the run folder that holds it. IMAGE is a file, a folder, a pattern such as
    'photos/**/*.jpg', or - for a list on standard input. In their place, one video file, one address of a stream
    (rtsp://, http:// ...) or --camera gives a verdict a frame.
    """
    from ssod_edge.runtime.field.stream import is_stream, run_stream
    from ssod_edge.runtime.report import run_predict

    if not images and camera is None:
        raise click.UsageError("give at least one IMAGE, or --camera")
    if camera is not None or any(is_stream(image) for image in images):
        if "--batch" in _given(ctx, besides=()):
            raise click.UsageError("--batch belongs to images: a video, a camera or a stream runs frame by frame")
        ctx.exit(run_stream(folder, images, camera, as_json, smooth, realtime, monitor, **options))
    if smooth is not None or realtime:
        raise click.UsageError("--smooth and --realtime belong to a video, a camera or a stream; got images")
    ctx.exit(run_predict(folder, images, as_json=as_json, batch=batch, monitor=monitor, **options))


@main.command()
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def monitor(ctx: click.Context, file: str, as_json: bool) -> None:
    """Show what a file of predict --monitor has counted, and whether the input has drifted."""
    from ssod_edge.runtime.field.summary import run_monitor

    ctx.exit(run_monitor(file, as_json))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--id", "data", required=True, metavar="DATA", help="In-distribution images that were not trained on.")
@click.option("--tpr", type=float, default=0.95, help="Share of in-distribution images to keep known.")
@click.option("--artifact", help="Name of the only artifact to calibrate. Default: all of them.")
@click.pass_context
def calibrate(ctx: click.Context, folder: str, data: str, tpr: float, artifact: str | None) -> None:
    """Refit the thresholds of an export on your own images.

    DIR is an export folder, or the run folder that holds it. DATA is a folder of images; with the extra `train`
    also a .tar file, demo, torch/... or hfds/...
    """
    from ssod_edge.runtime.calibrate import run_calibrate

    ctx.exit(run_calibrate(folder, data, tpr, artifact))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what is installed, try every engine and device, and name what is missing."""
    from ssod_edge.doctor import run_doctor

    ctx.exit(run_doctor(as_json=as_json))
