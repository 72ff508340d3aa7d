"""The choice of a score, on features of a network that nobody has to run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ssod_edge.detect.choice import MISTAKEN, Candidates, Choice, _best, choose, fit_all
from ssod_edge.detect.choice_table import choice_in_brief, choice_table
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData

WIDTH, CLASSES = 16, 3


def make(n: int, seed: int, away: float = 0.0) -> FitData:
    """Classes around their means, or `away` from them in a direction that no class has."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(9).normal(0, 3, (CLASSES, WIDTH)).astype(np.float32)
    means[:, -1] = 0
    labels = rng.integers(0, CLASSES, n)
    features = (means[labels] + rng.normal(0, 1, (n, WIDTH))).astype(np.float32)
    features[:, -1] += np.float32(away)
    return FitData(features, labels, features @ means.T, means, np.zeros(CLASSES, np.float32), features[:, 0])


def outputs(data: FitData) -> tuple[Array, ...]:
    return data.logits, data.id_logit, data.features


def chosen(labels: np.ndarray | None = None, network: int = 1_000_000, ood_row: bool = True) -> Choice:
    known, data = make(200, seed=1), make(400, seed=0)
    made = {"near": outputs(make(100, seed=2, away=5)), "far": outputs(make(100, seed=3, away=12))}
    candidates = Candidates(fit_all(data, lambda detector: True, lambda line: None), data, ood_row)
    return choose(candidates, outputs(known), known.labels if labels is None else labels, made, network)


def test_what_lies_where_no_class_does_is_found_by_a_distance() -> None:
    """The logits do not see the direction in which the made images lie away."""
    found = chosen()
    assert found.kinds == ("near", "far") and found.mistaken < 20
    assert found.rows["energy"]["mean_auroc"] < 0.7 < 0.95 < found.rows[found.name]["mean_auroc"]
    assert found.state is not None and found.state.name == found.name
    assert found.rows[found.name]["cost"] == found.state.multiply_adds / 1_000_000
    table = choice_table(found, 200, "the validation split")
    assert "200 images of the validation split" in table[0] and sum("<- shipped" in line for line in table) == 1
    assert f"score {found.name}: AUROC" in choice_in_brief(found) and "(energy: AUROC" in choice_in_brief(found)


def test_what_costs_too_much_is_measured_and_not_taken() -> None:
    found = chosen(network=100)
    assert found.rows[found.name]["cost"] == 0 and found.rows["rmd"]["cost"] > 0.01
    assert any("too costly" in line for line in choice_table(found, 200, "images"))


def test_images_that_the_network_gets_wrong_count_where_they_are_known_to_be() -> None:
    wrong = (make(200, seed=1).labels + (np.arange(200) < 30)) % CLASSES
    found = chosen(wrong)
    assert found.kinds == ("near", "far", MISTAKEN) and found.mistaken >= 28
    assert chosen(np.full(200, -1)).mistaken == 0


def test_an_ood_row_that_was_not_trained_is_no_candidate() -> None:
    names = set(chosen(ood_row=False).rows)
    assert "energy" in names and not any({"ssod", "posterior"} & set(name.split("+")) for name in names)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ({"energy": (0.80, 0), "ssod+rmd": (0.79, 0.001), "ssod": (0.81, 0)}, "ssod"),  # 0.79 is not level with it
        ({"energy": (0.80, 0), "ssod+rmd": (0.795, 0.001), "ssod": (0.804, 0)}, "ssod+rmd"),
        ({"ssod+rmd": (0.80, 0), "ssod+knn": (0.801, 0), "energy": (0.81, 0)}, "ssod+knn"),
        ({"ssod+rmd": (0.80, 0.002), "ssod+knn": (0.80, 0.001)}, "ssod+knn"),
        ({"ssod+knn+rmd": (0.80, 0.011), "ssod+rmd": (0.70, 0.01), "ssod": (0.69, 0)}, "ssod+rmd"),
    ],
)
def test_of_candidates_that_are_level_the_one_of_most_parts_is_taken(rows, best: str) -> None:
    assert _best({name: {"figure": figure, "cost": cost} for name, (figure, cost) in rows.items()}) == best


def test_a_detector_that_cannot_be_fitted_is_no_candidate() -> None:
    lines: list[str] = []
    data = replace(make(400, seed=0), labels=np.arange(400))  # an image a class
    assert set(fit_all(data, lambda detector: True, lines.append)) == {"vim", "knn", "react"}
    assert sum("no candidate" in line and "do not vary within their classes" in line for line in lines) == 2
