"""What a bench measures: every artifact of an export, the eager model, and the plain classifier."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ssod_edge.bench.plain import PREFIX, Pair, choose_pairs, export_plain, open_plain
from ssod_edge.errors import MissingExtraError, SsodEdgeError
from ssod_edge.files import real_path, sha256_file
from ssod_edge.runtime.export import Export
from ssod_edge.runtime.open import is_installed, open_runner
from ssod_edge.runtime.runner import Runner
from ssod_edge.spec import Artifact

EAGER = "eager"
#: The artifact `BF16_SOURCE`, computed in bf16.
BF16 = "openvino-bf16"
BF16_SOURCE = "openvino-fp32"
CHECKPOINT = "best.safetensors"


@dataclass
class Backend:
    """One row of the table.

    Attributes:
        name: of the artifact, "eager", "openvino-bf16", or "plain-" and the name of a fused artifact.
        engine: that was asked for.
        folder: where `open_backend` finds it.
        sha256: of its one file, or of the list of its files' SHA-256 (see `combined_hash`); None if unknown.
        size_mb: of its files, 10**6 bytes; None if one is missing.
        runner: while it is open.
        precision, device: what really ran; None if it could not be opened.
        status: "ok", "failed", or "missing" where this machine lacks what it needs (a package, the checkpoint).
        error: why it is not "ok".
    """

    name: str
    engine: str
    folder: Path
    sha256: str | None = None
    size_mb: float | None = None
    runner: Runner | None = None
    precision: str | None = None
    device: str | None = None
    status: str = "ok"
    error: str | None = None

    def fail(self, error: Exception) -> None:
        """Record why there are no more figures; the first reason stands."""
        if self.status == "ok":
            self.status = "missing" if isinstance(error, MissingExtraError) else "failed"
            kind = "" if isinstance(error, SsodEdgeError) else f"{type(error).__name__}: "
            self.error = f"{kind}{error}"


class Backends(ExitStack):
    """All backends of an export. One that cannot be made or opened has failed; the others go on.

    Args:
        export: whose artifacts they are.
        scratch: an empty folder for the plain classifiers.
        threads: of each engine; None leaves it to them.
    """

    def __init__(self, export: Export, scratch: Path, threads: int | None) -> None:
        super().__init__()
        self._threads = threads
        fused = [_fused(export.folder, artifact) for artifact in export.spec.artifacts]
        self.all = [*fused, *_bf16(fused), _eager(export)]
        self.pairs = choose_pairs(export.spec)
        self.all += [_plain(export, pair, scratch / pair.plain) for pair in self.pairs]

    def open(self, backend: Backend) -> None:
        """Open one of `all`, until this context ends."""
        try:
            runner = self.enter_context(open_backend(backend.folder, backend.name, self._threads))
        except Exception as error:  # whatever an engine raises, the other rows go on
            backend.fail(error)
        else:
            backend.runner, backend.precision, backend.device = runner, runner.precision, runner.device

    def working(self) -> list[Backend]:
        """Those that have not failed."""
        return [backend for backend in self.all if backend.status == "ok"]

    def runners(self) -> dict[str, Runner]:
        """The open runners of those that have not failed, by name."""
        return {backend.name: backend.runner for backend in self.working() if backend.runner is not None}

    def named(self, name: str) -> Backend:
        """The backend of that name, which exists."""
        return next(backend for backend in self.all if backend.name == name)


def open_backend(folder: Path, name: str, threads: int | None) -> Runner:
    """Open one backend. Untrained weights are welcome here: latency does not depend on them."""
    if name == EAGER:
        return open_runner(folder, engine="eager", threads=threads, allow_untrained=True)
    if name.startswith(PREFIX):
        return open_plain(folder, threads)
    if name == BF16:
        return _open_bf16(folder, threads)
    return open_runner(folder, artifact=name, threads=threads, allow_untrained=True)


def combined_hash(artifact: Artifact) -> str:
    """The SHA-256 of an artifact's one file; of several, that of their SHA-256 digits, joined in the spec's order."""
    digests = list(artifact.files.values())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode("ascii")).hexdigest()


def _fused(export: Path, artifact: Artifact) -> Backend:
    size = _size_mb([export / name for name in artifact.files])
    return Backend(artifact.name, artifact.engine, export, combined_hash(artifact), size)


def _bf16(fused: list[Backend]) -> list[Backend]:
    """The row for bf16: it says so where the CPU has no such arithmetic, because OpenVINO would then run fp32."""
    backends = [replace(backend, name=BF16) for backend in fused if backend.name == BF16_SOURCE]
    for backend in backends:
        if is_installed("openvino"):
            from ssod_edge.runtime.engines.openvino import cpu_capabilities

            has = cpu_capabilities()
            if "BF16" not in has:
                backend.status, backend.error = "missing", f"this CPU has no bf16 arithmetic, only {', '.join(has)}"
    return backends


def _open_bf16(folder: Path, threads: int | None) -> Runner:
    from ssod_edge.runtime.engines.openvino import OpenVinoRunner

    export = Export.at(folder)
    artifact = export.spec.artifact(BF16_SOURCE)
    return OpenVinoRunner(export.spec, artifact, export.check(artifact), threads=threads, bf16=True)


def _eager(export: Export) -> Backend:
    run = real_path(export.folder).parent
    checkpoint = run / CHECKPOINT
    if export.spec.taught:
        error = "the export was taught, and no checkpoint has learnt that"
        return Backend(EAGER, EAGER, run, status="missing", error=error)
    if not checkpoint.is_file():
        # An export that was copied to a device, or one of untrained weights.
        error = f"there is no {CHECKPOINT} beside this export"
        return Backend(EAGER, EAGER, run, status="missing", error=error)
    return Backend(EAGER, EAGER, run, sha256_file(checkpoint), _size_mb([checkpoint]))


def _plain(export: Export, pair: Pair, folder: Path) -> Backend:
    backend = Backend(pair.plain, pair.engine, folder)
    if pair.source not in {artifact.name for artifact in export.spec.artifacts}:
        backend.status, backend.error = "missing", f"there is no {pair.source} in this export, which it is made from"
        return backend
    try:
        folder.mkdir(parents=True)
        artifact = export_plain(export, pair, folder)
    except Exception as error:
        backend.fail(error)
        return backend
    backend.sha256, backend.size_mb = combined_hash(artifact), _size_mb([folder / name for name in artifact.files])
    return backend


def _size_mb(paths: list[Path]) -> float | None:
    try:
        return round(sum(path.stat().st_size for path in paths) / 1e6, 3)
    except OSError:
        return None
