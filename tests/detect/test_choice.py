"""The choice of a score, on features of a network that nobody has to run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ssod_edge.detect.choice import (
    DISTURBED,
    LEVEL,
    MISTAKEN,
    Candidates,
    Choice,
    Known,
    best_of,
    choose,
    fit_all,
    single_scores,
    unasked_score,
)
from ssod_edge.detect.choice_table import choice_in_brief, choice_table
from ssod_edge.detect.detectors import Array
from ssod_edge.detect.fit import FitData
from ssod_edge.detect.sums import held_out_scores

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


def chosen(
    labels: np.ndarray | None = None,
    network: int = 1_000_000,
    ood_row: bool = True,
    disturbed: tuple[Array, ...] | None = None,
) -> Choice:
    known, data = make(200, seed=1), make(400, seed=0)
    made = {"near": outputs(make(100, seed=2, away=5)), "far": outputs(make(100, seed=3, away=12))}
    fitted = fit_all(data, lambda detector: True, lambda line: None)
    calm = outputs(make(100, seed=4)) if disturbed is None else disturbed  # as the known ones
    singles = single_scores(fitted, ood_row)
    parts = (held_out_scores(singles, fitted, shown) for shown in (outputs(known), calm))
    shown = Known(known.logits, known.labels if labels is None else labels, *parts)
    return choose(Candidates(fitted, shown.parts), shown, made, network)


def test_what_lies_where_no_class_does_is_found_by_a_distance() -> None:
    """The logits do not see the direction in which the made images lie away."""
    found = chosen()
    assert found.kinds == ("near", "far", DISTURBED) and found.mistaken < 20
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
    assert found.kinds == ("near", "far", MISTAKEN, DISTURBED) and found.mistaken >= 28
    assert chosen(np.full(200, -1)).mistaken == 0


def test_an_ood_row_that_was_not_trained_is_no_candidate() -> None:
    names = set(chosen(ood_row=False).rows)
    assert "energy" in names and not any({"ssod", "posterior"} & set(name.split("+")) for name in names)


def test_known_images_that_are_to_be_accepted_count_against_what_rejects_them() -> None:
    """Disturbed images lie where the made ones do: who rejects these rejects them too."""
    without, disturbed = chosen(), outputs(make(100, seed=5, away=5))
    found = chosen(disturbed=disturbed)
    assert found.kinds == ("near", "far", DISTURBED)
    distance, logits = found.rows["mahalanobis"], found.rows["energy"]
    assert distance["accepted"] < 0.2 and logits["accepted"] > 0.8
    assert distance["worst"] == DISTURBED and distance["regret"] > 0.6
    assert without.rows["mahalanobis"]["regret"] < 0.1 and without.rows["mahalanobis"]["accepted"] > 0.85
    accepted = np.mean(
        outputs(make(100, seed=5, away=5))[0].max(axis=1) >= np.quantile(make(200, seed=1).logits.max(axis=1), 0.05)
    )
    assert found.rows["maxlogit"]["accepted"] == pytest.approx(accepted, abs=0.02)
    assert any(
        line.startswith("score") and line.rstrip().endswith("disturbed    cost") for line in choice_table(found, 1, "")
    )


def rows_of(figures: dict[str, tuple[float, float]], cost: float = 0.0) -> dict[str, dict[str, object]]:
    return {name: {"figures": dict(zip("ab", pair, strict=True)), "cost": cost} for name, pair in figures.items()}


def test_the_prior_gives_way_to_a_lead_beyond_chance() -> None:
    rows = rows_of({"gen+mahalanobispp": (0.9, 0.85), "knn": (0.9, 0.9)})
    assert best_of(rows, lead=0.06) == "gen+mahalanobispp" and best_of(rows, lead=0.04) == "knn"
    assert chosen().lead == pytest.approx(1 / np.sqrt(200))


@pytest.mark.parametrize(
    ("figures", "best"),
    [
        # The best by its mean fails one kind by 0.3, the other none by more than 0.1.
        ({"knn": (1.0, 0.6), "energy": (0.9, 0.8), "vim": (0.5, 0.9)}, "energy"),
        # Within a point of the least regret: fewer parts, and before all the prior.
        ({"gen+knn": (0.9, 0.9), "knn": (0.895, 0.895), "gen+vim": (0.88, 0.88)}, "knn"),
        (
            {"gen+knn": (0.9, 0.9), "knn": (0.895, 0.895), "gen+mahalanobispp": (0.892, 0.9)},
            "gen+mahalanobispp",
        ),
        ({"gen+knn": (0.9, 0.9), "gen+mahalanobispp": (0.88, 0.9)}, "gen+knn"),
    ],
)
def test_the_least_of_the_worst_regrets_is_taken(figures: dict[str, tuple[float, float]], best: str) -> None:
    rows = rows_of(figures)
    assert best_of(rows, LEVEL) == best
    expected = {
        name: max(max(p[i] for p in figures.values()) - pair[i] for i in (0, 1)) for name, pair in figures.items()
    }
    assert {name: row["regret"] for name, row in rows.items()} == pytest.approx(expected)


def test_what_costs_too_much_sets_no_mark() -> None:
    rows = rows_of({"energy": (0.8, 0.8), "msp": (0.7, 0.82)}) | rows_of({"knn": (1.0, 0.0)}, cost=0.02)
    assert best_of(rows, LEVEL) == "energy" and rows["energy"]["regret"] == pytest.approx(0.02)


def test_sums_have_one_score_of_the_logits_one_distance_and_the_row_where_it_was_trained() -> None:
    sums = {name for name in chosen().rows if "+" in name}
    assert {"gen+mahalanobispp", "gen+mahalanobispp+residual"} <= sums and "ssod+gen+knn" in sums and "ssod+vim" in sums
    assert (
        not sums & {"gen+energy", "knn+mahalanobispp", "vim+vim", "ssod+gen"}
        and max(name.count("+") for name in sums) == 3
    )


def test_what_ships_unasked() -> None:
    assert unasked_score(("rotate",), 200, 200) == "auto"
    assert unasked_score(("rotate",), 200, 199) == unasked_score((), 5000, 5000) == "gen+mahalanobispp"
    assert unasked_score((), 32, 1) == unasked_score((), 32, 1, "upper") == "gen+mahalanobispp"
    assert unasked_score((), 32, 1, "head") == "gen+mahalanobispp+residual"
    assert unasked_score((), 31, 10) == unasked_score((), 100, 0) == "energy"


def test_a_detector_that_cannot_be_fitted_is_no_candidate() -> None:
    lines: list[str] = []
    data = replace(make(400, seed=0), labels=np.arange(400))  # an image a class
    assert set(fit_all(data, lambda detector: True, lines.append)) == {"vim", "residual", "knn"}
    assert sum("no candidate" in line and "do not vary within their classes" in line for line in lines) == 4
