"""Names of metrics that contain a user's words (categories, reward terms), encoded so that MLflow accepts them.

Pure. MLflow accepts letters, digits, `_ - . / :` and spaces, at most 250 characters, as a relative path in its shortest form.

Invariants:
* two different names never become the same;
* a name of plain ASCII that MLflow accepts, and every file system keeps, does not change;
* `readable` decodes a name unless it was too long.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection

MAX_BYTES = 250
"""MLflow's limit, counted in bytes of UTF-8: a file store makes file names of them."""

_ESCAPE = re.compile(r"_x([0-9A-F]{4,6})_")
"""How one character is written that does not stay: its code point, as in Office Open XML (ECMA-376, ST_Xstring)."""
_LOOKS_ESCAPED = re.compile(r"_(?=x[0-9A-F]{4})")
_PLAIN = re.compile(r"[A-Za-z0-9_./ -]")


def metric_name(name: str) -> str:
    """Return the name under which a metric is logged. `name` is non-empty text, like `eval/accuracy_` and a category.

    Letters and digits of every script stay. Any other character becomes `_x002F_`, its code point; so does an underscore
    that would read as the beginning of one. A name that is too long is cut and ends in `_x`, 16 digits of its hash, and `_`.
    """
    # A file system that composes accents would make one name of two: such a name keeps its ASCII only.
    composed = unicodedata.is_normalized("NFC", name)
    kept = ["" if _stays(c, composed) else _escaped(c) for c in name]
    for at in (*_shapeless(name), *(found.start() for found in _LOOKS_ESCAPED.finditer(name))):
        kept[at] = _escaped(name[at])
    written = "".join(escape or c for escape, c in zip(kept, name, strict=True))
    return written if len(written.encode()) <= MAX_BYTES else _shortened(written, name)


def readable(name: str) -> str:
    """Return the words of a metric's name as they were given; a name that was cut stays as it is."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), name)


def apart(words: str, taken: Collection[str], mark: str) -> str:
    """Return a user's words, with `mark` appended where they would equal one of our own names, `taken`. One to one."""
    stem = words
    while stem.endswith(mark):
        stem = stem.removesuffix(mark)
    return words + mark if stem in taken else words


def _stays(character: str, composed: bool) -> bool:
    return bool(_PLAIN.match(character)) or (composed and not character.isascii() and character.isalnum())


def _escaped(character: str) -> str:
    return f"_x{ord(character):04X}_"


def _shapeless(name: str) -> set[int]:
    """Return the indices of characters that a path would lose: slashes around nothing or dots, dots alone, outer spaces."""
    places = set(range(len(name) - len(name.lstrip(" "))))
    places |= set(range(len(name.rstrip(" ")), len(name)))
    if name.startswith(".."):  # MLflow refuses "..a", too
        places.add(0)
    start = 0
    for part in name.split("/"):
        end = start + len(part)
        if part in ("", ".", ".."):
            # The slash before it, so that "a//b" becomes "a/", an escaped slash, "b"; the one after it at the beginning.
            slash = start - 1 if start else end
            places.add(slash if slash < len(name) else 0)
        start = end + 1
    return places


def _shortened(written: str, name: str) -> str:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest().upper()
    room = MAX_BYTES - len(digest) - 3
    return f"{written.encode()[:room].decode(errors='ignore')}_x{digest}_"
