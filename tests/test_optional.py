"""Optional packages that are there, half there, or fail to load in whatever way: one reason and one fix."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from house import MODULES

from ssod_edge.cli import main
from ssod_edge.errors import EngineError, MissingExtraError, SsodEdgeError
from ssod_edge.optional import DISTRIBUTIONS, REPORTER, REPORTING, is_there, load, require
from ssod_edge.runtime.open import open_runner

AGAIN = "Install it again: pip install --force-reinstall --no-deps "


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are looked for in first, and no engine imported so far."""
    for module in [name for name in sys.modules if name.partition(".")[0] in ("openvino", "onnxruntime", "cv2")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path / "first")
    (tmp_path / "first").mkdir()
    return tmp_path / "first"


def write(place: Path, module: str, text: str | None) -> None:
    (place / module).mkdir()
    if text is not None:
        (place / module / "__init__.py").write_text(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise OSError('libcuda.so.1: cannot open shared object file')", "OSError: libcuda.so.1: cannot open"),
        ("raise RuntimeError('Could not determine home directory.\\nmore')", "home directory. Install"),
        ("raise ImportError('libgomp.so.1: no such file')", "loaded: libgomp.so.1: no such file"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("from . import gone", "cannot import name 'gone'"),
        ("x = (", "SyntaxError: "),
        ("raise KeyError", "KeyError: no message"),
    ],
)
@pytest.mark.parametrize("module", ["openvino", "onnxruntime", "cv2"])
def test_what_fails_to_load(place: Path, module: str, text: str, reason: str) -> None:
    write(place, module, text)
    assert is_there(module)
    with pytest.raises(EngineError) as caught:
        load(module)
    message = str(caught.value)
    assert message.startswith(f"'{module}' is installed and cannot be loaded: ") and reason in message
    assert message.endswith(AGAIN + DISTRIBUTIONS.get(module, module)) and "\n" not in message


def test_empty_folders_are_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves of a package in which something else has put a file."""
    (tmp_path / "nncf" / "quantization").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nncf", raising=False)
    assert not is_there("nncf")
    for module in ("nncf", "nncf.quantization"):
        with pytest.raises(MissingExtraError, match=r"an export needs .*'nncf'.*\[int8\].*Empty folders of it"):
            load(module, "an export")


def test_what_is_not_there() -> None:
    assert is_there("numpy") and not is_there("tensorrt_lean")
    with pytest.raises(MissingExtraError, match=r"teaching needs the package 'tensorrt'.*ssod-edge\[teach\]"):
        load("tensorrt", "teaching", "teach")
    with pytest.raises(MissingExtraError, match="the pycuda engine needs"):
        load("pycuda.driver")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_export_says_so(export: Path, place: Path, engine: str) -> None:
    write(place, engine, "raise RuntimeError('no home')")
    with pytest.raises(EngineError, match="RuntimeError: no home"):
        open_runner(export, engine=engine)
    shutil.rmtree(place / engine)


#: Modules of others that are imported where this package needs them at any rate, or that are no extra.
OWN_WAY = {
    *(f"ssod_edge.data.{name}" for name in ("jpeg", "tables", "readers", "stored")),
    "ssod_edge.bench.images",
}


def test_no_module_handles_a_failed_import_by_itself() -> None:
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            caught = ast.unparse(node.type).strip("()") if isinstance(node, ast.ExceptHandler) and node.type else ""
            if {"ImportError", "ModuleNotFoundError"} & set(caught.split(", ")):
                found.add(name)
    assert found <= OWN_WAY, found - OWN_WAY
    assert issubclass(MissingExtraError, SsodEdgeError)


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnx", "nncf", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    require(["numpy", "torch"], "export")
    with pytest.raises(MissingExtraError, match=r"export needs the package 'nncf'.*ssod-edge\[int8\]"):
        require(["numpy", "nncf", "nncf"], "export")
    with pytest.raises(MissingExtraError, match=r"'onnx', 'nncf', which are not installed.*'ssod-edge\[int8,onnx\]'"):
        require(["onnx", "nncf"], "export")
    result = CliRunner().invoke(main, ["export", "--int8", "--target", "openvino"])
    assert result.exit_code == 3
    assert "'onnx', 'openvino', 'nncf'" in result.stderr and "'ssod-edge[int8,onnx,openvino]'" in result.stderr


def test_packages_that_report_their_use_are_loaded_by_load_alone() -> None:
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if {module.partition(".")[0] for module in modules} & set(REPORTING):
                found.add(name)
    assert not found


def test_a_process_without_a_home_folder_has_openvino(export: Path) -> None:
    code = (
        "import pathlib\n"
        "def home(cls): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = classmethod(home)\n"
        "from ssod_edge.runtime.open import open_runner\n"
        f"with open_runner({str(export)!r}, engine='openvino') as runner: print(runner.engine)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "openvino\n", done.stderr


def test_a_program_that_has_imported_the_reporter_keeps_it() -> None:
    telemetry = pytest.importorskip("openvino_telemetry")
    load("openvino")
    assert sys.modules[REPORTER] is telemetry


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_no_engine_writes_into_the_home_folder(export: Path, tmp_path: Path, engine: str) -> None:
    code = (
        "from ssod_edge.runtime.open import open_runner\n"
        f"with open_runner({str(export)!r}, engine={engine!r}) as runner: print(runner.engine)\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    unset = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == f"{engine}\n", done.stderr
    assert not list(home.rglob("*"))


@pytest.mark.parametrize(
    "body", ["raise OSError('libfoo.so.1: not there')", "None.attribute", "from json import nothing"]
)
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("timm", ["train", "photos", "--weights", "none"]),
        ("torch", ["train", "photos", "--weights", "none"]),
        ("torchvision", ["train", "photos", "--weights", "none"]),
        ("simplejpeg", ["predict", "photos", "photo.jpg"]),
    ],
)
def test_whatever_imports_a_package_that_fails_it_is_named(
    tmp_path: Path, body: str, module: str, arguments: list[str]
) -> None:
    if module == "simplejpeg" and "import" in body:
        pytest.skip("Pillow decodes in its place")
    (tmp_path / "photos").mkdir()
    (tmp_path / f"{module}.py").write_text(body)
    code = "from ssod_edge.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert f"'{module}' is installed and cannot be loaded" in done.stderr and AGAIN + module in done.stderr
