"""A bare Debian in a folder, made once by debootstrap, and commands in it. For `make arm64` and `make container`.

Needs Linux and root. Mounts are made in a namespace of the command's own: they end with it, however it ends, and nobody
outside ever sees them. An Arm system runs on other processors by qemu-user.

DEBIAN_MIRROR names another mirror; SSOD_EDGE_ROOTS another folder than ~/.cache/ssod-edge.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BINFMT = Path("/proc/sys/fs/binfmt_misc")
#: Where Debian and Ubuntu say which interpreter runs an Arm program.
HANDLER = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: glibc of the oldest wheels that pip still knows, 2.17.
OLDEST_GLIBC = 17


class MissingError(Exception):
    """What this machine lacks, in one line."""


@dataclass(frozen=True)
class Mount:
    """A folder or file from outside, at `inside`; `outside` None is an empty one in memory."""

    outside: Path | None
    inside: str
    writable: bool = False


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SSOD_EDGE_ROOTS") or Path(base) / "ssod-edge").absolute()


def check_machine(arch: str) -> None:
    """Raises MissingError."""
    if os.geteuid() != 0:
        raise MissingError("it mounts and changes the root folder: run it as root (sudo make ...)")
    lacking = [tool for tool in ("debootstrap", "unshare", "chroot") if shutil.which(tool) is None]
    packages = ["debootstrap"] if lacking else []
    packages += [] if KEYRING.is_file() else ["debian-archive-keyring"]
    packages += ["qemu-user-static"] if arch == "arm64" and not (is_arm() or HANDLER.is_file()) else []
    if packages:
        raise MissingError(f"it needs, on Debian and Ubuntu: apt install {' '.join(packages)}")


def is_arm() -> bool:
    return os.uname().machine == "aarch64"


@contextmanager
def alone() -> Iterator[None]:
    """Waits for whoever uses the folders of `cache`: an installation must not change under another one's tests."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another one that uses {cache()}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def arm_programs() -> Iterator[None]:
    """Within it, the kernel runs Arm programs by qemu; what was not registered before is taken away again."""
    if is_arm() or any("aarch64" in path.name for path in BINFMT.glob("*")):
        yield
        return
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], check=True)
        if any("aarch64" in path.name for path in BINFMT.glob("*")):
            yield
            return
    line = next(line for line in HANDLER.read_text().splitlines() if line.startswith(":"))
    (BINFMT / "register").write_text(line)
    try:
        yield
    finally:
        (BINFMT / line.split(":")[1]).write_text("-1")


def make_root(arch: str, suite: str, packages: Sequence[str]) -> Path:
    """The folder of a minimal Debian, made where it is not there yet."""
    name = f"{suite}-{arch}"
    root, part, log = (cache() / f"{name}{end}" for end in ("", ".part", ".log"))
    stamp = f"{' '.join(sorted(packages))}\n"
    if root.is_dir() and (root / "made-with").read_text() == stamp:
        return root
    print(f"Making {root} (debootstrap, some minutes)", flush=True)
    for old in (root, part):
        if old.exists():
            shutil.rmtree(old)
    part.parent.mkdir(parents=True, exist_ok=True)
    command = ["debootstrap", f"--arch={arch}", "--variant=minbase", f"--keyring={KEYRING}", "--foreign"]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, f"--include={','.join(packages)}", suite, str(part), MIRROR],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode == 0:
            done = enter(part, ["/debootstrap/debootstrap", "--second-stage"], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise SystemExit(f"error: debootstrap failed, see {log}:\n{''.join(log.read_text().splitlines(True)[-3:])}")
    (part / "made-with").write_text(stamp)
    part.rename(root)
    return root


def enter(
    root: Path,
    command: Sequence[str],
    mounts: Sequence[Mount] = (),
    environment: Mapping[str, str] | None = None,
    cwd: str = "/",
    user: str = "0:0",
    read_only: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command in `root`, with /proc, /dev and an empty /tmp, and no other variables than these.

    Args:
        mounts: what else it sees.
        user: uid:gid in numbers.
        read_only: the root folder cannot be written.
        options: of subprocess.run.
    """
    quote = shlex.quote
    here = str(root)
    lines = [f"mount --bind {quote(here)} {quote(here)}"]
    points = [Mount(None, "/tmp"), *mounts]
    for mount in points:
        inside = quote(here + mount.inside)
        folder = mount.outside is None or mount.outside.is_dir()
        lines.append(f"mkdir -p {inside}" if folder else f"mkdir -p {quote(here)}; [ -e {inside} ] || touch {inside}")
    lines += [f"mount -t proc proc {quote(here)}/proc", f"mount --rbind /dev {quote(here)}/dev"]
    for mount in points:
        inside = quote(here + mount.inside)
        if mount.outside is None:
            lines.append(f"mount -t tmpfs -o mode=1777 tmpfs {inside}")
            continue
        lines.append(f"mount --bind {quote(str(mount.outside))} {inside}")
        lines += [] if mount.writable else [f"mount -o remount,bind,ro {inside}"]
    lines += [f"mount -o remount,bind,ro {quote(here)}"] if read_only else []
    variables = [f"{name}={value}" for name, value in {"PATH": PATH, "LANG": "C.UTF-8", **(environment or {})}.items()]
    inner = ["env", "-i", f"--chdir={cwd}", *variables, *command]
    # Not exec: the first process of a namespace ignores the signals that should end it, such as a crash's.
    lines += [f"chroot --userspec={user} {quote(here)} {shlex.join(inner)}", "exit $?"]
    private = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    script = "set -e\n" + "\n".join(lines)
    return subprocess.run([*private, "bash", "-c", script], text=True, check=False, **options)


def python_version(root: Path) -> str:
    """Such as 3.11, without running it."""
    return os.readlink(root / "usr/bin/python3").removeprefix("python")


def glibc_minor(root: Path) -> int:
    """36 of glibc 2.36."""
    found = re.search(r"^Package: libc6\n(?:.+\n)*?Version: 2\.(\d+)", (root / "var/lib/dpkg/status").read_text(), re.M)
    if found is None:
        raise SystemExit(f"error: {root} has no libc6; remove it, and it is made anew")
    return int(found[1])


def download(root: Path, arch: str, requirements: Sequence[str]) -> Path:
    """A folder with the wheels that pip would take in that Debian, got by this machine's pip with its settings."""
    version, machine = python_version(root), MACHINES[arch]
    folder = cache() / f"wheels-{machine}-{version}"
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc_minor(root), OLDEST_GLIBC - 1, -1)]
    options = [word for name in (*platforms, f"manylinux2014_{machine}") for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "-d", str(folder)]
    command += [*options, "--python-version", version, "--implementation", "cp", "--only-binary=:all:"]
    if subprocess.run([*command, *requirements], check=False).returncode != 0:
        raise SystemExit(f"error: there are not all wheels for {machine} and Python {version}, see above")
    return folder
