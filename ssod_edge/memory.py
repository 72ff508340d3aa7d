"""What becomes of memory that is freed: kept for the next tensors, or given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

#: Options of mallopt(3), and values that keep what is freed: blocks of up to 1 GiB come from the heap, which never
#: shrinks.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_BLOCK, _NEVER = 2**30, -1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for the next tensors; returns whether the C library can do that.

    By default glibc gives every large tensor back to the system. The next batch gets the same pages anew, and the
    system clears each of them first: a fifth of the processor's time in training on a CPU (docs/lab/results.md).
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )


def give_back_freed_memory() -> bool:
    """Give freed memory back to the system now; returns whether the C library did.

    What was freed between blocks that are still in use stays with the process otherwise, and what comes next may ask
    for memory by other means.
    """
    trim = _of_glibc("malloc_trim")
    return trim is not None and bool(trim(0))


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is another one."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return function
