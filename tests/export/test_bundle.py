"""A bundle: what goes in, that it is the same every time, and that nothing but a whole one comes out."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from colour import edit_spec
from specs import with_hash

from ssod_edge.cli import main
from ssod_edge.errors import ArtifactError, OutputError, UsageError
from ssod_edge.export.bundle import MAX_FILES, SUMS_NAME, unpack, write_bundle
from ssod_edge.files import sha256_file
from ssod_edge.spec import Artifact, Spec, load_spec

MakeExport = Callable[..., Path]
NAMES = ["README.md", "SHA256SUMS", "model-fp16.onnx", "model-fp32.onnx", "reference.npz", "ssod.json"]


@pytest.fixture
def bundle(export: Path, tmp_path: Path) -> Path:
    write_bundle(export, tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def read(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def write(bundle: Path, contents: dict[str, bytes], sums: bool = True) -> Path:
    """A tar file of these contents, with hashes that fit."""
    if sums:
        rest = {name: content for name, content in contents.items() if name != SUMS_NAME}
        lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in rest.items())
        contents = {**rest, SUMS_NAME: "".join(lines).encode()}
    with tarfile.open(bundle, "w") as archive:
        for name, content in contents.items():
            add(archive, name, content)
    return bundle


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, to, len(content)
    archive.addfile(member, io.BytesIO(content))


def bench_record(export: Path) -> bytes:
    digest = sha256_file(export / "model-fp32.onnx")
    figures = {"engine": "onnxruntime", "precision": "fp32", "device": "CPU", "batch": 1}
    row = {"artifact": "onnx-fp32", "sha256": digest, "latency_ms": {"p50": 4.3078}, **figures}
    return json.dumps({"schema_version": 1, "rows": [row, {**row, "latency_ms": None, "status": "failed"}]}).encode()


# What goes in


def test_it_holds_the_graphs_the_spec_and_the_reference(export: Path, bundle: Path) -> None:
    contents = read(bundle)
    assert list(contents) == NAMES
    for name in ("model-fp16.onnx", "model-fp32.onnx", "reference.npz"):
        assert contents[name] == (export / name).read_bytes()
    spec, packed = load_spec(export), json.loads(contents["ssod.json"])
    assert [a["name"] for a in packed["artifacts"]] == ["onnx-fp32", "onnx-fp16"]
    assert [a["threshold"]["value"] for a in packed["artifacts"]] == [-2.0, -2.0]
    assert packed["classes"] == list(spec.classes) and packed["reference_sha256"] == spec.reference_sha256


def test_sha256sum_can_check_it(bundle: Path, empty: Path) -> None:
    with tarfile.open(bundle) as archive:
        archive.extractall(empty, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    checked = subprocess.run(["sha256sum", "--check", "--strict", SUMS_NAME], cwd=empty, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert [line.split(":")[0] for line in checked.stdout.splitlines()] == [n for n in NAMES if n != SUMS_NAME]


def test_the_same_export_gives_the_same_bytes(export: Path, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "export"
    shutil.copytree(export, copy, copy_function=shutil.copy)  # other times
    (copy / "model-fp32.onnx").chmod(0o600)
    write_bundle(copy.parent, copy / "bundle.tar")
    assert (copy / "bundle.tar").read_bytes() == bundle.read_bytes()
    with tarfile.open(bundle) as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_the_readme_names_three_commands_that_fit(bundle: Path) -> None:
    commands = [
        line.split("#")[0].split() for line in read(bundle)["README.md"].decode().splitlines() if line[:4] == "    "
    ]
    assert [command[:2] for command in commands] == [
        ["pip", "install"],
        ["ssod-edge", "export"],
        ["ssod-edge", "predict"],
    ]
    assert commands[1][2:] == ["--from", "bundle.tar", "--target", "openvino"] and commands[2][2] == "bundle"


def test_untrained_weights_travel_with_a_warning(make_export: MakeExport, tmp_path: Path) -> None:
    write_bundle(make_export(tmp_path / "untrained", trained=False), tmp_path / "b.tar")
    readme = read(tmp_path / "b.tar")["README.md"].decode()
    assert "mean nothing" in readme and "--allow-untrained" in readme and "no threshold" in readme


def test_a_bench_record_travels(export: Path, tmp_path: Path) -> None:
    record, lines = bench_record(export), list[str]()
    (export / "bench.json").write_bytes(record)
    write_bundle(export, tmp_path / "found.tar", say=lines.append)
    (export / "bench.json").rename(tmp_path / "mine.json")
    write_bundle(export, tmp_path / "given.tar", tmp_path / "mine.json")
    for name in ("found", "given"):
        contents = read(tmp_path / f"{name}.tar")
        assert contents["bench.json"] == record
        assert "| onnx-fp32 | onnxruntime in fp32 on CPU, batch 1 | 4.31 |" in contents["README.md"].decode()
    assert not lines


def test_a_bench_record_of_a_run_folder_is_found(export: Path, tmp_path: Path) -> None:
    (export.parent / "bench.json").write_bytes(bench_record(export))
    write_bundle(export.parent, tmp_path / "b.tar")
    assert "bench.json" in read(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"[]", "must be an object"),
        (b"{}", "not a bench record"),
        (b'{"rows": [{"sha256": []}]}', "no figures of these"),
        (b'{"rows": [{"sha256": "0"}, 1]}', "no figures of these"),
    ],
)
def test_a_record_of_something_else_is_refused_if_named(
    export: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (export / "bench.json").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        write_bundle(export, tmp_path / "b.tar", export / "bench.json")
    assert not (tmp_path / "b.tar").exists()
    lines: list[str] = []
    write_bundle(export, tmp_path / "b.tar", say=lines.append)
    assert len(lines) == 1 and message in lines[0] and "bench.json" not in read(tmp_path / "b.tar")


def with_int8_ir(export: Path) -> Artifact:
    """The export's fp16 IR under the name that an int8 one has."""
    shutil.copytree(export / "openvino-fp16", export / "openvino-int8")
    files = {
        f"openvino-int8/{name}": sha256_file(export / "openvino-int8" / name) for name in ("model.xml", "model.bin")
    }
    ir = replace(load_spec(export).artifact("openvino-fp16"), name="openvino-int8", precision="int8", files=files)
    edit_spec(export, lambda spec: spec.with_artifact(ir))
    return ir


