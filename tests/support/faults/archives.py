"""Hostile .tar files, as data sets and as bundles: nothing is written outside, no time or memory is lost."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from faults import damage, templates
from faults.damage import Rng, any_of
from faults.fault import Fault, about, below, call

#: Bytes that reading an archive may add to what the process takes; Python's and the engine's own are some of it.
MOST_MEMORY = 700 << 20
#: Bytes of a bomb when it is unpacked.
BOMB = 3 << 30


class Attempts:
    """A whole archive gets hostile members, and is read."""

    def __init__(self, folder: Path):
        self._export, self._work = templates.colours(folder), folder / "archives"
        photos = templates.colour_photos(folder)
        self._photos = {str(path.relative_to(photos)): path.read_bytes() for path in sorted(photos.rglob("*.png"))}
        with tarfile.open(templates.bundle(folder) / "bundle.tar") as bundle:
            self._bundle = {member.name: bundle.extractfile(member).read() for member in bundle}  # type: ignore[union-attr]
        call("predict", self._export, photos / "red", "--json")

    def attempt(self, rng: Rng) -> str:
        shutil.rmtree(self._work, ignore_errors=True)
        inside, outside = self._work / "inside", self._work / "outside"
        for path in (inside, outside):
            path.mkdir(parents=True)
        (outside / "secret.png").write_bytes(next(iter(self._photos.values())))
        kind = any_of(rng, ("data", "bundle"))
        content, how = _archive(rng, self._photos if kind == "data" else self._bundle, outside)
        path = inside / "x.tar"
        path.write_bytes(content)
        before = below(outside)
        command = ("calibrate", self._export, "--id", path, "--artifact", "onnx-fp32")
        if kind == "bundle":
            command = ("export", "--from", path, "-o", inside / "door", "--target", "onnx", "--fp32")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is taken now
        peak = _peak()
        with about(kind, how):
            end = call(*command).end()
            if below(outside) != before:
                raise Fault(f"files outside changed: {sorted(below(outside))}")
            if (grown := _peak() - peak) > MOST_MEMORY:
                raise Fault(f"it takes {grown >> 20} MB")
            left = [name for name in below(inside) if name != "x.tar" and not name.startswith("door/")]
            if left or any(p.is_symlink() for p in inside.rglob("*")):
                raise Fault(f"left over: {left}")
        return f"{kind} {end}"


def _peak() -> int:
    """Bytes that this process has held at once."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _archive(rng: Rng, files: dict[str, bytes], outside: Path) -> tuple[bytes, str]:
    """(the archive, what is hostile in it)."""
    out = io.BytesIO()
    names = list(files)
    where = int(rng.integers(len(names) + 1))
    hostile = any_of(rng, HOSTILE)
    with tarfile.open(fileobj=out, mode="w", format=any_of(rng, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for number, name in enumerate([*names, None]):
            if number == where:
                hostile(rng, tar, any_of(rng, names), outside)
            if name is not None:
                tar.addfile(_plain(name, len(files[name])), io.BytesIO(files[name]))
    content = out.getvalue()
    if rng.random() < 0.2:
        content = any_of(rng, (gzip.compress, bz2.compress, lzma.compress))(content)
    if rng.random() < 0.15:
        change = any_of(rng, damage.BYTES)
        return change(rng, content), f"{hostile.__name__}, {change.__name__}"
    if rng.random() < 0.05:
        return _compressed_bomb(content), "compressed bomb"
    return content, hostile.__name__


def _plain(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, to
    return member


Hostile = Callable[[Rng, tarfile.TarFile, str, Path], None]


def links(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    kind = any_of(rng, (tarfile.SYMTYPE, tarfile.LNKTYPE))
    to = any_of(rng, (str(outside / "secret.png"), "../outside/secret.png", "/etc/passwd", name, "..", "/", "", "red"))
    tar.addfile(_plain(any_of(rng, (name, "red/link.png", "link", "red/sub")), kind=kind, to=to))


def circles(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    for number in range(int(any_of(rng, (1, 2, 3000)))):
        to = f"{number + 1}.png" if rng.random() < 0.99 else "0.png"
        tar.addfile(_plain(f"red/{number}.png", kind=tarfile.SYMTYPE, to=to))


def devices(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    kind = any_of(rng, (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"Z", b"V", b"M"))
    tar.addfile(_plain(any_of(rng, (name, "red/device.png")), kind=kind))


def folders(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    tar.addfile(_plain(any_of(rng, (name, "red/folder.png", ".", "/", "..", "")), kind=tarfile.DIRTYPE))


def names_outside(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    places = (f"{outside}/new.png", "../outside/new.png", "red/../../outside/new.png", "/red/new.png", "..", "red/..",
              "./././red/./new.png", "red//new.png", "red/new.png/")  # fmt: skip
    tar.addfile(_plain(any_of(rng, places), 3), io.BytesIO(b"abc"))


def odd_names(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    odd = ("red/\udcff.png", "\udcff/a.png", "red/\x1b[31m.png", "red/a\nb.png", "red/" + "n" * 5000 + ".png",
           "/".join(["d"] * 3000) + "/a.png", "red/[bold].png", "red/\u202egnp.a", "CON/a.png", " /a.png")  # fmt: skip
    tar.addfile(_plain(any_of(rng, odd), 3), io.BytesIO(b"abc"))


def twice(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    for _ in range(int(any_of(rng, (1, 500)))):
        tar.addfile(_plain(name, 3), io.BytesIO(b"abc"))


def many(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    for number in range(20_000):
        tar.addfile(_plain(f"red/{number}.txt"))


def chained(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    """Thousands of headers that each belong to the next one."""
    kind = any_of(rng, (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE))
    content = b"20 path=red/long.png\n"[:21] if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE) else b"red/long.png\0"
    for _ in range(int(any_of(rng, (1, 100, 5000)))):
        tar.addfile(_plain("././@LongLink", len(content), kind), io.BytesIO(content))


def sizes(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    """A header that says another size than what follows."""
    member = _plain(any_of(rng, (name, "red/large.png", "ssod.json", "SHA256SUMS")))
    member.size = int(any_of(rng, (1, 511, 513, 1 << 20, 1 << 33, 1 << 40, (1 << 62) - 1)))
    tar.fileobj.write(member.tobuf(tar.format))  # type: ignore[union-attr]
    tar.offset += 512


def pax(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    """Extended headers with values that nobody should believe."""
    values = {
        "size": any_of(rng, ("-1", "99999999999999", "nan", "1e9", "")), "mtime": any_of(rng, ("nan", "1e400")),
        "path": any_of(rng, ("../outside/new.png", "/etc/new.png", "", "red/\0.png")), "uid": "-7",
        "linkpath": "/etc/passwd",
        "GNU.sparse.major": any_of(rng, ("1", "0")), "GNU.sparse.minor": any_of(rng, ("0", "1")),
        "GNU.sparse.realsize": any_of(rng, ("1099511627776", "-5")), "GNU.sparse.name": "red/sparse.png",
        "GNU.sparse.map": any_of(rng, ("0,1", "0,99999999999", "a,b", "1")), "hdrcharset": "BINARY",
    }  # fmt: skip
    chosen = {key: value for key, value in values.items() if rng.random() < 0.3}
    records = b""
    for key, value in chosen.items():
        text = f" {key}={value}\n".encode()
        length = len(text) + len(str(len(text) + 3))
        records += f"{length}".encode() + text
    kind = any_of(rng, (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE))
    tar.addfile(_plain("header", len(records), kind), io.BytesIO(records))
    tar.addfile(_plain("red/new.png", 600), io.BytesIO(b"1\n0\n1\n" + bytes(594)))


def sparse(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    """A file of a terabyte that takes a block."""
    member = bytearray(_plain("red/sparse.png", 512, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    for place, number in ((386, 0), (398, 512), (483, 1 << 33)):
        width = 12
        member[place : place + width] = (b"%011o" % number) + b"\0"
    member[148:156] = b" " * 8
    member[148:156] = b"%06o\0 " % sum(member)
    tar.fileobj.write(bytes(member) + bytes(512))  # type: ignore[union-attr]
    tar.offset += 1024


def nested(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        archive.addfile(_plain("red/a.png", 3), io.BytesIO(b"abc"))
    tar.addfile(_plain("red/inner.tar", len(inner.getvalue())), io.BytesIO(inner.getvalue()))


def zeros(rng: Rng, tar: tarfile.TarFile, name: str, outside: Path) -> None:
    """An end in the middle."""
    blocks = int(any_of(rng, (1, 2, 40)))
    tar.fileobj.write(bytes(512 * blocks))  # type: ignore[union-attr]
    tar.offset += 512 * blocks


HOSTILE: tuple[Hostile, ...] = (
    links, circles, devices, folders, names_outside, odd_names, twice, many, chained, sizes, pax, sparse, nested, zeros,
)  # fmt: skip


def _compressed_bomb(content: bytes) -> bytes:
    """The archive, compressed, with gigabytes of zeros as one member behind it."""
    end = content.rstrip(b"\0")
    whole = end + bytes(-len(end) % 512)
    zeros_of = gzip.compress(bytes(1 << 26), 1)  # the members of a .gz file follow one another
    return gzip.compress(whole + _plain("red/bomb.png", BOMB).tobuf()) + zeros_of * (BOMB >> 26)
