"""The installed project: its version, and the folder from which its packages are imported.

In a checkout the packages (`streams`, `rollout`, ...) are beside this one; an installed wheel has them inside it, so that
site-packages gets one name only.

Invariants:
* they have the same names in both forms: `from streams.memory import MemoryPolicy`;
* importing this package makes them importable;
* it imports nothing but the standard library: every process of a run may import it first.
"""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE if (_HERE / "streams").is_dir() else _HERE.parent
"""The folder that holds the packages."""


def put_on_path() -> None:
    """Make the packages importable, before anything of the same name elsewhere."""
    folder = str(FOLDER)
    if sys.path[:1] != [folder]:
        sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]


put_on_path()
