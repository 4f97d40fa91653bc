"""Which option letters, and which of yes and no, a response mentions.

Owner: rewards. Pure, and blind to case. The rules for a lone letter, in order:
- a letter inside a word, a contraction ("I'd", "A's"), a hyphenated word ("T-shirt") or an abbreviation
  ("e.g.") never counts;
- any other letter standing alone counts, except A and I, which are English words;
- A and I count where they cannot be the article or the pronoun: directly before punctuation or the end of a
  line ("A.", "A)", "**A**"), before a spaced dash ("A - red"), before "or", "nor", "and", "but", "not",
  "is", "because", "since", or directly after "option", "choice" or "letter". "A red car" mentions no letter.
  "I," is a pronoun.
"""

from __future__ import annotations

import re

from rewards.phrases import fold

YES = frozenset(("yes", "y", "yeah", "yep", "yup"))
NO = frozenset(("no", "n", "nope", "nah"))

_ABBREVIATION = re.compile(r"(?<![^\W_])(?:[a-z]\.){2,}(?![^\W_])")
_LONE_LETTER = re.compile(r"(?<![^\W_])(?<![^\W_][-'])([a-z])(?![^\W_]|[-'][^\W_])")
_NOT_A_WORD = re.compile(r"[^\S\n]*(?:$|\n|-\s|—|(?:or|nor|and|but|not|is|because|since)(?![^\W_]))|[^\w\s]|_")
_NAMED = re.compile(r"(?<![^\W_])(?:option|choice|letter)\s*[:=]?\s*$")
_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_EXPECTED = re.compile(r"[\W_]*([a-z])(?![^\W_]|[-'][^\W_])")


def letters(text: str) -> frozenset[str]:
    """The option letters that `text` mentions, as lower-case letters."""
    folded = _ABBREVIATION.sub(" ", fold(text))
    return frozenset(m[1] for m in _LONE_LETTER.finditer(folded) if _is_letter(folded, m))


def _is_letter(text: str, match: re.Match[str]) -> bool:
    if match[1] not in "ai" or _NAMED.search(text, 0, match.start()):
        return True
    if match[1] == "i" and text.startswith(",", match.end()):
        return False
    return _NOT_A_WORD.match(text, match.end()) is not None


def expected_letter(text: str) -> tuple[str | None, str]:
    """The letter that an expected choice begins with, and the text after it ("C. red" -> "c", ". red")."""
    folded = fold(text)
    match = _EXPECTED.match(folded)
    return (match[1], folded[match.end() :]) if match else (None, folded)


def polarity(text: str) -> bool | None:
    """True for yes, False for no, None if neither or both are said as whole words."""
    words = set(_WORD.findall(fold(text)))
    says_yes, says_no = bool(words & YES), bool(words & NO)
    return None if says_yes == says_no else says_yes
