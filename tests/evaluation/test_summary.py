"""What `eval` prints: the figures of the report, on a screen, in words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ssod_edge.cli import main

#: Words of the field that the summary does without.
ABBREVIATIONS = ("TPR", "AURC", "AUGRC", "OSCR", "ECE", "Brier", "FPR", "OOD", "sel. acc.")


@pytest.fixture(scope="module")
def shown(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict]:
    data, folder = small_run.parent / "data", tmp_path_factory.mktemp("summary")
    words = ["eval", str(small_run), "--id", str(data), "--ood", f"other={data / 'a'}", "--bootstrap", "0"]
    words += ["--shift-images", "6", "--json", str(folder / "eval.json"), "--png", str(folder / "x.png")]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    return done, json.loads((folder / "eval.json").read_text())


def row(text: str, first: str) -> list[str]:
    """The figures of the row that begins so."""
    [found] = [line for line in text.splitlines() if line.strip().startswith(first)]
    return found.split(first)[1].split()


def test_figures_are_those_of_the_report(shown: tuple[Result, dict]) -> None:
    done, report = shown
    name = report["default_score"]
    deployed = report["deployment"][name]
    assert f"{100 * report['id_accuracy']:.1f} of 100 of the {report['n_id']} known images" in done.stdout
    assert row(done.stdout, "known classes")[:2] == [str(report["n_id"]), f"{100 * deployed['id_tpr']:.1f}"]
    [other] = [found for found in report["results"] if found["score"] == name]
    number, of_100, interval, auroc = row(done.stdout, "unknown: other")
    found = deployed["ood"]["other"]
    assert (number, of_100, auroc) == (
        str(other["n_ood"]),
        f"{100 * found['false_accept']:.1f}",
        f"{100 * other['auroc']:.1f}",
    )
    assert interval == "-".join(f"{100 * end:.1f}" for end in found["false_accept_ci"])
    strong = [line["accepted"] for line in report["shift"] if line["strength"] == "strong"]
    assert row(done.stdout, "the same, disturbed (strong)") == ["6", f"{100 * sum(strong) / len(strong):.1f}"]


def test_the_best_free_score_stands_beside_what_ships(shown: tuple[Result, dict]) -> None:
    done, report = shown
    others = {name: mean["auroc"] for name, mean in report["mean"].items() if name != report["default_score"]}
    [named] = re.findall(
        r"The best score that needs no fitting, (\w+), would call ([\d.]+) of other known", done.stdout
    )
    best = max(others, key=others.__getitem__)
    assert named == (best, f"{100 * report['deployment'][best]['ood']['other']['false_accept']:.1f}")


def test_it_fits_on_a_screen_and_has_no_abbreviation_that_it_does_not_explain(shown: tuple[Result, dict]) -> None:
    done, _ = shown
    assert len(done.stdout.splitlines()) <= 40 and "AUROC: how often " in done.stdout
    assert not [word for word in ABBREVIATIONS if word in done.stdout]


def test_without_unknown_images_it_says_how_to_give_some(small_run: Path, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "eval.json"), "--png", str(tmp_path / "x.png")]
    words = ["eval", str(small_run), "--id", str(small_run.parent / "data"), "--shift-images", "0", *files]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "add some with --ood NAME=DATA" in done.stdout and "AUROC:" not in done.stdout
    assert "disturbed" not in done.stdout.rpartition("--details")[0]
