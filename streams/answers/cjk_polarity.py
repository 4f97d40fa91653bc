"""Yes and no in Chinese, Japanese and Korean.

Pure. A phrase (between punctuation) says yes or no if, up to its particles, it is one of the known
answers, or if it denies by its own words (没有猫, 不是红色, "there is no ..."). Anything else says nothing: 有可能, 也许是,
不知道, and that it cannot be told (没有看清, 정보가 없습니다, 알 수 없습니다). A question put back (是不是, 有没有)
says nothing either.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_YES = _words(
    "是 是的 对 對 对的 對的 没错 沒錯 正确 正確 有 有的 会 會 能 可以 嗯 在 当然 當然 当然是 當然是 是这样 是這樣 "
    "会的 會的 确实 確實 确实是 確實是 确实有 確實有 的确 的確 的确是 的確是 "
    "はい うん ええ そう そうです はいそうです その通りです あります います 正しい 正しいです "
    "네 예 응 맞아 맞아요 맞습니다 맞다 그렇습니다 그래요 있어요 있습니다 있다 네맞습니다 네맞아요 네있습니다 "
    "예맞습니다"
)
_NO = _words(
    "不 否 没 沒 没有 沒有 不是 不是的 不对 不對 错 錯 错误 錯誤 不正确 不正確 不会 不會 不能 不可以 不在 没在 不存在 无 無 "
    "いいえ いえ いや ううん ちがう 違う ちがいます 違います ない ないです ありません いません そうではありません 正しくない "
    "아니요 아니오 아뇨 아니 아닙니다 아니에요 아니다 없어요 없습니다 없다 틀렸습니다 틀려요 아니요없습니다"
)
_ASKS = re.compile(r"(.)[不没沒]\1|有[没沒]有|[是能会會可有]否|[吗嗎]|可能|也许|也許|或许|或許|大概|不一定")
_RIEUL = "".join(map(chr, range(0xAC08, 0xD7A4, 28)))
"""The syllables that end in ㄹ, as a verb does before 수 없다, "cannot"; 선수 없습니다 is "there is no athlete"."""
_CANNOT_TELL = re.compile(
    rf"[没沒]有.*(?:信息|資訊|资讯|证据|證據|判断|判斷|确定|確定|确认|確認|清|把握|足够|足夠|办法|辦法|明确|明確)"
    rf"|(?:情報|手がかり)[はがも]|(?:정보|근거)[가는도]?없|[{_RIEUL}]수[가는도]?없"
)
_DENIES = re.compile(r"[没沒]有|不是|(?:^|[はがもに])(?:い|あり)ません|없습니다|없어요")
_DENIES_TWICE = re.compile(r"(?:不是|并非|並非)[没沒]|[没沒]有不|[没沒]有(?:问题|問題|错|錯)|不[得能]不")
_LEAD = re.compile(
    r"^(?:我(?:认为|認為|觉得|覺得|想|看)|(?:正确|正確)?答案(?:应该|應該)?(?:是|为|為)?|回答是?|答えは|正解は|정답은|답은|제생각에는?)"
)
_TAIL = re.compile(r"(?<=.)[啊呀哦喔呢哟喲了嗯哒滴]+$")
_PHRASE = re.compile(r"[^\W_]+")
_CJK = re.compile("[\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7ff]")


def said_by(folded: str) -> frozenset[bool]:
    """Return which of yes (True) and no (False) the phrases of `folded` say."""
    if not _CJK.search(folded):
        return frozenset()
    found = (_phrase(part) for part in re.split(r"[^\w\s]|[\n_]", folded))
    return frozenset(said for said in found if said is not None)


def _phrase(part: str) -> bool | None:
    words = _PHRASE.findall(part)
    phrase = "".join(words)
    if not phrase or _ASKS.search(phrase) or _CANNOT_TELL.search(phrase):
        return None
    for form in (phrase, _TAIL.sub("", phrase), _LEAD.sub("", phrase)):
        if form in _YES or form in _NO:
            return form in _YES
    if _DENIES_TWICE.search(phrase):
        return None
    if _DENIES.search(phrase):
        return False
    # The answer comes first in Korean, set off by a space: 네 있어요. But 네 개 is "four pieces".
    if len(words) > 1 and words[0] in _YES | _NO and (words[0] != "네" or words[1] in _YES):
        return words[0] in _YES
    return None
