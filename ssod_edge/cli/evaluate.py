"""Looking at what was trained: figures of a run, and what it sees in an image."""

from __future__ import annotations

from typing import Any

import click

from ssod_edge.cli.help import Command
from ssod_edge.cli.options import baselines, check_paths, named_data, newest, take


@click.command(
    cls=Command,
    everyday="backbone runs id_data ood_data via_size leave_out details baselines json_file png_file pictures mistakes",
)
@click.argument("run", required=False)
@newest("Without RUN: the newest run of this backbone.")
@named_data
@click.option(
    "--bootstrap", type=click.IntRange(min=0), default=1000, help="Resamples of the confidence intervals; 0: none."
)
@click.option(
    "--shift-images",
    type=click.IntRange(min=0),
    default=200,
    help="Known images to show under disturbances too (light, colour, blur, noise, JPEG, ...); 0: none.",
)
@click.option(
    "--leave-out",
    is_flag=True,
    help="Leave out each known class in turn, fit the last layer and the score without it, and show them its images.",
)
@click.option(
    "--details",
    is_flag=True,
    help="Print every score, the confusion matrix, the wrong answers and each kind of disturbance.",
)
@baselines
@click.option("--json", "json_file", type=click.Path(), help="Where the figures go. Default: RUN/eval-PROTOCOL.json.")
@click.option("--png", "png_file", type=click.Path(), help="Histograms. Default: RUN/eval-PROTOCOL.png.")
@click.option(
    "--pictures", type=click.Path(), metavar="DIR", help="Write histograms, ROC, risk-coverage and t-SNE as PNG."
)
@click.option(
    "--mistakes",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Copy the images that got the wrong class into DIR, a new folder. Their names sort the most confident first, "
    "and hold both classes.",
)
def eval(run: str | None, **options: Any) -> None:
    """Measure accuracy, and how many images are called known.

    With --details it shows every score, the confusion matrix, the calibration of the confidence, the wrong answers, and
    each kind of disturbance too. The JSON file has all of it in any case. RUN is a run folder or a checkpoint.

    DATA as in train, DATA@LIST too. Of a run with negatives (train --negatives) those that were held out are an OOD set
    of that name. The PROTOCOL in file names is native, via32 with --via 32, or via32-jpeg75 with --via 32,jpeg75: so
    that neither size nor codec tells the sets apart.
    """
    check_paths(run, id_data=options["id_data"], ood_data=options["ood_data"])
    from ssod_edge.evaluation.evaluate import EvalOptions, run_eval

    run_eval(run, take(EvalOptions, options), **options)


@click.command()
@click.argument("path", metavar="RUN|EXPORT")
@click.option("-o", "--out", default="report.html", type=click.Path(dir_okay=False), help="File of the page.")
@named_data
@click.option("--bench", "bench_file", type=click.Path(), metavar="FILE", help="Show latency: what bench --json wrote.")
@click.option("--monitor", "monitor_file", type=click.Path(), metavar="FILE", help="Show drift: of predict --monitor.")
@click.option("--no-images", "images", flag_value=False, default=True, show_default=False, help="Leave photos out.")
@click.option(
    "--most-mb", type=click.FloatRange(0, min_open=True), default=15.0, help="Megabytes that the page may have."
)
def report(path: str, out: str, **options: Any) -> int:
    """Make a page of a model: one HTML file that shows what it does.

    How good the classes are, what a threshold does to known and unknown images, the images that it gets wrong, its
    artifacts and how it was made. The file needs no network and no other files, and can be mailed and printed. RUN is
    a run folder or a checkpoint, judged as eval does; an EXPORT without its run is judged by its artifact, without
    PyTorch, and needs --id.
    """
    check_paths(id_data=options["id_data"], ood_data=options["ood_data"])
    from ssod_edge.data.named import NamedData
    from ssod_edge.evaluation.page import PageOptions, run_page

    return run_page(path, out, take(NamedData, options), PageOptions(**options))


@click.command()
@click.argument("arguments", metavar="[RUN] IMAGE...", nargs=-1, required=True)
@newest("Without RUN: the newest run of this backbone.")
@click.option("-o", "--out", type=click.Path(), help="A folder, or a .png for one image. Default: RUN/explain.")
@click.option("--gamma", type=float, help="Confidence from which a patch shows a known thing. Default: the run's.")
@click.option("--class", "class_name", metavar="NAME", help="Class to explain. Default: the predicted one.")
def explain(arguments: tuple[str, ...], **options: Any) -> int:
    """Show which patches of an image look known, and which do not.

    Each image becomes a PNG: which patches the network takes for a known thing, for background or for neither, and the
    ID logit of each, which is the higher, the more it looks known. RUN is a run folder or a checkpoint, IMAGE as in
    predict.
    """
    check_paths(None if options["backbone"] else arguments[0])
    from ssod_edge.evaluation.explain import run_explain

    return run_explain(arguments, **options)
