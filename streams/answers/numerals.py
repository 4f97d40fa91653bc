"""The whole numbers that a response mentions, in digits or in words.

Pure. Values are canonical decimal strings ("-3", "1000"), because Python refuses to convert
very long integers and answers may have any size. A number that is no integer ("3.5", "1,2", "1e5") or is
not read ("two thousand") is a mention too, of the value None, so that a response with it can equal no
integer. Digits that end a name ("B2") are no number. Digits beside a script without spaces stand alone ("有3个"); numerals
of those scripts are read by `streams.answers.han_numerals`.
"""

from __future__ import annotations

import re
import unicodedata

from streams.answers.han_numerals import han_integers
from streams.answers.phrases import fold
from streams.answers.scripts import apart

_UNITS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
}
_TEENS = {
    "zero": 0,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
}
_TENS = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
_UNIT, _TEEN, _TEN = ("|".join(words) for words in (_UNITS, _TEENS, _TENS))
_BELOW_HUNDRED = rf"(?:(?:{_TEN})(?:(?:\s+|-)(?:{_UNIT})(?![^\W_]))?|{_TEEN}|{_UNIT})"

_WORDS = re.compile(
    rf"(?<![^\W_])(?P<minus>(?:minus|negative)\s+)?"
    rf"(?:(?P<scale>thousands?|millions?|billions?|trillions?|dozens?|half)"
    rf"|(?:(?P<hundreds>{_UNIT}|an?)(?:\s+|-))?(?P<hundred>hundred)"
    rf"(?:(?:\s+|-)(?:and\s+)?(?P<rest>{_BELOW_HUNDRED}))?"
    rf"|(?P<below>{_BELOW_HUNDRED}))(?![^\W_])"
)
_DIGITS = re.compile(
    r"(?P<name>(?<![^\W_])[^\W\d_]+\d[\w.,]*)"
    r"|(?P<minus>(?<![^\W_])(?:minus|negative)\s+)?(?P<sign>(?<![^\W_])[-+])?"
    r"(?P<body>(?<![.\w])\.\d[\d.,]*|\d[\d.,]*)(?P<tail>[^\W\d_]+\d[\w.,]*)?"
)
_INTEGER = re.compile(r"(\d+|\d{1,3}(?:,\d{3})+)(?:\.0+)?")


def integers(text: str) -> frozenset[str | None]:
    """Return every number that `text` mentions, as canonical decimal strings; None stands for one that is no integer."""
    written, left = han_integers(fold(text))
    folded = apart(left)
    found = {*written} | {_from_words(match) for match in _WORDS.finditer(folded)}
    return frozenset(found | {_from_digits(match) for match in _DIGITS.finditer(folded) if match["name"] is None})


def _canonical(digits: str, negative: bool) -> str:
    plain = "".join(str(unicodedata.decimal(c)) for c in digits).lstrip("0") or "0"
    return f"-{plain}" if negative and plain != "0" else plain


def _from_digits(match: re.Match[str]) -> str | None:
    whole = _INTEGER.fullmatch(match["body"].rstrip(".,"))
    if whole is None or match["tail"] is not None:
        return None
    return _canonical(whole[1].replace(",", ""), match["sign"] == "-" or match["minus"] is not None)


def _from_words(match: re.Match[str]) -> str | None:
    if match["scale"] is not None:
        return None
    value = 100 * _UNITS.get(match["hundreds"] or "", 1) if match["hundred"] else 0
    for word in re.split(r"[\s-]+", match["rest"] or match["below"] or ""):
        value += _UNITS.get(word, 0) + _TEENS.get(word, 0) + _TENS.get(word, 0)
    return _canonical(str(value), match["minus"] is not None)
