"""Which option letters, and which of yes and no, a response mentions.

Pure, and blind to case. The rules for a lone letter, in order:
- a letter inside a word, a contraction ("I'd", "A's"), a hyphenated word ("T-shirt") or an abbreviation
  ("e.g.") never counts;
- any other letter standing alone counts, except A and I, which are English words;
- A and I count where they cannot be the article or the pronoun: directly before punctuation or the end of a
  line ("A.", "A)", "**A**"), before a spaced dash ("A - red"), before "or", "nor", "and", "but", "not",
  "is", "because", "since", or directly after "option", "choice" or "letter". "A red car" mentions no letter.
  "I," is a pronoun, "I，" is not: English has no fullwidth comma;
- in scripts without spaces a letter beside another character stands alone ("选B", "Bです", "B번"), and A and I count before
  such a character ("选A吧") and after 选项 and the like; a few words that begin or end with a letter are words (T恤, 维生素C).
A letter that such a script denies ("不是B", "Bではない") is mentioned, but chosen by nobody: see `denied`.
"""

from __future__ import annotations

import re

from streams.answers.cjk_polarity import said_by
from streams.answers.phrases import fold
from streams.answers.scripts import EDGE, apart

YES = frozenset(("yes", "y", "yeah", "yep", "yup"))
NO = frozenset(("no", "n", "nope", "nah"))

_ABBREVIATION = re.compile(r"(?<![^\W_])(?:[a-z]\.){2,}(?![^\W_])")
_LONE_LETTER = re.compile(r"(?<![^\W_])(?<![^\W_][-'])([a-z])(?![^\W_]|[-'][^\W_])")
_NOT_A_WORD = re.compile(rf"[^\S\n]*(?:$|\n|{EDGE}|-\s|—|(?:or|nor|and|but|not|is|because|since)(?![^\W_]))|[^\w\s]|_")
_NAMED = re.compile(r"(?<![^\W_])(?:option|choice|letter)\s*[:=]?\s*$")
_NAMED_CJK = re.compile(r"(?:选项|選項|选择|選擇|選択肢|선택지|보기)\s*[:=]?\s*$")
_VITAMIN = "|".join(f"(?<={word})" for word in ("维生素", "維生素", "维他命", "維他命", "ビタミン", "비타민"))
_CJK_WORDS = re.compile(rf"[ty](?=恤|シャツ)|e(?=メール)|x(?=光|射?[线線])|u(?=[盘盤])|(?:{_VITAMIN})[a-k]")
_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_EXPECTED = re.compile(rf"(?:[^\w{EDGE}]|_)*([a-z])(?![^\W_]|[-'][^\W_])")
_EXPECTED_LEAD = re.compile(
    r"[\W_]*(?:(?:正确|正確)?答案(?:是|为|為)?|选项|選項|选|選|選択肢|答えは?|정답은?)(?=[\W_]*[a-z])"
)
_LETTER = r"(?<![a-z0-9])[a-z](?![a-z0-9])"
_DENIED = re.compile(
    rf"(?:(?<!要)不(?:应该|應該|可能)?(?:是|会是|會是|选|選)|(?:没|沒)有?[选選]|(?:并|並)非|除了|排除|ไม่(?:ใช่|เลือก))"
    rf"(?:选项|選項|答案|ข้อ)?[\W_]*{_LETTER}"
    rf"|{_LETTER}[\W_]*(?:选项|選項|[项項番번])?[\W_]*(?:[也都]|肯定|一定|应该|應該)?"
    r"(?:不(?:对|對|是|正确|正確|可能)|是?[错錯](?!不)|以外|除外|(?:で|じゃ)は?(?:ありません|な[いく](?!か))"
    r"|[이가은는]?\s*(?:아니|아닙|아닌|아님|틀렸|틀린|틀립))"
)
_EXPECTED_TAIL = re.compile(r"[项項]|选项|選項|번")


def letters(text: str) -> frozenset[str]:
    """Return the option letters that `text` mentions, in lower case."""
    # Folded, a fullwidth comma would be the one after an English pronoun; "、" stays what it is.
    folded = _ABBREVIATION.sub(" ", _CJK_WORDS.sub(EDGE, fold(text.replace("，", "、"))))
    parted = apart(folded)
    return frozenset(m[1] for m in _LONE_LETTER.finditer(parted) if _is_letter(folded, parted, m))


def denied(text: str) -> bool:
    """Return whether `text` denies a letter that it mentions, in a script without spaces: "不是B", "B不对", "Bではない"."""
    return _DENIED.search(fold(text)) is not None


def _is_letter(folded: str, text: str, match: re.Match[str]) -> bool:
    if match[1] not in "ai" or _NAMED.search(text, 0, match.start()) or _NAMED_CJK.search(folded, 0, match.start()):
        return True
    if match[1] == "i" and text.startswith(",", match.end()):
        return False
    return _NOT_A_WORD.match(text, match.end()) is not None


def expected_letter(text: str) -> tuple[str | None, str]:
    """Return the letter that an expected choice begins with, and the text after it ("C. red" -> "c", ". red")."""
    folded = fold(text)
    lead = _EXPECTED_LEAD.match(folded)
    match = _EXPECTED.match(apart(folded), lead.end() if lead else 0)
    if match is None:
        return None, folded
    option = folded[match.end() :]
    return match[1], "" if _EXPECTED_TAIL.fullmatch(option.strip()) else option


def polarity(text: str) -> bool | None:
    """Return True for yes, False for no, None if the text says neither or both as whole words."""
    folded = fold(text)
    words, said = set(_WORD.findall(apart(folded))), said_by(folded)
    says_yes, says_no = bool(words & YES) or True in said, bool(words & NO) or False in said
    return None if says_yes == says_no else says_yes
