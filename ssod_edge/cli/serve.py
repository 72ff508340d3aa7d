"""The server."""

from __future__ import annotations

from typing import Any

import click

from ssod_edge.cli.device import ENGINES, PRECISIONS
from ssod_edge.cli.help import Command
from ssod_edge.cli.options import COUNT, given, take, threads

ABOVE_0 = click.FloatRange(0, min_open=True)


@click.command(
    cls=Command,
    everyday="host port token_file insecure batch wait_ms queue max_mb monitor collect engine precision device",
)
@click.argument("exports", metavar="[NAME=]EXPORT...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", help="Address to listen on; other than this machine's needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0: any that is free.")
@click.option("--token-file", metavar="FILE", help="Holds the token of requests. Default: that in SSOD_EDGE_TOKEN.")
@click.option("--insecure", is_flag=True, help="Let other machines in without a token.")
@click.option("--batch", type=COUNT, default=8, help="Images per run of the engine, at most.")
@click.option(
    "--wait-ms", type=click.FloatRange(0), default=2.0, help="Milliseconds that a run waits for images being decoded."
)
@click.option("--queue", type=COUNT, default=64, help="Images of a model that may wait; more are refused (429).")
@click.option("--max-mb", type=ABOVE_0, default=20.0, help="Megabytes of a request.")
@click.option("--max-megapixels", type=ABOVE_0, default=50.0, help="Megapixels of an image.")
@click.option("--timeout", type=ABOVE_0, default=30.0, help="Seconds for a request as a whole.")
@click.option("--body-timeout", type=ABOVE_0, default=10.0, help="Seconds for the body of a request.")
@click.option("--stop-timeout", type=ABOVE_0, default=10.0, help="Seconds to finish requests when it is stopped.")
@click.option("--monitor", metavar="[NAME=]FILE", multiple=True, help="Keep count of the scores, and tell of a drift.")
@click.option("--collect", metavar="[NAME=]DIR", multiple=True, help="Keep what is unknown, or nearly, for review.")
@click.option("--collect-most", type=COUNT, default=500, help="Images that DIR may hold; the most informative stay.")
@click.option("--collect-mb", type=ABOVE_0, default=200.0, help="Megabytes that DIR may hold.")
@click.option("--engine", type=ENGINES, default="auto", help="auto: the first that is there; eager: in PyTorch itself.")
@click.option("--precision", type=PRECISIONS, default="auto", help="auto: the first that is there.")
@click.option("--artifact", help="Name of the artifact to run, e.g. onnx-fp16.")
@click.option("--device", default="auto", help="Where to run: CPU, cuda:N, or an OpenVINO device such as GPU.")
@threads
@click.option("--allow-untrained", is_flag=True, help="Run untrained weights, whose verdicts mean nothing.")
def serve(exports: tuple[str, ...], **options: Any) -> int:
    """Answer with verdicts over HTTP.

    EXPORT is an export folder, or the run folder that holds it; NAME is what the model is called, by default the
    folder's name. POST the bytes of an image to /v1/predict, or to /v1/models/NAME/predict.
    """
    if not options["collect"] and (lonely := sorted({"--collect-most", "--collect-mb"} & set(given()))):
        raise click.UsageError(f"{lonely[0]} belongs to --collect DIR")
    from ssod_edge.serve.command import ServeOptions, run_serve
    from ssod_edge.serve.limits import Limits

    return run_serve(exports, take(ServeOptions, options), take(Limits, options), **options)
