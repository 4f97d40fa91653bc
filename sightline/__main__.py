"""The `sightline` command, also `python -m sightline`: `launch.py` from any folder, and the tools beside it.

    sightline [KEY=VALUE ...]              as launch.py
    sightline check FILE ...               check a task file before training on it
    sightline page OUT.html A.jsonl ...    make the page of transcripts
    sightline report RUN [RUN ...]         compare runs on their held-out streams
    sightline --version

Invariants:
* a user's own modules are found in the folder where the command is typed, or in the one that SIGHTLINE_MODULES names;
* that folder hides none of our packages, neither on the driver nor in any worker.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from sightline import FOLDER  # first: it makes what follows importable

# isort: split
import launch
from streams.support.files import MODULES_VARIABLE, PACKAGES
from streams.support.paths import expand_home

TOOLS = {"check": "streams.data.check", "page": "evals.transcripts.page", "report": "evals.report"}
"""First word of a command line -> the module whose `main` takes the others."""


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if words and words[0] in TOOLS:
        sys.exit(importlib.import_module(TOOLS[words[0]]).main(words[1:]))
    try:
        os.environ[MODULES_VARIABLE] = str(_own_modules())
    except (ValueError, OSError) as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)
    launch.run(words)


def _own_modules() -> Path:
    """Return the folder of the user's modules. Raises ValueError or OSError if it cannot be used."""
    named = os.environ.get(MODULES_VARIABLE)
    folder = Path(expand_home(named) if named else os.getcwd()).absolute()
    if not folder.is_dir():
        raise ValueError(
            f"{MODULES_VARIABLE}={named}: there is no such folder; name the one that holds your own modules"
        )
    # Ray puts the current folder first on the path of its workers, whatever the driver's path is.
    for place in (folder, Path.cwd()):
        _refuse_namesakes(place)
    return folder


def _refuse_namesakes(place: Path) -> None:
    """Raise ValueError if a module in `place` has the name of one of our packages: workers would import that one."""
    if place == FOLDER:
        return
    for name in PACKAGES:
        found = PathFinder.find_spec(name, [str(place)])
        if found is not None and found.origin is not None:
            raise ValueError(
                f"{found.origin} has the name of one of Sightline's own packages ({name}) and would be imported in its place: "
                "type the command in another folder, rename it, or, if this is a checkout of Sightline, use `python launch.py`"
            )


if __name__ == "__main__":
    main()
