"""`ssod-edge report`: one HTML file that shows what a model does, without a network and without other files.

The file forbids itself every request by a content security policy; its script and style are allowed by their hashes.
What comes from outside - names of classes, sets and files - is JSON in a script element, and the script puts it into
the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ssod_edge.data.named import NamedData
from ssod_edge.errors import EXIT_OK, UsageError
from ssod_edge.evaluation.page_data import page_data
from ssod_edge.evaluation.page_facts import check_bench, check_monitor, read_bench
from ssod_edge.evaluation.page_judged import Judged, judge
from ssod_edge.evaluation.page_photos import Photos, take_photos
from ssod_edge.files import check_output, write_atomic
from ssod_edge.runtime.field.monitor import read_monitor
from ssod_edge.runtime.field.summary import summary
from ssod_edge.terminal import tell

#: Bytes of a megabyte, as mail programs count.
MB = 1_000_000
#: Bytes that are kept for what is not known before the photos are.
MARGIN = 2_000


@dataclass(frozen=True)
class PageOptions:
    """What a report shows besides figures.

    Attributes:
        images: whether it shows photos.
        most_mb: megabytes that the file may have.
        bench_file: record of `ssod-edge bench --json`; None leaves latency out.
        monitor_file: of `predict --monitor`; None leaves drift out.
    """

    images: bool = True
    most_mb: float = 15.0
    bench_file: str | None = None
    monitor_file: str | None = None

    def __post_init__(self) -> None:
        if not self.most_mb > 0:
            raise UsageError(f"most_mb must be above 0, got {self.most_mb}")


def run_page(path: str, out: str, data: NamedData, options: PageOptions) -> int:
    """The command `report`: judge the images, and write the page; returns the exit code.

    Raises:
        UsageError, ArtifactError, EngineError, MissingExtraError, VerificationError: as
            `ssod_edge.evaluation.page_judged.judge` and `build`; a damaged bench or monitor file.
        OutputError: the page cannot be written.
    """
    check_output(out)
    bench = read_bench(options.bench_file) if options.bench_file else None  # before the work, not after it
    drift = summary(read_monitor(options.monitor_file)) if options.monitor_file else None
    judged = judge(path, data)
    for message in judged.left_out:
        tell(f"left out: {message}", err=True)
    content = build(judged, options, bench, drift)
    write_atomic(out, lambda temporary: temporary.write_bytes(content))
    tell(f"written: {out} ({len(content) / MB:.1f} MB)")
    return EXIT_OK


def build(
    judged: Judged, options: PageOptions, bench: dict[str, Any] | None = None, drift: dict[str, Any] | None = None
) -> bytes:
    """The page of images that are judged.

    Args:
        judged: the images.
        options: what to show.
        bench: of `ssod_edge.evaluation.page_facts.read_bench`.
        drift: of `ssod_edge.runtime.field.summary.summary`.

    Raises:
        UsageError: `bench` or `drift` is of another model; the figures alone take more than `most_mb`.
    """
    if bench is not None:
        check_bench(bench, judged)
    if drift is not None:
        check_monitor(drift, judged)
    most = options.most_mb * MB
    content = render({**page_data(judged, Photos(), bench, drift), "images": False}, [])
    if options.images:
        photos = take_photos(judged, max(int(most) - len(content) - MARGIN, 0))
        content = render({**page_data(judged, photos, bench, drift), "images": True}, photos.content)
    if len(content) > most:
        raise UsageError(
            f"the figures of this page alone take {len(content) / MB:.1f} MB: give more with --most-mb, or fewer images"
        )
    return content


def render(data: Mapping[str, Any], photos: list[str]) -> bytes:
    """The file: the template with the data in it, and a policy that allows its own script and style alone.

    Args:
        data: JSON-ready.
        photos: Base64 of JPEG files.
    """
    page = files("ssod_edge.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    hashes = {kind: _hash(page, kind) for kind in ("style", "script")}
    policy = (
        f"default-src 'none'; img-src data:; style-src {hashes['style']}; script-src {hashes['script']}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{data.get('title', '')} - model report".encode(errors="replace").decode()
    values = {"policy": policy, "title": html.escape(title), "data": _json(data), "photos": _json(photos)}
    filled = re.sub(r"@@(policy|title|data|photos)@@", lambda found: values[found[1]], page)
    return filled.encode()


def _hash(page: str, kind: str) -> str:
    """The source expression for the one inline element of this kind."""
    (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that may stand in a script element: ASCII, and nothing that ends the element or begins a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
