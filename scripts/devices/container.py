"""The Dockerfile's steps without Docker, in a bare Debian; then what a container does, in a read-only root folder.

make container

Needs Linux, root and debootstrap. The base image python:X.Y-slim-RELEASE is stood in for by the same release of Debian
with its own Python, which must be X.Y. Wheels come from this machine's pip, so that pip in there needs no network. It
reads the few instructions that the Dockerfile has, and refuses any other.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from debian_root import MissingError, Mount, alone, check_machine, download, enter, make_root, python_version
from trial import ROOT, StepError, Steps, checked, compare, here, make_material, make_wheel, released, verdicts

BUILD = ROOT / "build" / "container"
PACKAGES = ("python3", "python3-venv")
#: Asked of the finished container.
STATE = (
    "import importlib.util, json, os; print(json.dumps([os.getuid(), os.environ.get('HOME'), "
    "os.access('/', os.W_OK) or os.access('/opt', os.W_OK), importlib.util.find_spec('torch') is not None]))"
)


@dataclass
class Image:
    """What a Dockerfile makes."""

    base: str = ""
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    #: ("COPY", [source, ..., destination]) and ("RUN", [a line of the shell]), in their order
    steps: list[tuple[str, list[str]]] = field(default_factory=list)
    user: str = "0:0"
    folder: str = "/"
    entry: list[str] = field(default_factory=list)


def parse(text: str) -> Image:
    """Raises ValueError at an instruction that is not known here."""
    image = Image()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM" and not image.base:
            image.base = rest
        elif word == "ARG":
            image.arguments |= dict([rest.split("=", 1)])
        elif word == "ENV":
            for pair in shlex.split(rest):
                name, value = pair.split("=", 1)
                image.environment[name] = value
        elif word == "COPY" and not rest.startswith("-"):
            image.steps.append((word, rest.split()))
        elif word == "RUN":
            image.steps.append((word, [rest]))
        elif word == "USER":
            image.user = rest
        elif word == "WORKDIR":
            image.folder = rest
        elif word == "ENTRYPOINT":
            image.entry = json.loads(rest)
        elif word and word != "CMD":
            raise ValueError(f"the Dockerfile has '{line}', which is not understood here")
    return image


def base_of(image: Image) -> tuple[str, str]:
    """(Python, Debian's release) of python:3.13-slim-trixie."""
    found = re.fullmatch(r"python:(\d+\.\d+)-slim-(\w+)", image.base)
    if found is None:
        raise ValueError(f"the base is '{image.base}', expected python:X.Y-slim-RELEASE")
    return found[1], found[2]


def copy(root: Path, sources: list[str], destination: str) -> None:
    """COPY: a folder's content, or files into a folder."""
    target = root / destination.lstrip("/")
    for name in sources:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def build(image: Image, root: Path) -> str:
    """Carry out the steps in `root`, where a bare Debian is."""
    wheel = make_wheel(BUILD / "dist")
    wheels = download(root, "amd64", [f"{wheel}[{image.arguments['EXTRAS']}]", "setuptools>=77"])
    shell = {**image.arguments, **variables_of(image.environment)}
    shell |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "PIP_QUIET": "1"}
    for word, words in image.steps:
        if word == "COPY":
            copy(root, words[:-1], words[-1])
        else:
            command = ["sh", "-c", words[0]]
            checked(enter(root, command, [Mount(wheels, "/wheels")], shell, capture_output=True))
    size = sum(path.stat().st_size for path in (root / "opt").rglob("*") if path.is_file() and not path.is_symlink())
    return f"{len(image.steps)} steps, /opt holds {size / 1e6:.0f} MB"


class Container:
    """`docker run --read-only --tmpfs /tmp -v ...:/data -v ...:/material:ro`, without a home."""

    def __init__(self, image: Image, root: Path, writable: bool) -> None:
        self.image, self.root = image, root
        self.mounts = [Mount(BUILD / "data", "/data", writable), Mount(BUILD / "material", "/material")]

    def call(self, *command: object) -> str:
        variables = variables_of(self.image.environment)
        options = {"cwd": self.image.folder, "user": self.image.user, "read_only": True, "capture_output": True}
        return checked(enter(self.root, [str(word) for word in command], self.mounts, variables, **options))

    def run(self, *arguments: object) -> str:
        return self.call(*self.image.entry, *arguments)


def variables_of(environment: Mapping[str, str], path: str = "/usr/local/bin:/usr/bin:/bin") -> dict[str, str]:
    """ENV, with what it says of variables that were there."""
    known = {"PATH": path}
    for name, value in environment.items():
        known[name] = Template(value).substitute(known)
    return known


def go_through(steps: Steps, image: Image, root: Path) -> None:
    """From the bundle to verdicts, in the container and on this machine."""
    for name in ("here", "data"):
        (BUILD / name).mkdir()
    (BUILD / "data").chmod(0o777)
    desk, inside, sealed = here(BUILD / "here"), Container(image, root, True), Container(image, root, False)

    def both(*words: str) -> str:
        desk(*words)
        inside.run(*words)
        return released(BUILD / "data" / "door")

    def same() -> str:
        return compare(*(verdicts(run, "door", "../material/photos-seen", "openvino") for run in (desk, sealed.run)))

    steps("who and where", lambda: state(sealed))
    steps(
        "export --from", lambda: both("export", "--from", "../material/door.tar", "--target", "openvino", "-o", "door")
    )
    steps("calibrate", lambda: both("calibrate", "door", "--id", "../material/calib"))
    steps("predict, the model read-only too", same)


def state(container: Container) -> str:
    uid, home, writable, torch = json.loads(container.call("python", "-c", STATE))
    if uid == 0 or home is not None or writable or torch:
        raise StepError(f"uid {uid}, HOME {home}, root folder writable {writable}, torch there {torch}")
    return f"uid {uid}, no HOME, a root folder that cannot be written, no torch"


def main() -> int:
    image = parse((ROOT / "Dockerfile").read_text())
    try:
        check_machine("amd64")
    except MissingError as error:
        print(f"make container: {error}", file=sys.stderr)
        return 3
    with alone():
        return trial_of(image)


def trial_of(image: Image) -> int:
    python, suite = base_of(image)
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    bare, root = make_root("amd64", suite, PACKAGES), BUILD / "root"
    if python_version(bare) != python:
        print(f"make container: Debian {suite} has Python {python_version(bare)}, the base {python}", file=sys.stderr)
        return 1
    subprocess.run(["cp", "-a", str(bare), str(root)], check=True)
    make_material(BUILD / "material")
    steps = Steps()
    steps(f"the steps of the Dockerfile, in Debian {suite}", lambda: build(image, root))
    if not steps.failed:
        go_through(steps, image, root)
    print("\n".join(["", *steps.lines, "not run: docker itself, and its image of Python"]))
    return 1 if steps.failed else 0


if __name__ == "__main__":
    sys.exit(main())
