"""Training on two nodes, loopback addresses of this machine: one is killed and started again, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from pictures import write_folder

from ssod_edge.training.checkpoint import BEST, LAST, load_checkpoint
from ssod_edge.training.run import Run

EPOCHS = 4
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
#: The last of these lets a node in that was started again: https://github.com/pytorch/pytorch/issues/135712.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
#: Of an epoch's line, what the clock says.
TIMES = ("seconds", "images_per_second")


def train(pictures, out):
    """The command behind torchrun's own options; the same for every node."""
    return ["-m", "ssod_edge", "train", str(pictures), "--backbone", "test_efficientnet", "--weights", "none",
            "--size", "40", "--epochs", str(EPOCHS), "--batch-size", "4", "--workers", "0", "-o", str(out),
            "--name", "run"]  # fmt: skip


def rows(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", per_class=16)


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    """The run of two processes on one node."""
    out = tmp_path_factory.mktemp("unbroken")
    command = [*TORCHRUN, "--nproc-per-node", "2", *train(pictures, out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return out / "run"


def children(parent):
    """Processes that it started, by their ids."""
    tasks = Path("/proc", str(parent), "task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Node:
    """torchrun on one of the addresses."""

    def __init__(self, number, port, command, log):
        self.log = log
        # A node is given up after six seconds of silence; torchrun's own choice is fifteen.
        conf = f"is_host={int(number == 0)},keep_alive_interval=2,keep_alive_max_attempt=3"
        whole = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "test", "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", conf, "--max-restarts", "3",
                 "--local-addr", f"127.0.0.{number + 1}", *command]  # fmt: skip
        with open(log, "wb") as file:
            self.process = subprocess.Popen(whole, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)

    def kill(self):
        """SIGKILL to torchrun and its processes: the node has lost its power."""
        if self.process.poll() is not None:
            return
        trainers = children(self.process.pid)
        self.process.kill()
        self.process.wait()
        for trainer in trainers:
            with suppress(ProcessLookupError):
                os.kill(trainer, signal.SIGKILL)

    def end(self):
        assert self.process.wait(300) == 0, self.log.read_text()[-4000:]


@pytest.mark.slow
def test_torchrun_trains_one_run_folder(unbroken):
    assert len(rows(unbroken)) == EPOCHS and Run.at(unbroken).meta["epoch"] >= 1


@pytest.mark.slow
def test_a_node_that_is_killed_and_started_again_loses_nothing(pictures, unbroken, tmp_path):
    run, port, command, nodes = tmp_path / "run", free_port(), train(pictures, tmp_path), []

    def start(number):
        nodes.append(Node(number, port, command, tmp_path / f"{len(nodes)}.log"))
        return nodes[-1]

    try:
        first, second = start(0), start(1)
        until = time.monotonic() + 300
        while len(rows(run)) < 2:
            assert time.monotonic() < until and first.process.poll() is None, first.log.read_text()[-4000:]
            time.sleep(0.02)
        second.kill()
        assert len(rows(run)) < EPOCHS, "it was killed too late"
        third = start(1)
        first.end()
        third.end()
    finally:
        for node in nodes:
            node.kill()
    assert rows(run) == rows(unbroken)
    for name in (BEST, LAST):
        (broken, _), (whole, _) = load_checkpoint(run / name), load_checkpoint(unbroken / name)
        assert broken.keys() == whole.keys() and all(torch.equal(broken[key], whole[key]) for key in whole)
