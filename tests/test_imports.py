"""Which module may import which, what loads without the optional packages, and how fast `--help` is."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssod_edge.cli import main
from ssod_edge.errors import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = {"ssod_edge": "ssod_edge", "export": "ssod_edge.export", "bench": "ssod_edge.bench"}

#: From the bottom up. A module imports from its own layer and those below it, never from above.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("ssod_edge.errors", "ssod_edge.files", "ssod_edge.external"),
    ("ssod_edge.config", "ssod_edge.progress"),
    (
        "ssod_edge.spec",
        "ssod_edge.image",
        "ssod_edge.scores",
        "ssod_edge.metrics",
        "ssod_edge.demo",
        "ssod_edge.detectors",
        "ssod_edge.image_lists",
        "ssod_edge.score_sum",
    ),
    ("ssod_edge.sources", "ssod_edge.splits", "ssod_edge.distributed", "ssod_edge.evaluation_report"),
    ("ssod_edge.evaluation_data",),
    ("ssod_edge.ops", "ssod_edge.outliers", "ssod_edge.runtime"),
    ("ssod_edge.model",),
    ("ssod_edge.baseline_recipes", "ssod_edge.baselines", "ssod_edge.pictures"),
    ("ssod_edge.data", "ssod_edge.checkpoint", "ssod_edge.objective", "ssod_edge.train", "ssod_edge.evaluate"),
    ("ssod_edge.explain",),
    ("ssod_edge.runtime.eager",),
    ("ssod_edge.export",),
    ("ssod_edge.study", "ssod_edge.protocols"),
    ("ssod_edge.bench",),
    ("ssod_edge.calibration", "ssod_edge.doctor", "ssod_edge.probe"),
    ("ssod_edge.cli",),
    ("ssod_edge.__main__",),
)
#: All that the runtime may know of the rest, because all of it goes onto a device.
RUNTIME_NEEDS = {f"ssod_edge.{name}" for name in ("errors", "files", "config", "spec", "image", "scores", "metrics")}
#: Lazy by design: names that hand on to a module above.
DOORS = {
    ("ssod_edge", "ssod_edge.runtime"),
    ("ssod_edge", "ssod_edge.runtime.predict"),
    ("ssod_edge.runtime", "ssod_edge.runtime.eager"),
}

#: Modules that need torch. Every other one loads without any optional package.
NEED_TORCH = {
    "ssod_edge.ops",
    "ssod_edge.outliers",
    "ssod_edge.objective",
    "ssod_edge.model",
    "ssod_edge.data",
    "ssod_edge.distributed",
    "ssod_edge.checkpoint",
    "ssod_edge.train",
    "ssod_edge.evaluate",
    "ssod_edge.study",
    "ssod_edge.protocols",
    "ssod_edge.baseline_recipes",
    "ssod_edge.baselines",
    "ssod_edge.explain",
    "ssod_edge.runtime.eager",
}

#: Of ssod_edge.export, what a device needs too, to make an engine's files from an ONNX graph.
EXPORT_ON_DEVICE = {
    "ssod_edge.export",
    *(f"ssod_edge.export.{name}" for name in ("bundle", "command", "deploy", "engines", "openvino")),
    *(f"ssod_edge.export.{name}" for name in ("staging", "tensorrt")),
}

#: Seconds. The product's limit is 0.3 on an idle pair of cores; a shared CI machine gets twice that,
#: and the measured figure is printed.
HELP_LIMIT_S = 0.6


def modules() -> dict[str, Path]:
    """Every module of the package -> its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def needs_torch(module: str) -> bool:
    if module in EXPORT_ON_DEVICE:
        return False
    return module in NEED_TORCH or module.startswith(("ssod_edge.export", "ssod_edge.bench"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST) -> set[str]:
    """Modules of ssod_edge that a syntax tree imports, in functions too; annotations' imports do not count."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            found |= {name if name in MODULES else str(child.module) for name in names}
        elif not is_type_checking(child):
            found |= imports(child)
    return {name for name in found if name.split(".")[0] == "ssod_edge"}


IMPORTS = {name: imports(ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def layer(module: str) -> int:
    """Index of a module's layer; the longest name that fits decides."""
    fits = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"{module} is in no layer: add it to LAYERS where it belongs"
    return max(fits)[1]


def test_the_search_sees_the_whole_package() -> None:
    assert {"ssod_edge", "ssod_edge.config", "ssod_edge.runtime", "ssod_edge.export", "ssod_edge.bench"} <= set(MODULES)
    assert "ssod_edge.errors" in IMPORTS["ssod_edge.config"]
    assert "ssod_edge.doctor" in IMPORTS["ssod_edge.cli"], "imports inside functions count"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"ssod_edge"}))
