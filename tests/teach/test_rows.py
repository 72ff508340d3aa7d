"""How much of the known classes a new one is given."""

from __future__ import annotations

import numpy as np
import pytest

from ssod_edge.teach.rows import TAKEN, _offset


@pytest.mark.parametrize(
    ("distance", "most", "taken"),
    [
        (8.0, 0.03, TAKEN[0]),  # far from all that is known: more would bring nothing
        (2.0, 0.03, 0.03),  # like a known class: each point brings several of its own
        (2.0, 0.0075, 0.0075),  # no more than may be lost
        (2.0, 0.001, 0.001),
    ],
)
def test_a_class_that_looks_like_a_known_one_is_given_more(distance, most, taken):
    rng = np.random.default_rng(0)
    old, new = rng.normal(0, 1, 4000), rng.normal(distance, 0.5, 200)
    offset = _offset(old, new, 4, most)
    assert np.mean(old + offset > 0) == pytest.approx(taken, abs=3 / len(old))
