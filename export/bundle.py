"""One file that takes an export to a device: `package` writes it, `export --from` reads it. Needs no torch."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath

from ssod_edge.data.layout import tar_damage
from ssod_edge.errors import ArtifactError, OutputError, SsodEdgeError, UsageError
from ssod_edge.export.release import Say
from ssod_edge.files import check_output, sha256_file, write_atomic
from ssod_edge.json_reader import parse_json
from ssod_edge.runtime.export import Export
from ssod_edge.spec import REFERENCE_NAME, SPEC_NAME, Artifact, Spec, check_files, check_hash, load_spec, spec_values
from ssod_edge.terminal import printable

README_NAME = "README.md"
#: The hash of every other file, in the format of `sha256sum --check`.
SUMS_NAME = "SHA256SUMS"
BENCH_NAME = "bench.json"

#: A bundle is a tar file without compression, so what it unpacks to is no larger than itself. These bound the rest.
MAX_FILES = 1000
MAX_TEXT_BYTES = 64 << 20

Content = Path | bytes


def travels(artifact: Artifact) -> bool:
    """Whether an artifact is put into a bundle. What is not is made on the device, from the ONNX graph.

    A plan runs on no other GPU, and an IR is made from the graph in a second. The int8 IR is the exception: it is
    quantised on calibration images by a package that a device has no need of.
    """
    return artifact.engine == "onnxruntime" or (artifact.engine == "openvino" and artifact.precision == "int8")


def write_bundle(
    folder: str | Path, path: str | Path, bench: str | Path | None = None, say: Say = lambda line: None
) -> Spec:
    """Pack an export into one tar file. The same export gives the same bytes under the same name.

    Args:
        folder: an export folder, or the run folder that holds it.
        path: the bundle.
        bench: a record of `bench --json` to put in; None takes `bench.json` in the export folder or the run folder,
            if there is one of this export.
        say: gets a line for each thing that stays behind.

    Returns:
        the spec in the bundle: that of the export, with the artifacts that travel.

    Raises:
        UsageError: no export there, one without an ONNX graph, or a `bench` that is no record of this export.
        ArtifactError: a file of the export is missing, edited or cut short.
        OutputError: the bundle cannot be written; an earlier file of that name is unchanged.
    """
    check_output(path)
    export = Export.at(folder)
    folder, spec = export.folder, export.spec
    packed = replace(spec, artifacts=tuple(artifact for artifact in spec.artifacts if travels(artifact)))
    _report_missing_graphs(spec, folder, say)
    _check_hashes(folder, packed)
    contents: dict[str, Content] = {name: folder / name for artifact in packed.artifacts for name in artifact.files}
    record = _find_bench(packed, folder, bench, say)
    if record is not None:
        contents[BENCH_NAME] = record
    contents |= {name: folder / name for name in spec.shared_files}
    contents[SPEC_NAME] = (json.dumps(spec_values(packed), indent=2, allow_nan=False) + "\n").encode()
    contents[README_NAME] = _readme(packed, record, printable(Path(path).name)).encode()
    for name in contents:
        _check_name(name, Path(path))
    contents[SUMS_NAME] = "".join(f"{_hash(contents[name])}  {name}\n" for name in sorted(contents)).encode()
    write_atomic(path, lambda temporary: _write_tar(temporary, contents))
    return packed


def check_bundle(path: str | Path) -> Path:
    """Raises UsageError unless there is a file of that name."""
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"the bundle '{path}' {what}. Make one with: ssod-edge package DIR -o bundle.tar")
    return path


def unpack(path: str | Path, folder: Path) -> Spec:
    """Unpack a bundle and check every hash in it.

    Only plain files below `folder` are written: a link, a device, a name that leads elsewhere or occurs twice is
    refused. A hash catches corruption and mix-ups, not an attacker who can make a bundle.

    Args:
        path: what `write_bundle` wrote.
        folder: an empty folder. What a bundle that is refused leaves in it is the caller's to remove.

    Returns:
        the bundle's spec. Beside its files the folder holds `BENCH_NAME`, if there was one, README and hashes.

    Raises:
        UsageError: there is no such file.
        ArtifactError: it is no bundle, cut short, edited, or holds something else than plain files.
        OutputError: there is too little space.
    """
    path = check_bundle(path)
    need, free = path.stat().st_size, shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            f"'{path}' needs {need / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free. Free some space, or choose "
            "another place with -o/--out"
        )
    try:
        with tarfile.open(path, "r:") as archive:
            names = _extract(archive, folder, path)
    except SsodEdgeError:
        raise
    except Exception as error:
        raise _damaged(path, f"it is no bundle, or is cut short: {tar_damage(error)}") from error
    for name in (SUMS_NAME, SPEC_NAME):
        if name not in names:
            raise _damaged(path, f"it holds no {name}")
    _check_sums(folder, names, path)
    spec = load_spec(folder)
    try:
        _check_hashes(folder, spec)
    except ArtifactError as error:
        raise _damaged(path, str(error)) from error
    return spec


def _report_missing_graphs(spec: Spec, folder: Path, say: Say) -> None:
    """Say which precisions cannot be made on a device, because the export holds no ONNX graph in them."""
    graphs = {artifact.precision for artifact in spec.artifacts if artifact.engine == "onnxruntime"}
    fix = "Add it with: ssod-edge export RUN --target onnx --{}, which keeps the other artifacts"
    if not graphs:
        found = ", ".join(artifact.name for artifact in spec.artifacts) or "no artifacts"
        raise UsageError(
            f"'{folder}' holds no ONNX graph, from which a device makes its engine; it has: {found}. "
            + fix.format("fp32")
        )
    for precision in dict.fromkeys(a.precision for a in spec.artifacts if a.precision not in graphs):
        left = [a.name for a in spec.artifacts if a.precision == precision and not travels(a)]
        if left:
            say(f"left out {', '.join(left)}: there is no ONNX graph in {precision}. {fix.format(precision)}")


def _find_bench(spec: Spec, folder: Path, given: str | Path | None, say: Say) -> bytes | None:
    """The record of `bench --json` of these artifacts, or None if none was given and none is found."""
    if given is not None:
        return _read_bench(spec, Path(given))
    for place in (folder, folder.parent) if folder.name == "export" else (folder,):
        if (place / BENCH_NAME).is_file():
            try:
                return _read_bench(spec, place / BENCH_NAME)
            except UsageError as error:
                say(f"left out {BENCH_NAME}: {error}")
    return None


def _read_bench(spec: Spec, path: Path) -> bytes:
    """Raises UsageError unless the file is a bench record with a row of one of the spec's ONNX artifacts."""
    try:
        content = path.read_bytes()
        rows = parse_json(content).get("rows")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{path}' cannot be read as a bench record ({error}). Make one with: ssod-edge bench --json FILE"
        ) from error
    if not isinstance(rows, list):
        raise UsageError(f"'{path}' is not a bench record. Make one with: ssod-edge bench --json FILE")
    hashes = [digest for artifact in spec.artifacts for digest in artifact.files.values()]
    if not any(isinstance(row, dict) and row.get("sha256") in hashes for row in rows):
        raise UsageError(
            f"'{path}' has no figures of these artifacts. Measure them with: ssod-edge bench DIR --json FILE"
        )
    return content


