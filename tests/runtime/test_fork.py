"""An engine in a process that was forked from one that used it: one that is inherited is an error at once, one that is
opened there works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORKED = """
import os, sys, signal
import numpy as np
from ssod_edge.errors import EngineError
from ssod_edge.runtime.open import open_runner
folder, engine, how, size = sys.argv[1:]
images = {"image": np.zeros((2, 3, int(size), int(size)), np.uint8)}
def once():
    with open_runner(folder, engine=engine) as runner:
        runner.infer(images)
if how != "fresh":
    runner = open_runner(folder, engine=engine)
    runner.infer(images)
if how in ("closed", "both"):
    runner.__exit__(None, None, None)
if how == "both":
    another = open_runner(folder, engine=engine, threads=1)
child = os.fork()
if not child:
    signal.alarm(60)
    try:
        if how == "inherited":
            try:
                runner.infer(images)
            finally:
                runner.__exit__(None, None, None)
        else:
            once()
        print("ran", flush=True)
    except EngineError as error:
        print(error, flush=True)
    sys.exit()  # objects are destroyed
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("engine", "how", "runs"),
    [
        ("openvino", "inherited", False), ("openvino", "closed", True), ("openvino", "open", True),
        ("openvino", "fresh", True), ("openvino", "both", False), ("onnxruntime", "inherited", False),
        ("onnxruntime", "closed", True), ("onnxruntime", "open", True), ("onnxruntime", "fresh", True),
    ],
)  # fmt: skip
def test_a_fork(export: Path, engine: str, how: str, runs: bool) -> None:
    from colour import SIZE

    command = [sys.executable, "-c", FORKED, str(export), engine, how, str(SIZE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ran\n") if runs else "forked from" in done.stdout