def test_the_int8_ir_travels_because_a_device_cannot_make_it(export: Path, tmp_path: Path, empty: Path) -> None:
    ir, lines = with_int8_ir(export), list[str]()
    packed = write_bundle(export, tmp_path / "b.tar", say=lines.append)
    assert [a.name for a in packed.artifacts] == ["onnx-fp32", "onnx-fp16", "openvino-int8"] and not lines
    assert unpack(tmp_path / "b.tar", empty).artifact("openvino-int8") == ir
    assert sha256_file(empty / "openvino-int8" / "model.bin") == ir.files["openvino-int8/model.bin"]


def only(*names: str) -> Callable[[Spec], Spec]:
    return lambda spec: replace(spec, artifacts=tuple(spec.artifact(name) for name in names))


def test_a_precision_without_a_graph_is_left_out_with_the_fix(export: Path, tmp_path: Path) -> None:
    edit_spec(export, only("onnx-fp32", "openvino-fp32", "openvino-fp16"))
    lines: list[str] = []
    write_bundle(export, tmp_path / "b.tar", say=lines.append)
    assert len(lines) == 1 and "left out openvino-fp16" in lines[0] and "export RUN --target onnx --fp16" in lines[0]


def test_an_export_without_any_graph_is_refused_with_the_fix(export: Path, tmp_path: Path) -> None:
    edit_spec(export, only("openvino-fp32"))
    with pytest.raises(UsageError, match="openvino-fp32. Add it with: ssod-edge export RUN --target onnx"):
        write_bundle(export, tmp_path / "b.tar")