def _readme(spec: Spec, record: bytes | None, name: str) -> str:
    """What the bundle is, and the three commands that put it to work."""
    folder = name.removesuffix(".tar")
    held = ", ".join(f"{a.name} ({_threshold_text(a)})" for a in spec.artifacts)
    flag = "" if spec.trained else " --allow-untrained"
    lines = [
        f"# {spec.backbone}: {len(spec.classes)} classes at {spec.preprocess.input_size} px, score {spec.score_name}",
        "",
        "An ssod-edge model for a device. It needs no PyTorch there. The wheel is what `make wheel` makes in a clone",
        "of ssod-edge, whose docs/install.md and docs/jetson.md tell more:",
        "",
        "    pip install 'ssod_edge-VERSION-py3-none-any.whl[openvino]'    # or [onnx]; on a Jetson [jetson]",
        f"    ssod-edge export --from {name} --target openvino    # or onnx, or tensorrt on a Jetson",
        f"    ssod-edge predict {folder} photo.jpg{flag}",
        "",
        f"Inside: {held}; `{REFERENCE_NAME}`, with which every artifact that is made on the device is compared.",
        "The weights were not trained: the verdicts mean nothing." if not spec.trained else "",
    ]
    rows = _timings(record)
    if rows:
        lines += [f"Measured with `ssod-edge bench` ({BENCH_NAME}):", "", *rows, ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _threshold_text(artifact: Artifact) -> str:
    threshold = artifact.threshold
    if threshold is None:
        return "no threshold"
    return f"known up to {threshold.value:.4f}, which keeps {threshold.target_tpr:.0%} of {threshold.n} images"


def _timings(record: bytes | None) -> list[str]:
    """A Markdown table of a record's latencies, end to end at its batch size."""
    rows = []
    for row in parse_json(record)["rows"] if record else ():
        latency = row.get("latency_ms") if isinstance(row, dict) else None
        if isinstance(latency, dict) and isinstance(latency.get("p50"), (int, float)):
            ran = f"{row.get('engine')} in {row.get('precision')} on {row.get('device')}, batch {row.get('batch')}"
            rows.append(f"| {row.get('artifact')} | {ran} | {latency['p50']:.2f} |")
    if not rows:
        return []
    return ["| artifact | ran as | median ms |", "|---|---|---|", *rows]


def _hash(content: Content) -> str:
    return sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)


