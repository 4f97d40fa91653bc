"""`~` in paths that a user wrote: the home folder, wherever the shell has not put it in already.

Used once for each kind of input: where the configuration is loaded (`conf.paths`), where a row is read, where
a command line is parsed. Invariant: what comes out is what a file is opened by, so nobody further on has to think of homes.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_HOME = re.compile(r"~([\w.-]*)(?:/|\Z)")
"""What follows a `~` that cannot be a user's name (`~+`, `~a b`) makes it a plain name, as in a shell."""


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder; any other path unchanged.

    Raises ValueError if there is no such user, or no home folder: a folder that is really called `~` is never made.
    """
    named = _HOME.match(path)
    if named is None:
        return path
    user = named[1]
    expanded = os.path.expanduser(path)
    # An empty HOME would make "/x" of "~/x".
    if os.path.isabs(expanded) and (user or os.environ.get("HOME") != ""):
        return expanded
    if user:
        raise ValueError(
            f"{path!r}: there is no user {user!r} here whose home folder ~{user} could be; a name that begins with ~ is "
            f"written ./{path}"
        )
    raise ValueError(f"{path!r}: ~ is the home folder, and HOME names none: write the path in full")


def user_path(text: str) -> Path:
    """argparse type of a path."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
