"""What goes onto a device runs on Python 3.10, the Python of JetPack 6, with nothing but the base dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from house import MODULES, needs_torch
from places import ROOT

#: Tests that need no optional package.
TESTS = ("runtime/engines/test_tensorrt.py",)


@pytest.fixture(scope="module")
def python310() -> str:
    """An interpreter that has the base dependencies and pytest."""
    named = os.environ.get("SSOD_EDGE_PYTHON310") or shutil.which("python3.10")
    if named is None:
        pytest.skip("needs Python 3.10 as python3.10, or named by SSOD_EDGE_PYTHON310")
    code = "import sys, numpy, PIL, click, rich, pytest; assert sys.version_info[:2] == (3, 10)"
    found = subprocess.run([named, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"{named} lacks numpy, Pillow, click, rich or pytest: {found.stderr.strip()[-100:]}")
    return named


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python finds the package as it lies when it is installed."""
    package = tmp_path / "ssod_edge"
    package.mkdir()
    for path in (*(ROOT / "ssod_edge").iterdir(), ROOT / "export", ROOT / "bench"):
        (package / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}


def test_every_torch_free_module_loads(python310: str, installed: dict[str, str], tmp_path: Path) -> None:
    names = sorted(name for name in MODULES if not needs_torch(name) and name != "ssod_edge.__main__")
    assert "ssod_edge.export.engines.tensorrt" in names
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('loaded')"
    command = [python310, "-c", code]
    done = subprocess.run(command, env=installed, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "loaded\n", done.stderr


def test_the_runner_passes_its_tests(python310: str, installed: dict[str, str], tmp_path: Path) -> None:
    files = [str(ROOT / "tests" / name) for name in TESTS]
    command = [
        python310,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
        "--basetemp",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), *files],
        env=installed,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


if sys.version_info < (3, 11):
    pytest.skip("every test runs on Python 3.10 already", allow_module_level=True)
