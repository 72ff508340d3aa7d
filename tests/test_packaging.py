"""Wheel, sdist and editable install, each built and imported for real, with nothing but `ssod_edge` on top."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from places import ROOT

import ssod_edge
from ssod_edge.doctor import DISTRIBUTIONS
from ssod_edge.errors import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCAL = ("build", "dist", "runs", "__pycache__", "*.egg-info", "*.so", ".*")

pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools>=77; install the extra 'dev'")


def run_build(kind: str, source: Path, out: Path, kernel: str, torch: bool = True) -> subprocess.CompletedProcess[str]:
    """Call setuptools' own build hook (`wheel` or `sdist`): no network, no isolated environment.

    Args:
        kernel: SSOD_EDGE_EXT.
        torch: False hides PyTorch from the build, as an isolated one does.
    """
    out.mkdir(exist_ok=True)
    hide = "" if torch else "import sys; sys.modules['torch'] = None; "
    code = f"{hide}import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    environment = {**os.environ, "SSOD_EDGE_EXT": kernel}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)


def build(kind: str, source: Path, out: Path, kernel: str = "none") -> Path:
    done = run_build(kind, source, out, kernel, torch=kernel != "none")
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, without what is only on this machine."""
    copy = tmp_path_factory.mktemp("source") / "ssod-edge"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LOCAL))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build("wheel", source, source.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    return build("sdist", source, source.parent / "sdist")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not its (editable) ssod-edge; returns its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A .pth file adds a folder without running the .pth files in it, and those are what makes an install editable.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def install(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "SSOD_EDGE_EXT": "none"}
    done = subprocess.run([*command, *what], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: What a device has; their requirements come with them. No torch, and nothing that makes an ONNX graph.
ON_A_DEVICE = ("numpy", "Pillow", "click", "rich", "onnxruntime", "openvino", "opencv-python-headless")


def device(folder: Path) -> Path:
    """A virtual environment with the packages of `ON_A_DEVICE` alone, borrowed from this one; returns its Python."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    pending, done = list(ON_A_DEVICE), set[str]()
    while pending:
        name = canonicalize_name(pending.pop())
        if name in done:
            continue
        done.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            assert name not in map(canonicalize_name, ON_A_DEVICE), f"needs {name}"
            continue  # a requirement that this release of its parent does without
        wanted = (Requirement(line) for line in package.requires or ())
        pending += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "bin" / "python"


def python310(folder: Path) -> Path:
    """A virtual environment of JetPack 6's Python, which sees the packages that are installed for it."""
    named = os.environ.get("SSOD_EDGE_PYTHON310") or shutil.which("python3.10")
    if named is None:
        pytest.skip("needs Python 3.10 as python3.10, or named by SSOD_EDGE_PYTHON310")
    imports = (
        "import sys; assert sys.version_info[:2] == (3, 10); import numpy, PIL, click, rich, onnxruntime, openvino, cv2"
    )
    found = subprocess.run([named, "-c", imports], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"{named} lacks what a device has ({', '.join(ON_A_DEVICE)}): {found.stderr.strip()[-100:]}")
    subprocess.run([named, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)], check=True)
    inner = subprocess.run([named, "-c", "import numpy; print(numpy.__path__[0])"], capture_output=True, text=True)
    (folder / "lib" / "python3.10" / "site-packages" / "borrowed.pth").write_text(f"{Path(inner.stdout).parent}\n")
    return folder / "bin" / "python"


def origins(python: Path, folder: Path) -> dict[str, Path]:
    """Import the package and its parts in a neutral folder; module -> where it came from."""
    code = (
        "import ssod_edge.cli, ssod_edge.runtime, importlib.util, sys\n"
        "for name in ('ssod_edge', 'ssod_edge.runtime', 'ssod_edge.export', 'ssod_edge.bench'):\n"
        "    print(name, importlib.util.find_spec(name).origin)\n"
    )
    done = subprocess.run([str(python), "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Path(origin) for name, origin in (line.split(" ", 1) for line in done.stdout.splitlines())}


def check_command(python: Path) -> None:
    script = python.with_name("ssod-edge")
    shown = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"ssod-edge {ssod_edge.__version__}\n"


def test_wheel_has_one_top_level_name_and_every_module(source: Path, wheel: Path) -> None:
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names} == {"ssod_edge"}
    expected = {str(path.relative_to(source)) for path in (source / "ssod_edge").rglob("*.py")}
    for folder in ("export", "bench"):
        expected |= {f"ssod_edge/{path.relative_to(source)}" for path in (source / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


def test_wheel_carries_data_files(source: Path, wheel: Path) -> None:
    expected = {"ssod_edge/py.typed"}
    for name, inside in (("ssod_edge", "."), ("export", "ssod_edge"), ("bench", "ssod_edge")):
        for path in (source / name).rglob("*"):
            if path.is_file() and path.suffix != ".py" and not path.is_relative_to(source / "bench" / "results"):
                expected.add((Path(inside) / path.relative_to(source)).as_posix())
    assert {name for name in names_in(wheel) if not name.endswith(".py")} == expected


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(folder).decode())
    assert metadata["Version"] == ssod_edge.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in base) == ["Pillow", "click", "numpy", "rich", "simplejpeg"]
    # every command that an error message names installs what it says
    assert set(EXTRAS.values()) <= set(metadata.get_all("Provides-Extra"))
    for module, extra in EXTRAS.items():
        package = DISTRIBUTIONS.get(module, module)
        lines = [line for line in metadata.get_all("Requires-Dist") if line.endswith(f'extra == "{extra}"')]
        assert any(line.startswith(package) for line in lines), f"extra '{extra}' does not bring {package}"


def test_torch_is_not_needed_to_build() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert not [requirement for requirement in requires if requirement.startswith("torch")]


@pytest.mark.slow
def test_one_wheel_with_the_kernel_serves_every_python(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    wheel = build("wheel", copy, tmp_path, "cpu")
    assert wheel.name.startswith(f"ssod_edge-{ssod_edge.__version__}-cp310-abi3-")
    assert [name for name in names_in(wheel) if name.endswith(".so")] == ["ssod_edge/_kernels.so"]
    python = environment(tmp_path / "venv")
    install(python, str(wheel))
    code = "from ssod_edge.ops import kernel_in_use; print(kernel_in_use('cpu'))"
    shown = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "compiled\n"


@pytest.mark.parametrize(
    ("kernel", "code", "message"),
    [
        ("auto", 0, "note: the kernel is not built: torch is not here"),
        ("cpu", 1, "error: SSOD_EDGE_EXT=cpu: torch is not here; install it, then use pip's --no-build-isolation"),
        ("yes", 1, "error: SSOD_EDGE_EXT must be none, auto, cpu or cuda, got 'yes'"),
    ],
)
def test_a_kernel_that_cannot_be_built_is_explained(
    source: Path, tmp_path: Path, kernel: str, code: int, message: str
) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    done = run_build("wheel", copy, tmp_path, kernel, torch=False)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = tmp_path.iterdir()
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "docs/install.md",
        "examples/cpp/main.cpp",
        "export/__init__.py",
        "kernels/patch_sample.cpp",
    ):
        assert (unpacked / name).is_file(), f"the sdist lacks {name}"
    assert names_in(build("wheel", unpacked, tmp_path / "wheel")) == names_in(wheel)


def test_sdist_leaves_records_pictures_and_tests_out_and_is_small(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = [Path(*Path(name).parts[1:]) for name in archive.getnames()]
    for folder in ("bench/results", "docs/images", "tests"):
        assert not [path for path in inside if path.is_relative_to(folder)]
    assert sdist.stat().st_size < 1_000_000


def test_the_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited and newest and cited[1] == newest[1] == ssod_edge.__version__
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"ssod_edge-(\d[\d.]*\d)-", page.read_text(encoding="utf-8")):
            assert name == ssod_edge.__version__, page


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, str(wheel))
    for name, origin in origins(python, tmp_path).items():
        assert origin.is_relative_to(tmp_path), f"{name} came from {origin}"
    check_command(python)
    # What commands print for a missing extra: pip reads its packages from what is installed, not from an index.
    hint = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-index",
        "--no-deps",
        "ssod-edge[video]",
    ]
    assert (
        "already satisfied: ssod-edge[video]" in subprocess.run(hint, capture_output=True, text=True, check=True).stdout
    )


