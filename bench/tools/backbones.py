"""Which of timm's models fit: the smallest of each family, built, exported and verified with random weights.

python -m ssod_edge.bench.tools.backbones [FAMILY...] [--json FILE]

A family is a module of timm. Its models share their head, so what holds for one mostly holds for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
import timm
import torch

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.errors import SsodEdgeError, UsageError
from ssod_edge.export.graph.build import ExportOptions, export_source
from ssod_edge.export.graph.source import Source, untrained
from ssod_edge.files import temporary_folder

#: Pixels; a model that does not run at this size is taken at its own.
SIZE = 128


def smallest(family: str) -> tuple[str, int]:
    """The model of a family with the fewest parameters, and how many.

    Raises:
        UsageError: no such family, or none of its models can be built.
    """
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except Exception:
            continue  # it cannot be built without memory, or needs another package
    if not sizes:
        raise UsageError(f"timm has no family '{family}' with a model that can be built")
    return min(sizes.items(), key=itemgetter(1))


def measure(families: list[str], largest: float) -> Iterator[dict[str, Any]]:
    """A row for each module of timm: whether its smallest model fits, and how far its artifacts are from PyTorch.

    Models of more than `largest` million parameters are not exported.
    """
    for family in families:
        try:
            name, parameters = smallest(family)
        except UsageError as error:
            yield {"family": family, "status": "left out", "reason": str(error)}
            continue
        models = len(timm.list_models(module=family))
        row: dict[str, Any] = {"family": family, "models": models, "backbone": name, "parameters": parameters}
        if parameters > largest * 1e6:
            yield {**row, "status": "left out", "reason": f"more than {largest:g} million parameters"}
            continue
        try:
            source = _source(name)
            row |= {"input_size": source.model.preprocess.input_size, "no_patches": source.model.no_patches}
            yield {**row, "status": "fits", "artifacts": _artifacts(source)}
        except SsodEdgeError as error:
            yield {**row, "status": "not exported" if "no_patches" in row else "refused", "reason": str(error)}
        except Exception as error:  # what a user would meet as a traceback
            yield {**row, "status": "crashed", "reason": f"{type(error).__name__}: {error}"}


def _source(name: str) -> Source:
    try:
        return untrained(name, input_size=SIZE)
    except UsageError:
        return untrained(name)


def _artifacts(source: Source) -> dict[str, float]:
    """`relative_logit_error` of `ssod_edge.runtime.verify.Verification`, by artifact."""
    options = ExportOptions(precisions=("fp32", "fp16"))
    with temporary_folder() as folder:
        spec = export_source(source, Path(folder) / "export", options)
    return {a.name: a.verification["relative_logit_error"] for a in spec.artifacts if a.verification}


@click.command(cls=Tool)
@click.argument("families", nargs=-1)
@click.option("--largest", default=30.0, show_default=True, help="Million parameters of a model that is exported.")
@json_option
def main(families: tuple[str, ...], largest: float, json_file: Path | None) -> None:
    """Build and export the smallest model of each family of timm, or of those named."""
    rows: list[dict[str, Any]] = []
    for row in measure(list(families or timm.list_modules()), largest):
        rows.append(row)
        write_rows(json_file, "backbones", rows, timm=timm.__version__)
        said = row.get("reason") or ", ".join(f"{name} {error:.1e}" for name, error in row["artifacts"].items())
        patches = "" if row["status"] != "fits" else "  " if row["no_patches"] else "* "
        click.echo(f"{row['family']:24} {row.get('backbone', ''):32} {row['status']:12} {patches}{said}")
    found = dict(Counter(row["status"] for row in rows))
    click.echo(f"{found}; *: `--method ssod` and `explain` too. Figures: relative error of the logits against PyTorch.")


if __name__ == "__main__":
    main()
