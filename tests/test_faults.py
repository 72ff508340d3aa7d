"""A short form of the fault campaign (`make faults`), and that it sees what it looks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("openvino", reason="the campaign's export is for both engines")

from faults.campaign import PARTS, Campaign, seeds_of

#: Attempts of each part. Of another seed than the campaign's default: together they try more.
COUNTS = {"images": 300, "artifacts": 15, "archives": 8, "kills": 6, "disk": 6, "threads": 5, "memory": 3}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "short").touch()
    with Campaign(folder) as campaign:
        yield campaign


@pytest.mark.parametrize("part", PARTS)
def test_nothing_happens_that_must_not(campaign: Campaign, part: str) -> None:
    tally = campaign.run(part, list(seeds_of(0))[: COUNTS[part]], 60)
    assert not tally.faults, tally.faults
    assert tally.ends.total() > 1, tally.line()
