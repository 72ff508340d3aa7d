"""What a monitor says on `/metrics` of `ssod-edge serve`: written by the server, read by `monitor http://...`."""

from __future__ import annotations

import http.client
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ssod_edge.detect.metrics import tpr_interval
from ssod_edge.errors import ServerError
from ssod_edge.optional import load
from ssod_edge.sources import without_secrets

#: The environment variable with the token of the servers that are asked; one that `serve` takes as its own, too.
VARIABLE = "SSOD_EDGE_TOKEN"
PREFIX = "ssod_edge_monitor_"
#: Of a device's figures those that are numbers -> what the page says of them.
FIGURES = {
    "images": "Images with a score, of the monitor file.",
    "failed": "Images that could not be read.",
    "unknown": "Images above the threshold.",
    "expected_unknown_rate": "Share of known images that the threshold gives up.",
    "recent_unknown_rate": "Share of unknown ones among the last images.",
    "stability_index": "How far all scores lie from those of known images (PSI).",
    "drifted": "1: the scores are no longer those of known images.",
    "alarms": "How often the device itself said so.",
    "log10_evidence": "The most evidence of a drift that there ever was.",
}
LABELS = ("artifact", "backbone", "score")
#: Seconds for an answer, and its bytes.
TIMEOUT_S, MOST = 10.0, 16 * 2**20


def is_served(place: str) -> bool:
    """Whether a place is the address of a server."""
    return place.lower().startswith(("http://", "https://"))


def families(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """Prometheus's metrics of some models' figures (`ssod_edge.runtime.field.fleet.device_row`)."""
    from prometheus_client.core import GaugeMetricFamily

    info = GaugeMetricFamily(f"{PREFIX}info", "What made the scores.", labels=("model", *LABELS))
    for model, row in rows.items():
        info.add_metric([model, *(str(row[label]) for label in LABELS)], 1)
    yield info
    for name, text in FIGURES.items():
        family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=("model",))
        for model, row in rows.items():
            if row[name] is not None:
                family.add_metric([model], float(row[name]))
        yield family


def scrape(address: str) -> dict[str, dict[str, Any]]:
    """The figures of each model that a server monitors, by the name of the model.

    Args:
        address: "http://device:8000"; without a path `/metrics` is asked for. A token is taken from `VARIABLE`.

    Raises:
        ServerError: it does not answer, or its page says nothing of a monitor.
        MissingExtraError: prometheus-client is not installed.
    """
    parser = load("prometheus_client.parser", "a monitor that is read from /metrics")
    shown = without_secrets(address)
    rows: dict[str, dict[str, Any]] = {}
    try:
        for family in parser.text_string_to_metric_families(_page(address)):
            name = family.name.removeprefix(PREFIX)
            if family.name.startswith(PREFIX) and (name in FIGURES or name == "info"):
                for sample in family.samples:
                    row = rows.setdefault(sample.labels["model"], {})
                    row.update({key: sample.labels[key] for key in LABELS} if name == "info" else {name: sample.value})
        found = {model: _row(row) for model, row in rows.items()}
    except (OSError, URLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ServerError(f"'{shown}' does not answer with a page of figures: {reason}") from error
    except (KeyError, ValueError) as error:
        raise ServerError(f"'{shown}' answers with something else than the figures of ssod-edge") from error
    if not found:
        raise ServerError(f"'{shown}' monitors nothing. Start it with: ssod-edge serve EXPORT --monitor FILE")
    return found


class _Stay(HTTPRedirectHandler):
    """A token goes to the server that was named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _page(address: str) -> str:
    if urlsplit(address).path in ("", "/"):
        address = f"{address.rstrip('/')}/metrics"
    token = os.environ.get(VARIABLE, "").strip()
    request = Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    with build_opener(_Stay).open(request, timeout=TIMEOUT_S) as answer:
        page: bytes = answer.read(MOST)
    return page.decode("utf-8", "replace")


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    """As `ssod_edge.runtime.field.fleet.device_row` gives it."""
    images, unknown, failed, alarms = (int(found[key]) for key in ("images", "unknown", "failed", "alarms"))
    if not 0 <= unknown <= images:
        raise ValueError("counts that do not add up")
    return {
        **{key: found[key] for key in LABELS},
        "images": images,
        "failed": failed,
        "unknown": unknown,
        "unknown_rate": unknown / images if images else None,
        "unknown_rate_ci": list(tpr_interval(unknown, images)) if images else None,
        "expected_unknown_rate": found["expected_unknown_rate"],
        "recent_unknown_rate": found.get("recent_unknown_rate"),
        "stability_index": found.get("stability_index"),
        "drifted": bool(found["drifted"]),
        "alarms": alarms,
        "log10_evidence": found["log10_evidence"],
    }
