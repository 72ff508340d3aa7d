"""Which module may import which, what loads without the optional packages, and how fast `--help` is."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time

import pytest
from house import MODULES, NEED_TORCH, needs_torch
from places import ROOT

from ssod_edge.cli import main
from ssod_edge.errors import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Rooms of the house, from the ground up: files and folders of the package. A module imports from its own room, from
#: those below it, and never from above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files", "json_reader", "external_data", "machine", "memory", "optional", "sources", "terminal"),
    ("csv_table", "names"),
    ("parquet_table",),
    ("config",),
    ("recipes", "spec"),
    ("data",),
    ("detect",),
    ("ops",),
    ("runtime",),
    ("serve", "ray"),
    ("training",),
    ("evaluation",),
    ("export",),
    ("teach",),
    ("studies",),
    ("bench",),
    ("probe",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: Lazy by design: names that hand on to a room above.
DOORS = {
    *(("ssod_edge", f"ssod_edge.{name}") for name in ("runtime.open", "runtime.predict", "training.loop")),
    ("ssod_edge", "ssod_edge.evaluation.evaluate"),
    ("ssod_edge.export", "ssod_edge.export.graph.build"),
    ("ssod_edge.runtime.open", "ssod_edge.training.eager"),
    ("ssod_edge.runtime.predict", "ssod_edge.teach.teach"),
}
#: Seconds. The product's limit is 0.3 on an idle pair of cores; a shared CI machine gets twice that,
#: and the measured figure is printed.
HELP_LIMIT_S = 0.6


def room(module: str) -> str:
    """The file or folder of the package that a module lies in."""
    return module.split(".")[1]


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


def test_the_search_sees_the_whole_package() -> None:
    assert {"ssod_edge", "ssod_edge.config", "ssod_edge.runtime", "ssod_edge.export", "ssod_edge.bench"} <= set(MODULES)
    assert "ssod_edge.errors" in IMPORTS["ssod_edge.config"]
    assert "ssod_edge.doctor" in IMPORTS["ssod_edge.cli.device"], "imports inside functions count"


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES if name != "ssod_edge"} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"ssod_edge"}))
def test_imports_run_one_way(module: str) -> None:
    for imported in IMPORTS[module] - {"ssod_edge"}:
        if (module, imported) not in DOORS:
            assert FLOOR[room(imported)] <= FLOOR[room(module)], f"{module} imports {imported}, which lies above it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module: str) -> None:
    """Of the kernels in C++ and CUDA, each is one operator with its parts, and longer."""
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 450, "a file that has two subjects is two files"
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60]
    assert not long, "a function fits on a screen"


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


def test_settings_name_the_same_rooms() -> None:
    """mypy's relaxed modules and those outside the coverage gate are exactly the rooms that need torch."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    relaxed = next(
        override["module"] for override in tool["mypy"]["overrides"] if "ssod_edge.ops" in override["module"]
    )
    files = {name: f"ssod_edge.{name}" in MODULES and MODULES[f"ssod_edge.{name}"].stem == name for name in NEED_TORCH}
    assert relaxed == [f"ssod_edge.{name}{'' if is_file else '.*'}" for name, is_file in files.items()]
    folders = [name.replace(".", "/") for name in NEED_TORCH if not files[name]]
    assert tool["coverage"]["run"]["omit"] == ["*/ssod_edge/ops.py", *(f"*/{folder}/*" for folder in folders)]
