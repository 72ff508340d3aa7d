"""`make arm64` and `make container`, as far as that is quick: the Dockerfile, the choice of tests, the comparison."""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import arm64
import container
import debian_root
import pytest
import trial
from house import MODULES, needs_torch
from places import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IMAGE = container.parse(TEXT)


def test_the_image_is_of_a_user_without_rights_and_without_torch():
    uid, gid = map(int, IMAGE.user.split(":"))  # by number, as Kubernetes wants it for runAsNonRoot
    assert uid >= 1000 and gid >= 1000
    assert not {"train", "all", "int8", "onnx"} & set(IMAGE.arguments["EXTRAS"].split(","))
    assert "torch" not in TEXT.lower().replace("pytorch", "")
    assert container.base_of(IMAGE)[0] in ("3.10", "3.11", "3.12", "3.13")
    assert IMAGE.entry == ["ssod-edge"]
    assert IMAGE.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert all("--no-cache-dir" in line[0] for word, line in IMAGE.steps if word == "RUN" and "pip install" in line[0])


def ignored(name: str) -> bool:
    """By .dockerignore: the last line that fits decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/"):
            verdict = not line.startswith("!")
    return verdict


def test_what_the_image_copies_is_there_and_all_that_the_wheel_is_made_of():
    sources = [name for word, words in IMAGE.steps if word == "COPY" for name in words[:-1]]
    for name in sources:
        assert (ROOT / name).exists() and not ignored(name), name
    # setup.py's packages, what it and pyproject.toml read
    assert set(sources) == {"pyproject.toml", "setup.py", "README.md", "LICENSE", "ssod_edge", "export", "bench"}
    assert ignored(".venv") and ignored(".git") and ignored("runs") and ignored("bench/results")


def test_a_dockerfile_is_read():
    image = container.parse(
        "# one\nFROM python:3.13-slim-trixie\nARG A=1\nCOPY a b /c/\nRUN x \\\n    && y\n"
        'ENV PATH=/o:$PATH B="two words"\nUSER 7:8\nWORKDIR /w\nENTRYPOINT ["e"]\nCMD ["f"]\n'
    )
    assert image.steps == [("COPY", ["a", "b", "/c/"]), ("RUN", ["x && y"])]
    assert (image.arguments, image.user, image.folder, image.entry) == ({"A": "1"}, "7:8", "/w", ["e"])
    assert container.variables_of(image.environment, "/bin") == {"PATH": "/o:/bin", "B": "two words"}
    for line in ("VOLUME /data", "COPY --from=x a b", "FROM again"):
        with pytest.raises(ValueError, match="not understood here"):
            container.parse(f"FROM python:3.13-slim-trixie\n{line}\n")
    with pytest.raises(ValueError, match="expected python:X.Y-slim-RELEASE"):
        container.base_of(container.parse("FROM alpine"))


def imported(path: Path) -> set[str]:
    """Modules that a file imports when it is loaded, through `tests/support` too."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in tuple(found):
        if (ROOT / "tests" / "support" / f"{name}.py").is_file():
            found |= imported(ROOT / "tests" / "support" / f"{name}.py")
    return found


def test_the_tests_that_run_on_the_board_need_no_torch():
    for name in arm64.TESTS:
        path = ROOT / "tests" / name
        assert not (path.parent / "conftest.py").is_file() or path.parent.name == "tests", name
        names = imported(path)
        heavy = {m for m in names if m.split(".")[0] in ("torch", "timm", "nncf", "safetensors", "onnxscript")}
        assert not heavy | {m for m in names if m in MODULES and needs_torch(m)}, name


def test_a_board_looks_like_one(tmp_path):
    """What ONNX Runtime and OpenVINO read when they start."""
    mounts = {mount.inside: mount.outside for mount in arm64.board_files(tmp_path / "files", arm64.BOARDS["pi5"], 4)}
    words = "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n"
    assert mounts["/proc/cpuinfo"].read_text().count(words) == 4
    system = mounts["/sys"] / "devices" / "system" / "cpu"
    assert (system / "possible").read_text() == "0-3\n"
    assert (system / "cpu3/regs/identification/midr_el1").read_text() == "0x00000000414fd0b1\n"
    assert (system / "cpu3/topology/core_siblings").read_text() == "f\n"
    assert (system / "cpu3/topology/thread_siblings").read_text() == "8\n"


def verdict(**other: object) -> dict[str, object]:
    return {
        "image": "a.png",
        "class_name": "a",
        "known": True,
        "error": None,
        "ood_score": 2.0,
        "confidence": 0.9,
        **other,
    }


