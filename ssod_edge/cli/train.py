"""Training: one run, a grid of runs, and the tables of the paper."""

from __future__ import annotations

from typing import Any

import click

from ssod_edge.cli.help import Command
from ssod_edge.cli.options import (
    COUNT,
    backbone,
    baselines,
    check_paths,
    given,
    named_data,
    shape,
    size,
    take,
    train_options,
    vary,
    via,
)
from ssod_edge.errors import EXIT_OK, EXIT_SOME_FAILED

#: Settings that `--help` shows.
EVERYDAY = " val negatives epochs tune weights"


@click.command(
    cls=Command,
    everyday="backbone size fit roi name out begun_from resume group recipe" + EVERYDAY,
)
@click.argument("data", required=False)
@backbone
@size
@shape
@click.option("--name", help="Name of the run folder. Default: BACKBONE-DATA.")
@click.option("-o", "--out", default="runs", help="Folder of runs.")
@click.option(
    "--from",
    "begun_from",
    metavar="EXPORT|RUN",
    help="Begin with a trained run, or with an export that was taught. Its trunk, class rows and settings are taken.",
)
@click.option("--resume", metavar="RUN", help="Go on with an interrupted run. It keeps its folder and settings.")
@train_options()
def train(data: str | None, resume: str | None, out: str, **options: Any) -> None:
    """Train a classifier that knows when to say "unknown".

    DATA is a folder of CLASS/IMAGE files, a .tar file of it, or a .csv or .parquet file with the columns path and
    label. From 10 photos a class on it works.

    A folder or a .tar file may also hold train/, val/ and test/ folders of classes, and a table the columns split
    (train, val, test) and group. The test part is not read; FILE/test names that of a .tar, .csv or .parquet file.
    DATA@LIST has only the classes that a text file names, one a line. DATA may also be demo, torch/NAME:ROOT or
    hfds/NAME.

    Several processes: torchrun --nproc-per-node N -m ssod_edge train DATA ...
    """
    if (data is None) == (resume is None):
        raise click.UsageError("give DATA to train on, or --resume RUN to go on with a run")
    if resume is not None and (others := given(besides=("data", "resume"))):
        raise click.UsageError(
            f"{', '.join(others)} cannot be given with --resume: a run goes on with its own settings and folder"
        )
    if options["begun_from"] is not None and "--backbone" not in given():
        options["backbone"] = None
    named = {name: options.get(name) for name in ("val", "negatives", "weights")}
    check_paths(data=data, begun=options["begun_from"], resumed=resume, placed=out, **named)
    from ssod_edge.training.loop import resume_run, start_run

    run = start_run(data, out, options) if data is not None else resume_run(str(resume))
    from ssod_edge.terminal import tell

    tell(str(run))


@click.command(
    cls=Command,
    everyday="backbone size out vary seeds id_data ood_data baselines score" + EVERYDAY,
)
@click.argument("data")
@backbone
@size
@click.option("-o", "--out", required=True, help="Folder of the study; its runs lie in it.")
@vary
@click.option("--seeds", default="0,1,2", metavar="N,...", help="Seeds; each setting is trained once with each.")
@named_data
@baselines
@click.option("--score", metavar="NAME|auto", help="Also export every run with this score, and evaluate it: `shipped`.")
@train_options(many_seeds=True)
def study(data: str, out: str, **options: Any) -> int:
    """Train and evaluate a grid of settings, each with several seeds.

    The table has means and deviations over the seeds. A setting is an option of train, with any of its values:
    --vary method=ce,ssod --vary outliers=none,rotate+zoom.

    What is done is not done again: run the same command once more after an interruption, or with more seeds. Processes
    of one command share the grid: start it once for each GPU, with CUDA_VISIBLE_DEVICES. They lock files in OUT, so
    all must see it on one file system whose locks hold: a local disk, not most network shares.
    """
    names = ("val", "negatives", "weights", "id_data", "ood_data")
    check_paths(data=data, placed=out, **{name: options.get(name) for name in names})
    from ssod_edge.evaluation.evaluate import EvalOptions
    from ssod_edge.studies.study import StudyOptions, run_study

    evaluation, score = take(EvalOptions, options), options.pop("score")
    wanted = StudyOptions(options.pop("vary"), options.pop("seeds"), options, evaluation, score)
    done = run_study(data, out, wanted)
    return EXIT_OK if done else EXIT_SOME_FAILED


@click.command(
    cls=Command,
    everyday="root out check folder images vary seeds baselines backbone size epochs",
)
@click.argument("table", type=click.Choice(["imagenet", "cifar10", "hard", "alpha", "balance", "backbones"]))
@click.option("--root", required=True, metavar="DIR", help="Folder of the data sets; what is missing is named.")
@click.option("-o", "--out", required=True, help="Folder of the study; its runs, lists and table lie in it.")
@click.option("--check", is_flag=True, help="Find the data, make the lists, show the runs, and stop.")
@click.option("--lists", "folder", metavar="DIR", help="Use these image lists. Default: OUT/lists, made on first use.")
@click.option("--images", type=click.IntRange(min=20), default=10_000, help="Images of each ID and OOD set.")
@vary
@click.option("--seeds", default="0", metavar="N,...", help="Seeds; each setting is trained once with each.")
@via
@baselines
@click.option("--backbone", help="Another backbone than the table's.")
@click.option("--size", type=COUNT, help="Input height and width in pixels. Default: 224.")
@train_options("paper", many_seeds=True)
def reproduce(table: str, root: str, out: str, check: bool, **options: Any) -> int:
    """Make a table of the paper, beside the figures it reports.

    It trains the table's models and evaluates them on its data sets.
    Tables: imagenet (1), cifar10 (2), hard (3), alpha (4), balance (5), backbones (6). Settings are the paper's
    (--recipe paper), and options of train win over them; --vary replaces the table's own grid. Run the same command
    again to go on after an interruption.
    """
    from ssod_edge.evaluation.evaluate import EvalOptions
    from ssod_edge.studies.protocols import ImageLists, run_reproduce
    from ssod_edge.studies.study import StudyOptions

    lists, evaluation = take(ImageLists, options), take(EvalOptions, options)
    wanted = StudyOptions(options.pop("vary"), options.pop("seeds"), options, evaluation)
    done = run_reproduce(table, root, out, wanted, lists, check)
    return EXIT_OK if done else EXIT_SOME_FAILED
