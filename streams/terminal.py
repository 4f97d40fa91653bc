"""Text for a terminal, whatever its encoding and whatever the data hold.

Owner: streams. Invariants: printing never raises for a character that the terminal cannot show, it is escaped; a text
from a data file stays on its line and sends no control sequence.
"""

from __future__ import annotations

import io
import sys


def escape_unprintable_output() -> None:
    """Make standard output and standard error escape what their encoding lacks, in place of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """Return the text with line breaks, escape sequences and other unprintable characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