def test_imports_run_one_way(module: str) -> None:
    for imported in IMPORTS[module] - {"ssod_edge"}:
        if (module, imported) not in DOORS:
            assert layer(imported) <= layer(module), f"{module} imports {imported}, which is in a layer above it"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("ssod_edge.runtime")))
def test_runtime_needs_only_what_goes_onto_a_device(module: str) -> None:
    if module == "ssod_edge.runtime.eager":
        pytest.skip("the eager runner is PyTorch's, on the machine that trained")
    others = {name for name in IMPORTS[module] if not name.startswith("ssod_edge.runtime")}
    assert others <= RUNTIME_NEEDS


def test_package_itself_imports_nothing_but_its_doors() -> None:
    assert {("ssod_edge", name) for name in IMPORTS["ssod_edge"]} <= DOORS
    body = ast.parse(MODULES["ssod_edge"].read_text(encoding="utf-8")).body
    at_import = [node for node in body if not isinstance(node, ast.FunctionDef)]
    loaded = imports(ast.Module(at_import, []))
    assert loaded == set()


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circular imports: {' -> '.join((*path, module))}"
        if module in done or module not in IMPORTS:
            return
        for imported in IMPORTS[module]:
            if (module, imported) not in DOORS:
                visit(imported, (*path, module))
        done.add(module)

    for module in IMPORTS:
        visit(module, ())


BLOCKER = f"""
import sys
class Blocker:
    names = {sorted({*EXTRAS, "scipy", "nncf", "tensorrt", "pycuda"})!r}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def run_blocked(code: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python in a process where no optional package can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKER + code], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
    )


def test_blocker_blocks() -> None:
    assert "ModuleNotFoundError" in run_blocked("import torch").stderr
    assert "ModuleNotFoundError" in run_blocked("import openvino.opset13").stderr


def test_torch_free_modules_load_without_optional_packages() -> None:
    names = [name for name in MODULES if not needs_torch(name) and name != "ssod_edge.__main__"]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    loaded = run_blocked(code + "print('loaded')")
    assert loaded.stdout == "loaded\n", loaded.stderr


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_works_without_optional_packages(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    shown = run_blocked(f"from ssod_edge.cli import main\nmain({arguments!r}, prog_name='ssod-edge')")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Usage: ssod-edge")


def test_help_loads_nothing_heavy() -> None:
    heavy = {*EXTRAS, "numpy", "PIL", "rich"}
    code = "from ssod_edge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    assert run_blocked(code).stderr == "[]\n"


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ssod_edge", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\nssod-edge --help: median {statistics.median(times):.3f} s, min {min(times):.3f} s")
    assert statistics.median(times) < HELP_LIMIT_S


def test_settings_name_the_same_torch_modules() -> None:
    """mypy's relaxed modules and those outside the coverage gate are exactly the ones that need torch."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    relaxed = next(
        override["module"] for override in tool["mypy"]["overrides"] if "ssod_edge.ops" in override["module"]
    )
    assert set(relaxed) == NEED_TORCH | {"ssod_edge.export.*", "ssod_edge.bench.*"}
    omitted = {f"*/{name.replace('.', '/')}.py" for name in NEED_TORCH} | {"*/export/*", "*/bench/*"}
    assert set(tool["coverage"]["run"]["omit"]) == omitted
