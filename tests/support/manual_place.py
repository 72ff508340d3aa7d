"""A folder as the manual expects it, with small data, in which the commands of a page are run in their order.

They run in this process, so that PyTorch is imported once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from lesson import SIZE, write_class
from manual import Block, blocks, is_plain, lines, words
from PIL import Image
from safetensors.torch import save_file
from small import random_images

from ssod_edge.cli import main
from ssod_edge.config import Preprocess
from ssod_edge.training.model import build_model

CLASSES = ("bowl", "cup", "fork", "glass", "plate")
WEIGHTS = "small.safetensors"
NETWORK = f"--backbone test_efficientnet --size {SIZE} --weights {WEIGHTS} --workers 0"
#: What is put behind the words of the manual, so that a command takes a second: the last one wins.
SMALL = {
    "train": NETWORK,
    "study": f"{NETWORK} --seeds 0",
    "eval": "--bootstrap 20 --shift-images 6",
    "bench": "--quick",
    "teach": "--alike",  # to a network that nobody trained everything looks alike
}
#: The same, where seconds count; and what is not run there.
SMALLER = {"export": "--fp32 --target onnx"}
SLOW = ("ssod-edge bench", "ssod-edge doctor")
#: Options of the manual whose value is another one here.
REPLACED = {"--epochs": "1"}
#: What begins from a run has that run's network.
FROM_A_RUN = {"--from", "--resume"}
#: Commands that install, build, or belong to other machines.
NOT_RUN = (
    "pip",
    "python -m pip",
    "make",
    "git",
    "docker",
    "sudo",
    "apt",
    "apt-get",
    "cmake",
    "curl",
    "cd",
    "torchrun",
    "scp",
    "ssh",
)
#: Pages whose Python needs a cluster, or a trained network (to another one everything looks alike): it is compiled, and
#: what it imports is looked for.
ELSEWHERE = ("docs/cluster.md", "docs/teaching.md")
#: Commands that wait for a person, a camera or requests: their words are checked, and no more.
WAITS = ("serve", "review", "--camera")


class Place:
    """The current folder, in which pages are run. A line that was run in it once is not run again.

    Attributes:
        quick: what takes long is left out (`SLOW`) or made smaller (`SMALLER`).
        done: lines that were run.
    """

    def __init__(self, quick: bool = False):
        self.not_run = (*NOT_RUN, *(SLOW if quick else ()))
        self.more = SMALLER if quick else {}
        self.done: list[str] = []

    def run_page(self, page: str) -> None:
        """Runs the blocks of bash and Python in a page; raises AssertionError with the line that fails."""
        for block in blocks(page, "bash", "python"):
            if block.language == "python":
                if page not in ELSEWHERE:
                    _run_python(block)
            elif all(is_plain(line.partition(" #")[0]) for line in lines(block)):
                for line in lines(block):
                    self._run_line(block, line)
            else:
                _run_shell(block, block.text)

    def _run_line(self, block: Block, line: str) -> None:
        line = " ".join(line.partition(" #")[0].split())
        waits = line.startswith("ssod-edge ") and any(word in line.split() for word in WAITS)
        if line in self.done or (waits and "--folders" not in line) or line.startswith(self.not_run):
            return
        self.done.append(line)
        if not line.startswith("ssod-edge "):
            return _run_shell(block, line)
        ((_, *arguments),) = words(line)
        _run_command(block, [*small(arguments), *self.more.get(arguments[0], "").split()])


def small(arguments: list[str]) -> list[str]:
    """The arguments of `ssod-edge`, with those of `SMALL` and `REPLACED`."""
    words = [REPLACED.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
    return words if FROM_A_RUN & set(words) else [*words, *SMALL.get(words[0], "").split()]


def write_data(folder: Path) -> None:
    """What the manual calls photos/, shards/, new.jpg, other/photos and new-classes/, and weights to start from."""
    rng = np.random.default_rng(1)
    for name in CLASSES:
        write_class(folder / "photos" / name, 30, rng, ".jpg")
    write_class(folder / "new-classes" / "mug", 12, rng, ".jpg")
    for path in folder.rglob("*.jpg"):  # soft edges, as a lens makes them
        with Image.open(path) as image:
            image.resize((160, 120), Image.Resampling.BILINEAR).save(path)
    shutil.copyfile(folder / "photos" / "cup" / "000.jpg", folder / "new.jpg")
    (folder / "shards").mkdir()
    for name in CLASSES[:2]:
        with tarfile.open(folder / "shards" / f"{name}.tar", "w") as archive:
            archive.add(folder / "photos" / name, arcname=name)
    (folder / "other" / "photos").mkdir(parents=True)
    for index, image in enumerate(random_images(40, seed=9, size=SIZE).numpy()):
        Image.fromarray(255 - image.transpose(1, 2, 0) // 2).save(folder / "other" / "photos" / f"{index:03}.jpg")
    write_weights(folder)


def write_weights(folder: Path) -> None:
    """Random weights of a small network, as a file to start from, which stand for published ones."""
    torch.manual_seed(3)
    model = build_model("test_efficientnet", CLASSES, Preprocess(input_size=SIZE))
    save_file(model.backbone.state_dict(), folder / WEIGHTS)


def make_run() -> None:
    """`runs/NAME` with its export, for pages that begin where another one ends."""
    block = Block("the run that is there", 1, "bash", "")
    _run_command(block, small(["train", "photos/", "--tune", "head", "--name", "NAME"]))
    _run_command(block, ["export", "runs/NAME"])


def _run_command(block: Block, arguments: list[str]) -> None:
    if arguments[0] == "train" and "--name" in arguments:  # what is prepared gives way to what the page makes
        shutil.rmtree(Path("runs") / arguments[arguments.index("--name") + 1], ignore_errors=True)
    done = CliRunner().invoke(main, arguments)
    trace = "".join(traceback.format_exception(*done.exc_info)) if done.exc_info else ""
    assert done.exit_code == 0, f"{block}: ssod-edge {' '.join(arguments)}\n{done.output[-3000:]}\n{trace[-2000:]}"


def _run_shell(block: Block, text: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-ec", text], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}: {text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def _run_python(block: Block) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