def _write_tar(path: Path, contents: Mapping[str, Content]) -> None:
    """Sorted by name. A new TarInfo says nothing of time, user and machine."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(contents):
            content, member = contents[name], tarfile.TarInfo(name)
            with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
                member.size = file.seek(0, os.SEEK_END)
                file.seek(0)
                archive.addfile(member, file)


def _check_name(name: str, bundle: Path) -> None:
    """Raises ArtifactError unless it is the plain relative name of a file, in at most one folder."""
    parts = PurePosixPath(name).parts
    if not 1 <= len(parts) <= 2 or "/".join(parts) != name or set(parts) & {"..", "/"} or not name.isprintable():
        raise _damaged(bundle, f"{name!r} is no name of a file inside it")


def _extract(archive: tarfile.TarFile, folder: Path, bundle: Path) -> set[str]:
    """Write the members of an archive below a folder; returns their names."""
    names: set[str] = set()
    for member in archive:
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise _damaged(bundle, f"{member.name!r} is not a plain file")
        _check_name(member.name, bundle)
        if len(names) == MAX_FILES:
            raise _damaged(bundle, f"it holds more than {MAX_FILES} files")
        if member.name in (SPEC_NAME, SUMS_NAME) and member.size > MAX_TEXT_BYTES:
            raise _damaged(bundle, f"its {member.name} has {member.size} bytes, at most {MAX_TEXT_BYTES} are read")
        source = archive.extractfile(member)
        assert source is not None  # a plain file
        try:
            (folder / member.name).parent.mkdir(exist_ok=True)
            with open(folder / member.name, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        except (FileExistsError, NotADirectoryError):
            raise _damaged(bundle, f"it holds '{member.name}' twice") from None
        names.add(member.name)
    return names


def _check_sums(folder: Path, names: set[str], bundle: Path) -> None:
    """Raises ArtifactError unless `SUMS_NAME` lists exactly the other files, with their hashes."""
    text = (folder / SUMS_NAME).read_text(encoding="utf-8", errors="replace")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    differing = sorted(sums.keys() ^ (names - {SUMS_NAME}))
    if differing:
        raise _damaged(bundle, f"it does not hold the files that its {SUMS_NAME} lists: '{differing[0]}'")
    for name, expected in sums.items():
        found = sha256_file(folder / name)
        if found != expected:
            raise _damaged(bundle, f"its '{name}' has SHA-256 {found[:12]}... instead of {expected[:12]}...")


def _check_hashes(folder: Path, spec: Spec) -> None:
    """Raises ArtifactError unless all files of an export are there, and those that its spec describes."""
    for name, digest in spec.shared_files.items():
        check_hash(folder / name, digest)
    for artifact in spec.artifacts:
        check_files(folder, artifact)


def _damaged(bundle: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the bundle '{bundle}' is refused: {reason}. Copy it again, or package the export again")
