"""Makes text safe for a terminal, whatever its encoding and whatever the data contain.

Invariants:
* printing never raises for a character that the terminal cannot show: it is escaped;
* a text from a data file stays on its line and sends no control sequence.
"""

from __future__ import annotations

import io
import re
import sys

# Control characters except the line feed, and those that change the writing direction.
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def escape_unprintable_output() -> None:
    """Make standard output and standard error escape what their encoding lacks, in place of a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """Return the text with line breaks, escape sequences and other unprintable characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def visible(text: str) -> str:
    """Return the text with control characters, which could move the cursor, as escapes. Line feeds stay."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
