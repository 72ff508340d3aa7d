"""A short form of the fault campaign (`make faults`), and that it sees what it looks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

pytest.importorskip("openvino", reason="the campaign's export is for both engines")
pytest.importorskip("onnxruntime", reason="the campaign's export is for both engines")

from faults import campaign as module
from faults.campaign import MOST, Campaign, Tally, seeds_of
from faults.children import Steps, counted, start
from faults.fault import Ended, Fault

#: Attempts of each part: some 20 s of one core in all. `make faults` begins with another seed, and has the part on
#: memory too: what the engines' C++ does where that is short varies from machine to machine.
COUNTS = {"images": 300, "artifacts": 15, "archives": 8, "kills": 6, "disk": 6, "threads": 5}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "short").touch()
    with Campaign(folder) as campaign:
        yield campaign


@pytest.mark.parametrize("part", COUNTS)
def test_nothing_happens_that_must_not(campaign: Campaign, part: str) -> None:
    tally = campaign.run(part, list(seeds_of(0))[: COUNTS[part]], 60)
    assert not tally.faults, tally.faults
    assert tally.ends.total() > 1, tally.line()


def test_a_fault_a_crash_and_a_hang_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PARTS, "pretended", 3)
    monkeypatch.setitem(module.GROUPS, "pretended", "opens")

    def told() -> Iterator[int]:
        for seed, text in enumerate(("well", "fault", "error", "crash", "hang", "well"), 7):
            (tmp_path / "next").write_text(text)
            yield seed

    with Campaign(tmp_path) as campaign:
        tally = campaign.run("pretended", told(), 60)
    assert list(tally.ends) == [f"well {np.random.default_rng(seed).integers(1000)}" for seed in (7, 12)]
    assert tally.faults[8] == "something is wrong" and "ValueError: the campaign is wrong" in tally.faults[9]
    assert f"the process died ({-signal.SIGSEGV})" in tally.faults[10] and "in attempt" in tally.faults[10]
    assert "no end after 3 s" in tally.faults[11] and "in attempt" in tally.faults[11], "where each thread was"
    assert tally.line().startswith("pretended: 6 tried in ")
    assert tally.line().endswith("; 4 faults: --part pretended --only 8 --only 9 --only 10 --only 11")
    assert Tally("images").line() == "images: 0 tried in 0 s (none ended well); 0 faults"


@pytest.mark.parametrize(
    ("code", "said", "end"),
    [
        (0, "", "done"),
        (2, "a step\nerror: no such file", "refused"),
        (2, "Usage: x\n\nError: no such option", "refused"),
        (4, "onnx-fp32: not calibrated: it was changed", "damage found"),
        (1, "left out: 'a.png'", "some failed"),
        (1, "", None),
        (2, "no such file", None),
        (4, "error: one\nerror: other", None),
        (4, "error: of two\nlines", None),
        (1, "error: KeyError: 'a'\nThis should not happen", None),
        (1, "Traceback (most recent call last)", None),
        (-11, "error: of C++", None),
        (139, "error: of C++", None),
    ],
)
def test_how_a_command_may_end(code: int, said: str, end: str | None) -> None:
    if end is not None:
        assert Ended(code, "", said).end() == end
        return
    with pytest.raises(Fault):
        Ended(code, "", said).end()


def test_steps_that_write_are_counted_and_met(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "a").write_text("a")
        (tmp_path / "a").read_text()
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "c").mkdir()
        Path("/dev/null").write_text("elsewhere")

    found = []
    for at in (1, 2, 3, 4):
        (tmp_path / "b").unlink(missing_ok=True)
        steps = Steps(tmp_path, at, lambda event: os.kill(os.getpid(), signal.SIGKILL))
        with start(work, steps.watch) as child:
            found.append((child.ended().code, sorted(path.name for path in tmp_path.iterdir())))
    assert found == [(-9, []), (-9, ["a"]), (-9, ["b"]), (0, ["b", "c"])]
    _, count, seconds = counted(("doctor", "--help"), tmp_path)
    assert count == 0 and seconds > 0


def test_a_fault_is_replayed_by_its_seed_and_the_command_fails(tmp_path: Path) -> None:
    """Of the parts that are there, with no export: an unknown one, and a seed without its part, are refused."""
    command = [sys.executable, "-m", "faults"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    for arguments, message in ((["--part", "none"], "Invalid value"), (["--only", "7"], "seeds of one --part")):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2 and message in done.stderr
    assert set(seeds_of(1)).isdisjoint(seeds_of(2)) and len(seeds_of(0)) == MOST
