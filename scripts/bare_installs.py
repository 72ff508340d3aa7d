"""Install what `make dist` made into bare environments, without PyTorch, and use it as a device does.

    .venv/bin/python scripts/bare_installs.py [3.10 3.13]

For each Python that is there (on the PATH, or of pyenv) and each wheel: install the base, `--help`, `doctor`, and
`predict`, which names what is missing; then, with the extra `openvino`, `export --from` a bundle and `predict`. Of the
sdist: install, and `--version`. What is installed comes from the index that pip is set to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")


def main() -> None:
    wheels, sdists = sorted((ROOT / "dist").glob("*.whl")), sorted((ROOT / "dist").glob("*.tar.gz"))
    if len(wheels) != 2 or len(sdists) != 1:
        raise SystemExit(f"expected two wheels and an sdist in '{ROOT / 'dist'}'; make them with: make dist")
    pythons = {version: find(version) for version in sys.argv[1:] or VERSIONS}
    if not any(pythons.values()):
        raise SystemExit(f"there is no Python {', '.join(pythons)}")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        bundle = make_bundle(place)
        for version, python in pythons.items():
            if python is None:
                print(f"Python {version}: not here", flush=True)
                continue
            for file in (*wheels, *sdists):
                began = time.monotonic()
                check(python, file, bundle, place)
                print(f"Python {version}: {file.name}: good, {time.monotonic() - began:.0f} s", flush=True)


def find(version: str) -> str | None:
    """The interpreter of a version, as a path; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    named = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))]
    return next((path for path in named if path and works(path)), None)


def works(python: str) -> bool:
    return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0


def make_bundle(place: Path) -> Path:
    """A bundle of the tests' classifier of colours, and a red picture."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from colour import write_export

    (place / "export").mkdir()
    write_export(place / "export")
    run([sys.executable, "-m", "ssod_edge", "package", "export", "-o", "model.tar"], place)
    Image.new("RGB", (60, 60), (220, 20, 20)).save(place / "red.png")
    return place / "model.tar"


def check(python: str, file: Path, bundle: Path, place: Path) -> None:
    """Raises SystemExit with what was said where something is not as a user expects."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        run([python, "-m", "venv", "venv"], folder)
        own, command = str(folder / "venv/bin/python"), str(folder / "venv/bin/ssod-edge")
        pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, str(file)], folder, SSOD_EDGE_EXT="none")
        version = file.name.split("-")[1].removesuffix(".tar.gz")
        expect(f"ssod-edge {version}\n", run([command, "--version"], folder))
        if file.suffix != ".whl":
            return
        expect("predict", run([command, "--help"], folder))
        expect("No engine can run an export here", run([command, "doctor"], folder, code=3))
        picture = str(place / "red.png")
        expect("pip install", run([command, "predict", str(place / "export"), picture], folder, code=3))
        run([*pip, f"{file}[openvino]"], folder)
        expect("No module named 'torch'", run([own, "-c", "import torch"], folder, code=1))
        run([command, "export", "--from", str(bundle), "-o", "model", "--target", "openvino"], folder)
        verdict = json.loads(run([command, "predict", "model", picture, "--json"], folder))
        if (verdict["class_name"], verdict["engine"], verdict["error"]) != ("red", "openvino", None):
            raise SystemExit(f"error: {file.name}: {verdict}")


def run(command: list[str], folder: Path, code: int = 0, **settings: str) -> str:
    """What a command prints, on both streams; it has to end with `code`."""
    environment = {**os.environ, **settings}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != code:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout if code == 0 else done.stdout + done.stderr


def expect(text: str, said: str) -> None:
    if text not in said:
        raise SystemExit(f"error: '{text}' is not in:\n{said}")


if __name__ == "__main__":
    main()
