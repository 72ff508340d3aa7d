"""Fits side by side: what they give, and what they leave as it was."""

import threading
import time
import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_info

from ssod_edge.detect import side_by_side as module
from ssod_edge.detect.side_by_side import fitting, side_by_side


def blas_threads():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


def test_results_come_in_order_from_several_threads_with_one_thread_each(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 3)
    before, together, limits = blas_threads(), threading.Barrier(3, timeout=60), []

    def square(n):
        together.wait()  # three at a time, or it fails
        with fitting():
            limits.extend(blas_threads())
        return n * n

    assert list(side_by_side(square, range(6), 100)) == [0, 1, 4, 9, 16, 25]
    assert limits and set(limits) == {1} and blas_threads() == before


def test_large_fits_run_one_after_the_other(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    monkeypatch.setattr(module, "fitting", None)  # one fit may have all cores
    running, most = [], []

    def fit(n):
        running.append(n)
        time.sleep(0.02)
        most.append(len(running))
        running.remove(n)

    list(side_by_side(fit, range(4), module.MOST_BYTES))
    assert set(most) == {1}


def test_an_error_comes_in_the_place_of_its_result():
    found = side_by_side(lambda n: 1 // n, [1, 0, 1], 100)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_only_early_ends_of_iterations_are_kept_quiet_and_the_filters_come_back(monkeypatch):
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    before = list(warnings.filters)

    def warn(kind):
        with fitting():
            warnings.warn("early", kind, stacklevel=1)

    assert list(side_by_side(warn, [ConvergenceWarning] * 8, 100)) == [None] * 8
    assert warnings.filters == before
    with pytest.warns(RuntimeWarning), fitting():
        np.log(np.zeros(1))