def test_verdicts_are_compared():
    assert trial.compare([verdict()], [verdict(ood_score=2.0002)]).startswith("1 images, 1 of them known")
    for other in (
        verdict(known=False),
        verdict(class_name="b"),
        verdict(error="no"),
        verdict(ood_score=2.01),
        verdict(confidence=float("nan")),
    ):
        with pytest.raises(trial.StepError):
            trial.compare([verdict()], [other])
    for few in ([], [verdict()]):
        with pytest.raises(trial.StepError):
            trial.compare(few, [])


def test_two_lessons_agree_or_do_not():
    """What an unknown image is taken for is no verdict."""
    ten = [verdict()] * 8 + [verdict(known=False)] * 2
    assert "10 of 10" in trial.agreement(ten, [*ten[:8], *[verdict(known=False, class_name="b")] * 2])
    assert "9 of 10" in trial.agreement(ten, [verdict(class_name="b"), *ten[1:]])
    with pytest.raises(trial.StepError, match="8 of 10"):
        trial.agreement(ten, [verdict(class_name="b"), verdict(known=False), *ten[2:]])


def test_a_step_that_fails_is_counted_and_the_next_one_runs(capsys):
    def fail() -> str:
        raise trial.StepError("exit code 4: ...\nthe end")

    steps = trial.Steps()
    steps("first", fail)
    steps("second", lambda: "fine")
    assert steps.failed == 1
    assert steps.lines == ["FAILED  first: exit code 4: ...", "ran     second: fine"]
    assert "the end" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["arm64", "container"])
def test_without_root_one_line_says_so(program, monkeypatch, capsys, tmp_path):
    module = {"arm64": arm64, "container": container}[program]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", [program])
    assert module.main() == 3
    assert "run it as root" in capsys.readouterr().err and not (tmp_path / "build").exists()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(debian_root.shutil, "which", lambda name: None)
    monkeypatch.setattr(debian_root, "KEYRING", tmp_path / "none")
    monkeypatch.setattr(debian_root, "HANDLER", tmp_path / "none")
    monkeypatch.setattr(debian_root, "is_arm", lambda: False)
    with pytest.raises(
        debian_root.MissingError, match="apt install debootstrap debian-archive-keyring qemu-user-static$"
    ):
        debian_root.check_machine("arm64")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_mounts_end_with_the_command_and_a_sealed_root_cannot_be_written(tmp_path):
    """In a root folder that borrows this machine's programs."""
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode != 0:
        pytest.skip("no namespaces here")
    root = tmp_path / "root"
    for name in ("proc", "dev"):
        (root / name).mkdir(parents=True)
    (tmp_path / "data").mkdir(mode=0o777)
    (tmp_path / "data").chmod(0o777)
    borrowed = []
    for name in ("usr", "bin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(os.readlink(Path("/", name)))
        elif Path("/", name).is_dir():
            borrowed.append(debian_root.Mount(Path("/", name), f"/{name}"))
    mounts = [*borrowed, debian_root.Mount(tmp_path / "data", "/data", writable=True)]
    script = "id -u; echo ${HOME-none}; touch /data/a /tmp/a; touch /b 2>/dev/null || echo sealed; kill -SEGV $$"
    done = debian_root.enter(
        root, ["sh", "-c", script], mounts, {}, user="65532:65532", read_only=True, capture_output=True
    )
    assert done.stdout.split() == ["65532", "none", "sealed"], done.stderr
    assert done.returncode == 128 + 11  # a crash ends it, although it is the only process there
    assert (tmp_path / "data" / "a").is_file() and not list((root / "usr").glob("*")) * (
        not (root / "usr").is_symlink()
    )
    assert str(root) not in Path("/proc/self/mountinfo").read_text()


def test_the_version_of_a_root_is_read_without_running_it(tmp_path):
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").symlink_to("python3.13")
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    status = "Package: libc-bin\nVersion: 2.1-1\n\nPackage: libc6\nStatus: install ok installed\nVersion: 2.41-12\n\n"
    (tmp_path / "var/lib/dpkg/status").write_text(status)
    assert debian_root.python_version(tmp_path) == "3.13" and debian_root.glibc_minor(tmp_path) == 41


def test_what_the_image_says_of_itself_is_read(monkeypatch):
    class Fake:
        def __init__(self, answer: list[object]) -> None:
            self.answer = answer

        def call(self, *command: object) -> str:
            return json.dumps(self.answer)

    assert container.state(Fake([65532, None, False, False])).startswith("uid 65532")
    for answer in ([0, None, False, False], [1, "/", False, False], [1, None, True, False], [1, None, False, True]):
        with pytest.raises(trial.StepError):
            container.state(Fake(answer))