def test_the_manual_installs_from_a_clone_or_a_wheel() -> None:
    """It is on no index yet: an extra by its name alone comes only after it is installed."""
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "pip install" in line]
    assert lines and all("'.[" in line for line in lines)


@pytest.mark.parametrize("environment", [device, python310], ids=["this Python", "Python 3.10"])
def test_a_device_without_torch_goes_from_bundle_to_verdict(
    wheel: Path,
    export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: Callable[[Path], Path],
) -> None:
    for name in ("onnxruntime", "openvino", "cv2"):
        pytest.importorskip(name, reason=f"needs {name}")
    python = environment(tmp_path / "venv")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, str(wheel)], check=True)
    Image.new("RGB", (30, 30), (220, 20, 20)).save("red.png")

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout or done.stderr

    script = str(python.with_name("ssod-edge"))
    for module in ("torch", "onnx", "timm", "nncf"):
        assert f"No module named '{module}'" in run("-c", f"import {module}", code=1)
    run(script, "package", "export", "-o", "model.tar")
    run(script, "export", "--from", "model.tar")
    names = [artifact["name"] for artifact in json.loads(Path("model/ssod.json").read_text())["artifacts"]]
    assert names == ["onnx-fp32", "onnx-fp16", "openvino-fp32", "openvino-fp16"]
    for engine in ("onnxruntime", "openvino"):
        verdict = json.loads(run(script, "predict", "model", "red.png", "--json", "--engine", engine))
        assert (verdict["class_name"], verdict["engine"], verdict["error"]) == ("red", engine, None)
    run("-c", "import cv2; w = cv2.VideoWriter('v.avi', cv2.VideoWriter_fourcc(*'FFV1'), 5, (30, 30)); "
        "[w.write(cv2.imread('red.png')) for _ in range(3)]")  # fmt: skip
    assert "3 frames in" in run(script, "predict", "model", "v.avi")


def test_editable_install_imports_from_the_sources(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "ssod-edge"
    shutil.copytree(source, copy)
    python = environment(tmp_path / "venv")
    install(python, "--editable", str(copy))
    found = origins(python, tmp_path)
    assert found["ssod_edge"] == copy / "ssod_edge" / "__init__.py"
    assert found["ssod_edge.export"] == copy / "export" / "__init__.py"
    assert found["ssod_edge.bench"] == copy / "bench" / "__init__.py"
    check_command(python)
