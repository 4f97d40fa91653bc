"""Importing the large packages that an actor stands on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Keep the garbage collector off while modules are imported, and have it pass over what they made from then on.

    torch and transformers make some 600,000 objects that live as long as the process; looking for garbage among them again
    and again takes about a fifth of the CPU time of their import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
