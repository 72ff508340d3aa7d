"""What a fork leaves of an engine: its objects without its threads.

Whatever waits for such a thread waits for ever, and destroying the object does. So in the child it is kept: its memory
is small beside a hang.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, TypeVar

T = TypeVar("T")

_alive: weakref.WeakSet[Any] = weakref.WeakSet()
_used: set[int] = set()  # processes in which there ever was one: libraries have threads of their own


def keep_in_children(engine_object: T) -> T:
    """Never destroy an object in a process that is forked while it is alive; returns it."""
    _alive.add(engine_object)
    _used.add(os.getpid())
    return engine_object


def never_destroy(engine_object: object) -> None:
    """Keep an object beyond the end of the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine_object))


class _Stack(ctypes.Structure):
    """stack_t of signal.h."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def leave_signal_stack() -> None:
    """Let this thread's signals run on its own stack again, whatever a library has set and not put right."""
    disable = 2  # SS_DISABLE
    ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, disable, 0)), None)


def is_child() -> bool:
    """Whether this process was forked from one that had used an engine."""
    return bool(_used - {os.getpid()})


def _keep() -> None:
    if not _used:
        return
    for engine_object in list(_alive):
        never_destroy(engine_object)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # When the interpreter has ended, leave before the engines' own clean-up, which waits too; it gets the status.
        libc.on_exit(libc._exit, None)


os.register_at_fork(after_in_child=_keep)
