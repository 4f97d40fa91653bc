"""Short texts brought to one form, so that equal answers are equal strings.

Owner: rewards. Pure. Equality after this normalisation is the whole rule for `text` answers: containing the
expected phrase is not enough, or a model that lists every colour would be right about all of them.
"""

from __future__ import annotations

import re
import unicodedata

_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼ`´"), "'")
_MINUS = dict.fromkeys(map(ord, "−–‒"), "-")
_ARTICLES = frozenset(("a", "an", "the"))
_DASH_BEFORE_DIGIT = re.compile(r"(?<![^\W_])-(?=\d)")
# Matched against words without punctuation, apostrophes or articles: "It's a ..." has become "its ...".
_LEAD_IN = re.compile(
    r"(?:i (?:think|believe|guess|see)(?: that)?"
    r"|(?:it|this|that|there) (?:is|was)|its|thats|theres"
    r"|(?:correct |right |final )?answer(?: is| was)?"
    r"|(?:colou?r|shape|object|number|word|name|text) (?:is|was)) (?=.)"
)


def fold(text: str) -> str:
    """NFKC and casefold, with one kind of apostrophe and one kind of minus sign."""
    # Apostrophes first: NFKC turns the acute accent into a space and a combining mark.
    plain = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold()
    return unicodedata.normalize("NFKC", plain).translate(_MINUS)


def normalise(text: str) -> str:
    """`text` without case, punctuation, articles, extra spaces and lead-ins ("it is", "the colour is").

    A sign before a digit stays ("-3" is not "3"). Nothing is dropped if nothing would be left: the answer
    "the" or "?" is still itself.
    """
    folded = fold(text)
    signed = _DASH_BEFORE_DIGIT.sub("−", folded.replace("'", ""))
    words = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in signed).split()
    if not words:
        return " ".join(folded.split())
    phrase = " ".join([word for word in words if word not in _ARTICLES] or words)
    while lead := _LEAD_IN.match(phrase):
        phrase = phrase[lead.end() :]
    return phrase
