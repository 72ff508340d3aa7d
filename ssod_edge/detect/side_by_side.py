"""Fits that do not wait for one another, side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from ssod_edge.machine import available_cores
from ssod_edge.optional import is_there

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Fits at a time, and bytes that they may hold together; one runs whatever it holds.
MOST, MOST_BYTES = 4, 2**29
#: Copies of the features that a fit holds: of its images, standardised, and in a product.
COPIES = 3


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], features: int) -> Iterator[Result]:
    """What `map` gives but for rounding, by as many threads as there are cores and room for.

    Args:
        function: a fit; it changes nothing that another one reads.
        features: bytes of what is fitted to.

    Raises:
        Exception: what `function` raises, in the place of its result.
    """
    threads = max(1, min(MOST, available_cores(), MOST_BYTES // max(1, COPIES * features)))
    if threads == 1:  # then one fit may have all cores
        yield from map(function, items)
        return
    with fitting(), ThreadPoolExecutor(threads, thread_name_prefix="fit") as pool:
        yield from pool.map(function, items)


@contextmanager
def fitting() -> Iterator[None]:
    """One thread for numpy's and SciPy's products, and no word of iterations that end early: the last digits of a loss
    do not matter.

    Threads that share a product of few rows wait for each other longer than they compute. scikit-learn brings what
    tells them so; a device may do without. Both hold for the whole process. Threads may enter this too while whoever
    started them is in it: what each of them puts back is the same then.
    """
    with warnings.catch_warnings():
        if is_there("sklearn"):
            from sklearn.exceptions import ConvergenceWarning

            warnings.simplefilter("ignore", ConvergenceWarning)
        limit = nullcontext()
        if is_there("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            limit = threadpool_limits(1)
        with limit:
            yield
