"""Scripts that write words without spaces between them: Han, kana, Hangul, Thai, Lao, Khmer, Myanmar.

Pure. A Latin letter or a digit beside such a character is a word of its own ("选B", "有3个"), which `\\w`
does not know. Hangul has spaces, but its particles are written onto the word before ("B입니다").

Invariant: `apart` keeps every character's index, and does not change texts without these scripts.
"""

from __future__ import annotations

import re

EDGE = "\ue000"
"""Stands for one character of these scripts; of private use, so neither a letter nor a space."""

HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA = "\u3040-\u30ff\u3100-\u312f\u31a0-\u31ff"
HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff"
# Without the digits of their own (๐-๙ and the like), which are digits here as anywhere.
_SOUTHEAST_ASIAN = (
    "\u0e00-\u0e4f\u0e5a-\u0ecf\u0eda-\u0eff\u1000-\u103f\u104a-\u108f\u109a-\u109f\u1780-\u17df\u17ea-\u17ff"
)

_UNSPACED = re.compile(f"[{HAN}{KANA}{HANGUL}{_SOUTHEAST_ASIAN}]")
_SPACE_INSIDE = re.compile(f"(?<=[{HAN}{KANA}{_SOUTHEAST_ASIAN}])[^\\S\\n]+(?=[{HAN}{KANA}{_SOUTHEAST_ASIAN}])")


def apart(text: str) -> str:
    """Return `text` with EDGE for every character of these scripts, so that letters and digits beside them stand alone."""
    return _UNSPACED.sub(EDGE, text)


def closed_up(text: str) -> str:
    """Return `text` without spaces between two characters of scripts that have none (Hangul has)."""
    return _SPACE_INSIDE.sub("", text)
