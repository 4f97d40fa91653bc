"""Expands `~` in paths that a user wrote, where the shell has not done so already.

Called once for each kind of input: where the configuration is loaded (`conf.paths`), where a row is read, where a command
line is parsed.

Invariant: no other code expands `~`; the expanded path is the one that is opened.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_HOME = re.compile(r"~([\w.-]*)(?:/|\Z)")
"""A `~` followed by what cannot be a user's name (`~+`, `~a b`) is part of a plain name, as in a shell."""


def expand_home(path: str) -> str:
    """Return the path with a leading `~` or `~user` replaced by that home folder; any other path unchanged.

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
    """Convert a command-line argument to a path; the `type` of an argparse argument."""
    try:
        return Path(expand_home(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
