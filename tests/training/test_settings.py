"""The settings of a new run: where its preprocessing comes from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small import make_model, write_run

from ssod_edge.cli import main
from ssod_edge.config import PIXELS_VERSION, Preprocess
from ssod_edge.training.settings import run_config


def preprocess_of(**options: object) -> Preprocess:
    given = {"recipe": "short", "backbone": "test_resnet", "size": None, **options}
    return run_config("demo", given).preprocess


def test_a_fit_and_a_region_become_part_of_the_run() -> None:
    plain = preprocess_of()
    assert (plain.fit, plain.roi, plain.version) == ("crop", None, PIXELS_VERSION)
    found = preprocess_of(fit="pad", roi=(1, 2, 30, 40), size=48)
    assert found == replace(plain, input_size=48, fit="pad", roi=(1, 2, 30, 40))


def test_what_is_not_given_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    model = make_model("test_resnet", 48)
    model.preprocess = Preprocess(input_size=48, fit="squash", roi=(0, 0, 9, 9), version=1)
    write_run(tmp_path / "run", model, "demo")
    weights = str(tmp_path / "run" / "best.safetensors")
    assert preprocess_of(weights=weights) == model.preprocess
    assert preprocess_of(weights=weights, fit="pad") == replace(model.preprocess, fit="pad")
    assert preprocess_of(weights=weights, roi=(1, 1, 5, 5)) == replace(model.preprocess, roi=(1, 1, 5, 5))


@pytest.mark.parametrize("region", ["1,2,3", "1,2,3,4,5", "a,b,c,d", "0,0,²,4", "0,0,1.5,4", "", "-1,0,4,4", "0,0,0,4"])
def test_a_region_that_is_none_is_wrong_usage(region: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["train", "demo", "--backbone", "test_resnet", "-o", str(tmp_path), "--roi", region]
    )
    assert done.exit_code == 2 and "0,120,640,480" in done.stderr, done.output
    assert not list(tmp_path.iterdir())
