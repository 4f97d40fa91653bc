"""Normalises short texts, so that equal answers are equal strings.

Pure. Equality after this normalisation is the whole rule for `text` answers: containing the
expected phrase is not enough, or a model that lists every colour would be right about all of them.
"""

from __future__ import annotations

import re
import unicodedata

from streams.answers.scripts import closed_up

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
_CJK_LEAD_IN = re.compile(
    r"(?:我(?:认为|認為|觉得|覺得|看到|看见)|(?:(?:正确|正確)?答案|它|这|這|那|颜色|顏色|形状|形狀)(?:应该|應該)?(?:为|為|(?=是))|(?:应该|應該)(?=是)"
    r"|(?:答え|正解|これ|それ|色)は|(?:정답|답|그것|이것|색)은)\s*(?=.)"
)
_CJK_IS = re.compile(r"是(?!的$|否|不是)(.+?)的?", re.DOTALL)
_CJK_TAIL = re.compile(r"(?<=.)(?:です|でした|だと思います|입니다|이에요|예요)$")


def fold(text: str) -> str:
    """Return the text in NFKC and casefolded, with one kind of apostrophe and one kind of minus sign."""
    # Apostrophes first: NFKC turns the acute accent into a space and a combining mark.
    plain = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold()
    return unicodedata.normalize("NFKC", plain).translate(_MINUS)


def _without_frame(phrase: str) -> str:
    """Return a Chinese, Japanese or Korean phrase without what introduces an answer ("答案是红色", "是红色的", "赤です")."""
    phrase = closed_up(phrase)
    while True:
        predicate = _CJK_IS.fullmatch(phrase)
        shorter = predicate[1] if predicate else phrase
        shorter = _CJK_TAIL.sub("", _CJK_LEAD_IN.sub("", shorter))
        if shorter == phrase:
            return phrase
        phrase = shorter


def normalise(text: str) -> str:
    """Return `text` without case, punctuation, articles, extra spaces and lead-ins ("it is", "the colour is", "答案是").

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
    return _without_frame(phrase)
