"""How the memory of tensors is given back."""

from __future__ import annotations

import ctypes

#: Options of mallopt(3), and values that keep freed memory: blocks up to 1 GiB come from the heap, which never shrinks.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_LARGEST_BLOCK, _NEVER = 2**30, -1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for the next tensors; returns whether the C library can do that.

    By default glibc gives every large tensor back to the system. The next batch gets the same pages anew, and the
    system clears each of them first: a fifth of the processor's time in training on a CPU (docs/results.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