@pytest.mark.parametrize("name", ["model-fp16.onnx", "reference.npz"])
def test_a_damaged_export_is_not_packed(export: Path, bundle: Path, name: str) -> None:
    before = bundle.read_bytes()
    (export / name).write_bytes((export / name).read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="changed or cut short"):
        write_bundle(export, bundle)
    (export / name).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        write_bundle(export, bundle)
    assert bundle.read_bytes() == before and sorted(p.name for p in bundle.parent.iterdir()) == ["bundle.tar", "export"]


# What comes out


def test_a_whole_bundle_gives_its_spec_and_files(export: Path, bundle: Path, empty: Path) -> None:
    spec = unpack(bundle, empty)
    assert spec == replace(load_spec(export), artifacts=spec.artifacts)
    assert [a.name for a in spec.artifacts] == ["onnx-fp32", "onnx-fp16"]
    assert sorted(path.name for path in empty.iterdir()) == NAMES


def test_every_single_bit_counts(bundle: Path, empty: Path, tmp_path: Path) -> None:
    """A changed byte in any member is found, also in the spec's digits, where it would still be JSON."""
    with tarfile.open(bundle) as archive:
        middles = {m.name: m.offset_data + m.size // 2 for m in archive}
    content = bundle.read_bytes()
    assert content.count(b'"value": -2.0') == 2
    edits = {name: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for name, at in middles.items()}
    edits["threshold"] = content.replace(b'"value": -2.0', b'"value": -1.0')
    for name, edited in edits.items():
        folder = tmp_path / f"out-{name}"
        folder.mkdir()
        (tmp_path / "edited.tar").write_bytes(edited)
        with pytest.raises(ArtifactError, match=r"edited\.tar' is refused"):
            unpack(tmp_path / "edited.tar", folder)


def test_a_bundle_cut_short_anywhere_is_refused(bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    with tarfile.open(bundle) as archive:
        ends = [m.offset_data + m.size for m in archive]
    for number, length in enumerate([0, 1, 511, 512, *(end - 1 for end in ends), ends[2], ends[-2]]):
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        (tmp_path / "cut.tar").write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="Copy it again"):
            unpack(tmp_path / "cut.tar", folder)


@pytest.mark.parametrize(
    ("name", "kind", "to"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("/tmp/outside", tarfile.REGTYPE, ""),
        ("a/../../outside", tarfile.REGTYPE, ""),
        ("a/b/c", tarfile.REGTYPE, ""),
        ("./model.onnx", tarfile.REGTYPE, ""),
        ("two\nlines", tarfile.REGTYPE, ""),
        ("ssod.json", tarfile.REGTYPE, ""),  # a second one
        ("ssod.json/x", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("link", tarfile.LNKTYPE, "ssod.json"),
        ("folder", tarfile.DIRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("device", tarfile.CHRTYPE, ""),
        ("holes", tarfile.GNUTYPE_SPARSE, ""),
    ],
)
def test_only_plain_files_inside_are_unpacked(bundle: Path, empty: Path, name: str, kind: bytes, to: str) -> None:
    around = {path for path in bundle.parent.rglob("*") if empty not in path.parents}
    with tarfile.open(bundle, "a") as archive:
        add(archive, name, b"", kind, to)
    with pytest.raises(ArtifactError, match="is refused"):
        unpack(bundle, empty)
    assert {path for path in bundle.parent.rglob("*") if empty not in path.parents} == around
    assert not any(path.is_symlink() for path in empty.rglob("*"))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_that_each_belong_to_the_next_one_are_damage(bundle: Path, empty: Path, kind: bytes) -> None:
    with tarfile.open(bundle, "a") as archive:
        for _ in range(3000):
            add(archive, "header", b"11 path=ab\n", kind)
        add(archive, "model.onnx")
    with pytest.raises(ArtifactError, match="is refused: it is no bundle, or is cut short"):
        unpack(bundle, empty)


def test_a_file_beside_those_listed_is_refused(bundle: Path, empty: Path) -> None:
    with tarfile.open(bundle, "a") as archive:
        add(archive, "extra.bin", b"x")
    with pytest.raises(ArtifactError, match="extra.bin"):
        unpack(bundle, empty)


@pytest.mark.parametrize("name", ["SHA256SUMS", "ssod.json", "reference.npz", "model-fp16.onnx"])
def test_a_bundle_without_one_of_its_files_is_refused(bundle: Path, empty: Path, name: str) -> None:
    contents = read(bundle)
    del contents[name]
    write(bundle, contents, sums=name != "SHA256SUMS")
    with pytest.raises(ArtifactError, match=name):
        unpack(bundle, empty)


def test_a_spec_that_names_files_outside_is_refused(bundle: Path, empty: Path, tmp_path: Path) -> None:
    contents = read(bundle)
    (tmp_path / "model.onnx").write_bytes(contents["model-fp32.onnx"])
    contents["ssod.json"] = with_hash(
        json.loads(contents["ssod.json"].replace(b'"model-fp32.onnx"', b'"../model.onnx"'))
    )
    write(bundle, contents)
    with pytest.raises(ArtifactError, match="outside its folder"):
        unpack(bundle, empty)


def test_a_bundle_of_a_newer_release_says_so(bundle: Path, empty: Path) -> None:
    contents = read(bundle)
    spec = json.loads(contents["ssod.json"])
    contents["ssod.json"] = json.dumps({**spec, "schema_version": 99}).encode()
    write(bundle, contents)
    with pytest.raises(ArtifactError, match="Install a newer one"):
        unpack(bundle, empty)


def test_too_many_files_are_refused(empty: Path, tmp_path: Path) -> None:
    write(tmp_path / "b.tar", {f"{number}": b"" for number in range(MAX_FILES + 1)})
    with pytest.raises(ArtifactError, match=f"more than {MAX_FILES} files"):
        unpack(tmp_path / "b.tar", empty)


def test_what_is_no_bundle_is_refused(empty: Path, export: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist. Make one with: ssod-edge package"):
        unpack(tmp_path / "nowhere.tar", empty)
    with pytest.raises(UsageError, match="is not a file"):
        unpack(export, empty)
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as archive:
        archive.add(bundle, "bundle.tar")
    for path in (export / "ssod.json", export / "reference.npz", tmp_path / "packed.tar.gz"):
        with pytest.raises(ArtifactError, match="no bundle, or is cut short"):
            unpack(path, empty)


def test_too_little_space_is_said_before_the_work(bundle: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(empty)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=bundle.stat().st_size - 1))
    with pytest.raises(OutputError, match="Free some space"):
        unpack(bundle, empty)
    assert not list(empty.iterdir())


# The command


def test_the_command(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["package", str(export)])
    assert done.exit_code == 0 and "packed onnx-fp32, onnx-fp16 into bundle.tar" in done.stderr
    assert f"classes: {', '.join(load_spec(export).classes)}" in done.stderr
    assert list(read(tmp_path / "bundle.tar")) == NAMES


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}/nowhere"], 2, "Give the folder of a run or an export"),
        (["{}/export", "-o", "{}/export"], 2, "it is a folder"),
        (["{}/export", "-o", "/proc/b.tar"], 1, "cannot write"),
        (["{}/export", "--bench", "{}/nowhere.json"], 2, "cannot be read as a bench record"),
    ],
)
def test_errors(export: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = CliRunner().invoke(main, ["package", *(argument.format(tmp_path) for argument in arguments)])
    assert (done.exit_code, message in done.stderr) == (code, True), done.stderr
