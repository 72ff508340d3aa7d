"""`predict` over very many images in .tar files: images a second, memory, and a run that is killed and goes on.

python -m ssod_edge.bench.tools.million EXPORT PHOTOS --images 1000000 --json bench/results/million.json
"""

from __future__ import annotations

import csv
import io
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import click

from ssod_edge.bench.tools.command import Tool, json_option, write_rows
from ssod_edge.data.sources import open_dataset
from ssod_edge.errors import UsageError, VerificationError
from ssod_edge.files import temporary_folder

#: Images in a .tar file.
SHARD = 10_000


def pack(photos: str, folder: Path, count: int) -> None:
    """Pack the files of a data set again and again, each time under other names.

    Raises:
        UsageError: they are no files.
    """
    source = open_dataset(photos, labelled=False)
    found = [source.picture(index).content for index in range(min(len(source), SHARD))]
    contents = [content for content in found if isinstance(content, bytes)]
    if not contents:
        raise UsageError(f"'{photos}' holds no image files")
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:04d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, count)):
                content = contents[number % len(contents)]
                member = tarfile.TarInfo(f"camera/{number:08d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def memory_mb(process: subprocess.Popen[bytes]) -> float:
    """Resident memory; 0 of a process that has ended."""
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 1e6


def watch(command: list[str], table: Path, kill_at: int | None) -> dict[str, Any]:
    """Run a command, and look at its memory every half second; kill it once its table has so many bytes."""
    began, memory = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.5)
            memory.append(memory_mb(process))
            if kill_at is not None and table.exists() and table.stat().st_size >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
    memory = [value for value in memory if value]
    tenth = max(1, len(memory) // 10)
    return {
        "exit_code": process.returncode,
        "seconds": time.perf_counter() - began,
        "memory_early_mb": sorted(memory[tenth : 2 * tenth])[tenth // 2] if len(memory) > tenth else None,
        "memory_last_mb": sorted(memory[-tenth:])[tenth // 2] if memory else None,
        "memory_most_mb": max(memory, default=None),
    }


def names_of(table: Path) -> list[str]:
    """The images that a table has rows of."""
    with open(table, encoding="utf-8-sig", newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


@click.command(cls=Tool)
@click.argument("export")
@click.argument("photos")
@click.option("--images", default=1_000_000, show_default=True)
@click.option("--batch", default=8, show_default=True)
@json_option
def main(export: str, photos: str, images: int, batch: int, json_file: Path | None) -> None:
    """Judge images in .tar files, kill it at about a third, and go on."""
    with temporary_folder() as place:
        folder = Path(place)
        pack(photos, folder, images)
        table = folder / "verdicts.csv"
        command = [sys.executable, "-m", "ssod_edge", "predict", export, *sorted(map(str, folder.glob("*.tar")))]
        command += ["--csv", str(table), "--resume", "--batch", str(batch)]
        rows = [{"what": "killed", **watch(command, table, kill_at=images * 150 // 3)}]
        done = table.read_bytes().count(b"\n") - 1
        rows[0] |= {"images": done, "per_s": done / rows[0]["seconds"]}
        rows.append({"what": "gone on", **watch(command, table, kill_at=None)})
        rows[1] |= {"images": images - done, "per_s": (images - done) / rows[1]["seconds"]}
        found = names_of(table)
        rows.append({"what": "again", **watch(command, table, kill_at=None), "images": 0})
        for row in rows:
            click.echo(str(row))
        missing, twice = images - len(set(found)), len(found) - len(set(found))
    write_rows(json_file, "million", rows, images=images, batch=batch, missing=missing, twice=twice)
    if missing or twice:
        raise VerificationError(f"{missing} images have no row, and {twice} rows are there twice")


if __name__ == "__main__":
    main()
