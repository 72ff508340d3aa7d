"""What a device runs: verdicts, how fast they come, thresholds on its own images, drift, and what is installed."""

from __future__ import annotations

import sys
from typing import Any

import click

from ssod_edge.cli.help import Command
from ssod_edge.cli.options import COUNT, as_json, check_paths, given, named_data, newest, take, threads, tpr
from ssod_edge.errors import OutputError

ENGINES = click.Choice(["auto", "tensorrt", "tensorrt_rtx", "openvino", "onnxruntime", "eager"])
PRECISIONS = click.Choice(["auto", "fp32", "fp16", "int8"])


@click.command()
@click.argument("folder", metavar="[DIR]", required=False)
@newest("Without DIR: the newest export of this backbone.")
@click.option("--quick", is_flag=True, help="Seconds instead of minutes: fewer queries and images, more noise.")
@named_data
@click.option("--batch", type=COUNT, default=1, help="Images per query.")
@threads
@click.option("--json", "json_file", metavar="FILE", type=click.Path(dir_okay=False), help="Write the record to FILE.")
@click.option("--compare", "compare_file", metavar="OLD.json", help="Show what moved since that record.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
def bench(folder: str | None, backbone: str | None, runs: str, **options: Any) -> int:
    """Measure latency and accuracy of every artifact of an export.

    The checkpoint in PyTorch (`eager`) is measured beside them. DIR is an export folder, or the run folder that holds
    it; default: the newest export.
    """
    check_paths(id_data=options["id_data"], ood_data=options["ood_data"])
    from ssod_edge.bench.measurement import BenchOptions
    from ssod_edge.bench.run import BenchOutput, run_bench

    return run_bench(folder, take(BenchOptions, options), BenchOutput(**options), backbone, runs)


@click.command()
@click.argument("folder", metavar="EXPORT")
@click.argument("data", metavar="[DATA]", required=False)
@click.option(
    "-o",
    "--out",
    type=click.Path(),
    help="The new export folder; EXPORT stays as it is. Default: EXPORT itself, of which the version before is kept.",
)
@click.option("--forget", metavar="CLASS", multiple=True, help="Take this class out; may be given several times.")
@click.option(
    "--max-drop",
    type=float,
    default=1.0,
    help="Points of accuracy, and of photos called known, that the other classes may lose.",
)
@click.option("--alike", is_flag=True, help="Teach a class although its photos or name look like a known one's.")
@click.option("--keep", type=click.IntRange(min=0), help="Earlier versions that stay. Default: all.")
def teach(folder: str, out: str | None, keep: int | None, **options: Any) -> int:
    """Teach an export new classes from a few photos.

    DATA has CLASS/IMAGE folders of new classes or of known ones; no PyTorch is needed. EXPORT is an export folder, or
    the run folder that holds it, of `train --tune head`. The new export is proved on images that its fits have not
    seen, and verified.
    """
    from ssod_edge.teach.command import run_teach
    from ssod_edge.teach.teach import TeachOptions

    return run_teach(folder, out, take(TeachOptions, options), keep)


@click.command()
@click.argument("folder", metavar="EXPORT")
@click.option("--keep", type=click.IntRange(min=0), help="Keep so many versions, and remove the older ones.")
@as_json
def history(folder: str, keep: int | None, as_json: bool) -> int:
    """List the versions of an export that was taught.

    EXPORT is an export folder, or the run folder that holds it. The newest comes first: what was taught or forgotten,
    the proof, when, and where it is kept.
    """
    from ssod_edge.teach.command import run_history

    return run_history(folder, keep, as_json)


@click.command()
@click.argument("folder", metavar="EXPORT")
@click.option("--to", metavar="VERSION", help="Its number, or its name in history. Default: what it was taught from.")
def rollback(folder: str, to: str | None) -> int:
    """Swap an earlier version of an export in.

    It is one rename; the version that was in use is kept, and comes back in the same way.
    """
    from ssod_edge.teach.command import run_rollback

    return run_rollback(folder, to)


@click.command(
    cls=Command,
    everyday="camera smooth as_json csv resume sort_into monitor collect engine precision device",
)
@click.argument("folder", metavar="DIR")
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option("--camera", metavar="CAMERA", help="Instead of IMAGE: a number, a device file, or a GStreamer pipeline.")
@click.option("--smooth", type=float, metavar="SECONDS", help="Of a video: judge the mean over about this time.")
@click.option("--realtime", is_flag=True, help="Play a video file at its own speed, and drop frames rather than lag.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line instead of a table.")
@click.option(
    "--csv", metavar="FILE", type=click.Path(dir_okay=False), help="Write the verdicts to FILE too, as a table."
)
@click.option("--parquet", metavar="FILE", type=click.Path(dir_okay=False), help="The same as a Parquet file.")
@click.option(
    "--resume", is_flag=True, help="With --csv or --parquet: write each row at once, and go on with those FILE has."
)
@click.option(
    "--sort-into",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Copy each image into DIR/CLASS, or DIR/unknown. Nothing there is overwritten.",
)
@click.option("--monitor", metavar="FILE", type=click.Path(), help="Keep count of the scores, and tell of a drift.")
@click.option(
    "--collect",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Keep unknown images, and known ones that nearly were, in DIR, for review: the whole pictures.",
)
@click.option("--collect-most", type=COUNT, default=500, help="Images that DIR may hold; the most informative stay.")
@click.option("--collect-mb", type=click.FloatRange(0, min_open=True), default=200, help="Megabytes that DIR may hold.")
@click.option("--engine", type=ENGINES, default="auto", help="auto: the first that is there; eager: in PyTorch itself.")
@click.option("--precision", type=PRECISIONS, default="auto", help="auto: the first that is there.")
@click.option("--artifact", help="Name of the artifact to run, e.g. onnx-fp16.")
@click.option("--device", default="auto", help="Where to run: CPU, cuda:N, or an OpenVINO device such as GPU.")
@threads
@click.option("--batch", type=COUNT, default=8, help="Images per run of the engine.")
@click.option("--strict-images", is_flag=True, help="Refuse damaged pictures that can be decoded. Default: mark them.")
@click.option("--allow-untrained", is_flag=True, help="Run untrained weights, whose verdicts mean nothing.")
def predict(folder: str, images: tuple[str, ...], **options: Any) -> int:
    """Classify images, and say which ones are UNKNOWN to the model.

    DIR is an export folder, or the run folder that holds it. IMAGE is a file, a folder, a pattern ('photos/**/*.jpg'),
    a .tar file, the same in a bucket (s3://bucket/photos/), or - for a list on standard input. In their place, one
    video file, one address of a stream (rtsp://, http:// ...) or --camera gives a verdict a frame; of a folder the
    images are taken, and no videos.
    """
    from ssod_edge.runtime.field.capture import holds_video, is_stream
    from ssod_edge.runtime.field.stream import run_stream
    from ssod_edge.runtime.report import PredictOptions, run_predict

    if sys.stdout is None:
        raise OutputError("standard output is closed, so the verdicts have nowhere to go. Redirect it to a file.")
    wanted = take(PredictOptions, options)
    if wanted.collect is None and (lonely := sorted({"--collect-most", "--collect-mb"} & set(given()))):
        raise click.UsageError(f"{lonely[0]} belongs to --collect DIR")
    if wanted.csv is not None and wanted.parquet is not None:
        raise click.UsageError("give --csv FILE or --parquet FILE: one of them")
    if wanted.resume and wanted.csv is None and wanted.parquet is None:
        raise click.UsageError("--resume belongs to --csv FILE or --parquet FILE, whose rows it goes on with")
    if not images and wanted.camera is None:
        raise click.UsageError("give at least one IMAGE, or --camera")
    alone = len(images) == 1 and not is_stream(images[0]) and holds_video(images[0])
    if wanted.camera is not None or alone or any(is_stream(image) for image in images):
        for option in sorted({"--batch", "--strict-images", "--sort-into", "--resume"} & set(given())):
            raise click.UsageError(f"{option} belongs to images: a video, a camera or a stream runs frame by frame")
        return run_stream(folder, images, wanted, **options)
    if wanted.smooth is not None or wanted.realtime:
        raise click.UsageError("--smooth and --realtime belong to a video, a camera or a stream; got images")
    return run_predict(folder, images, wanted, **options)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@as_json
def monitor(files: tuple[str, ...], as_json: bool) -> int:
    """Show what predict --monitor has counted, and any drift.

    Of several files, of as many devices, a table: each device, all together, and which have drifted, by a limit that
    grows with the number of devices so that false alarms do not. The address of a server (http://device:8000) stands
    for the models that `serve --monitor` counts there; SSOD_EDGE_TOKEN holds its token.
    """
    from ssod_edge.runtime.field.scraped import is_served

    if len(files) > 1 or is_served(files[0]):
        from ssod_edge.runtime.field.fleet import run_fleet

        return run_fleet(files, as_json)
    from ssod_edge.runtime.field.summary import run_monitor

    return run_monitor(files[0], as_json)


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--folders", is_flag=True, help="No page: sort the images into folders for you to rename.")
@click.option("--done", is_flag=True, help="With --folders: take the renamed folders as decisions.")
@click.option("-o", "--out", type=click.Path(file_okay=False), help="Where classes go. Default: DIR/classes.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the page; 0: any that is free.")
@click.option("--no-browser", is_flag=True, help="Print the page's address, and open no browser.")
def review(folder: str, folders: bool, done: bool, out: str | None, port: int, no_browser: bool) -> int:
    """Sort what predict --collect kept into classes.

    A page on this machine shows groups of what looks alike, to be named, discarded, split and joined by keys; ? lists
    them. "Finish" makes CLASS/IMAGE files of them, for teach and train, and logs each decision. Until then nothing is
    moved, and what was decided is kept.

    --folders makes DIR/groups/group-01/ and so on instead. Rename a folder to a class, new or known; rename it to
    `discard`, or delete it or images in it, for what nobody needs; move images as you like; what keeps its number stays
    undecided. --folders --done then does what "Finish" does.
    """
    from ssod_edge.runtime.field.review import run_review
    from ssod_edge.runtime.field.review_page import run_page

    if done and not folders:
        raise click.UsageError("--done belongs to --folders")
    if folders:
        if out is not None and not done:
            raise click.UsageError("--out belongs to the page, or to --folders --done")
        if lonely := sorted({"--port", "--no-browser"} & set(given())):
            raise click.UsageError(f"{lonely[0]} belongs to the page, which --folders does without")
        return run_review(folder, done, out)
    return run_page(folder, out, port, not no_browser)


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--id", "data", required=True, metavar="DATA", help="Images of known things that were not trained on.")
@tpr
@click.option("--artifact", help="Name of the only artifact to calibrate. Default: all of them.")
def calibrate(folder: str, data: str, tpr: float, artifact: str | None) -> int:
    """Refit the thresholds of an export on your own images.

    DIR is an export folder, or the run folder that holds it. DATA is a folder of images; with the extra `train`
    also a .tar file, demo, torch/... or hfds/...
    """
    from ssod_edge.runtime.calibrate import run_calibrate

    return run_calibrate(folder, data, tpr, artifact)


@click.command()
@as_json
def doctor(as_json: bool) -> int:
    """Try every engine and device, and name what is missing."""
    from ssod_edge.doctor import run_doctor

    return run_doctor(as_json=as_json)
