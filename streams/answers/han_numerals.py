"""Numbers written in Chinese characters, in kana and in Hangul.

Pure. Characters for numbers are also parts of ordinary words (一起, 三明治, 十分), and nothing but the words
around tells them apart. So a numeral counts only where it can be nothing else: before a measure word (三个, 十二分钟), or
standing by itself, between the ends of a phrase and the few words that introduce, join or follow a number (是三, 三或四,
三です). A numeral anywhere else is no mention: it makes no response right, and it does not spoil one. 一个 is "one" as well
as "a", and counts as 1: a response that offers it beside another number hedges. What is a number but no certain whole one
(三四个, 三点五, 三分之一, 十几个, 三个半) is a mention of the value None, and so is a number that is denied or only a bound
(不是三个, 不到3个, 3匹以上, 20多人).
"""

from __future__ import annotations

import re

from streams.answers.scripts import HANGUL


def _longest_first(words: str) -> str:
    return "|".join(sorted(dict.fromkeys(words.split()), key=len, reverse=True))


_DIGIT_VALUES = {character: value for value, row in enumerate(
    ("〇零", "一壹", "二两兩贰貳", "三叁參", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
) for character in row}  # fmt: skip
_UNIT_VALUES = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_BIG_VALUES = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_ONE = "".join({**_DIGIT_VALUES, **_UNIT_VALUES, **_BIG_VALUES})

_MEASURE = _longest_first(
    "个 個 箇 ヶ 只 隻 条 條 张 張 辆 輛 台 臺 匹 头 頭 位 名 人 件 本 支 枝 枚 颗 顆 粒 块 塊 片 根 朵 棵 座 栋 棟 层 層 "
    "间 間 家 扇 把 杯 瓶 盒 箱 袋 包 碗 盘 盤 双 雙 对 對 副 套 组 組 群 排 列 行 页 頁 篇 首 幅 部 架 艘 种 種 类 類 样 樣 "
    "次 回 遍 场 場 趟 步 岁 歲 歳 才 年 天 日 周 週 星期 小时 小時 時間 时 時 分钟 分鐘 分 秒 刻 元 円 圆 圓 美元 点 點 月 "
    "米 公尺 厘米 毫米 公里 千米 厘 毫 英 平方 立方 克 千克 公斤 斤 吨 噸 升 毫升 度 倍 号 號 楼 樓 门 門 道 句 字 点钟 點鐘 "
    "月份 つ 冊 杯 羽 軒 階 番 株 着 足 通 機 丁 头 員 口 笔 筆 节 節 课 課 项 項 格 轮 輪 圈 串 束 堆 份 滴 阵 陣 代 届 级 級 "
    r"盏 盞 顶 頂 罐 壶 壺 桶 篮 籃 筐 盆 册 款 声 聲 票 局 下(?=\W|$) 面(?=[旗镜鏡墙牆鼓]) 所(?=[学學大医醫])"
)
"""Not 角 and 边: 五角星 and 六边形 are shapes."""

# Where a numeral is part of another word. Looked up before any number is.
_ORDINARY = re.compile(
    # A numeral before or behind makes the same characters a number: 十一点, 二十分钟, 一千万个.
    rf"(?<![{_ONE}])(?:"
    r"一(?:共|起|样(?!东)|樣|些|下|点(?!钟)|點(?!鐘)|直|定|般|边|邊|旦|切|致|时|時(?!間)|会|會|向|再|带|帶|生|同|并|併|律|概|贯|"
    r"部分|番|緒|応|旦|度も)"
    rf"|(?:十分|千万|百万富翁)(?![{_ONE}钟鐘之{'个個只隻'}])"
    r"|(?:(?<!分)之|[统統唯同单單万萬另某每这這那哪任专專合逐不其])一(?![百千])"
    r"|[上下前后後]一(?=[个個次位年天])"
    r"|(?:两|兩)(?:边|邊|侧|側|旁|者|样|樣)"
    r"|三(?:明治|角|轮车|輪車|脚架|文鱼)|四(?:周|川|处|處|季)|五(?:官|星|金)|七夕|八(?:卦|爪)|九州|十(?:字|足)|百(?:合|货|貨)"
    # Not even one: 一个也没有, 一つもない.
    rf"|一(?:{_MEASURE})?(?:[也都](?=[没沒不无無])|も)|ひと[つり]も"
    r")"
    # Ordinals and days of the week name a place in a row, and count nothing.
    rf"|第\s*[{_ONE}]+|(?:周|週|星期|礼拜|禮拜)[一二三四五六](?!(?:{_MEASURE}))"
)
_PLACEHOLDER = "\ue001"
_LONGEST = 20
"""Characters of a numeral that is read; a longer one is a number, but no answer."""

_BEFORE = "是为為有共计計等于於得到至或者和与與及跟加还還选選答案数數约約仅僅只才就说說看见見成は、は"
_AFTER = "是或者和与與及跟到至还還吧呢了啊呀哦哈嘛か"
_AFTER_WORDS = re.compile("です|でした|である|だ|입니다|이에요|예요")

# 三个半圆 and 三个多边形 are three shapes.
_AND_A_HALF = "半(?![圆圓球径徑透身])|多(?![余餘边邊彩云雲])"
_NUMBER = re.compile(
    rf"(?P<minus>minus )?(?P<before>几|幾|数|數|好几)?"
    rf"(?P<run>[{_ONE}]+)"
    rf"(?P<more>[多几幾余餘来來](?=(?:{_MEASURE}|[{'万萬亿億'}])))?"
    rf"(?P<fraction>(?:分之|点|點|・)[{_ONE}]+)?"
    rf"(?P<measure>(?:{_MEASURE})(?P<half>{_AND_A_HALF})?)?"
)
_HALF = re.compile(rf"一半|(?<![多大上下前后後左右])半(?![圆圓径徑])(?=(?:{_MEASURE}))")
_PAIRS = {"俩": 2, "倆": 2, "仨": 3}
_UNITS_OF_THOUSANDS = "克米瓦卡帕赫焦"
_THOUSANDS_OF = tuple(_UNITS_OF_THOUSANDS)
_SCALED = re.compile(
    rf"(?P<digits>\d[\d,.]*)[^\S\n]*(?P<scale>[十百千万萬亿億]+)(?P<rest>[\d{_ONE}]*)(?P<unit>[{_UNITS_OF_THOUSANDS}]?)"
)
_MINUS = re.compile(rf"(?:负|負|零下|マイナス|마이너스|영하)\s*(?=[\d{_ONE}])")

_KANA = {
    "ひとつ": 1,
    "ふたつ": 2,
    "みっつ": 3,
    "よっつ": 4,
    "いつつ": 5,
    "むっつ": 6,
    "ななつ": 7,
    "やっつ": 8,
    "ここのつ": 9,
    "ひとり": 1,
    "ふたり": 2,
    "ゼロ": 0,
}
_KANA_WORD = re.compile("|".join(_KANA))
_HANGUL_ALONE = {"하나": 1, "둘": 2, "셋": 3, "넷": 4, "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9, "열": 10}
_HANGUL_UNITS = {"한": 1, "두": 2, "세": 3, "네": 4, "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9}
_HANGUL_TENS = {"열": 10, "스물": 20, "서른": 30, "마흔": 40}
_COUNTERS = "개|명|마리|대|번(?!째)|살|권|장|사람|송이|그루|잔|병|채|곳|가지|시간|시|켤레|자루|분|줄|층"
_PARTICLES = "입니다|이에요|예요|이요|요|이다|이고|이|은|는|와|과|이나|또는|뿐"
_HANGUL_NUMBER = re.compile(
    rf"(?<![{HANGUL}])(?:(?P<alone>{'|'.join(k for k in _HANGUL_ALONE if k != '열')})(?:{_PARTICLES})?(?![{HANGUL}])"
    rf"|(?P<tens>{'|'.join(_HANGUL_TENS)}|스무)?(?P<unit>{'|'.join(_HANGUL_UNITS)})?(?:\s+|(?<=[섯곱덟홉열무물른흔])|(?=개|명|마리))"
    rf"(?:{_COUNTERS})(?:{_PARTICLES})?(?![{HANGUL}]))"
)
_INEXACT = re.compile(
    rf"(?:不(?:是|到|足|止|只|超过|超過)|[没沒]有|超过|超過|[多少大小高低][于於]|至少|起码|起碼)[是有]?\s*(?=[{_ONE}\d])"
    rf"|(?:[{_ONE}\d]|(?<![{HANGUL}])(?:{'|'.join(_HANGUL_UNITS)}|열|스무)\s)\s*(?:{_MEASURE}|{_COUNTERS})?"
    r"(?:以[上下内內]|未[満满滿]|で(?:は|も)?(?:ない|ありません)|じゃ(?:ない|ありません)"
    r"|\s*(?:이상|이하|미만)|[이가은는도]\s*(?:아니|아닙|아닌|없))"
    rf"|\d(?:{_MEASURE})?(?:{_AND_A_HALF})|\d(?:[几幾余餘]|[来來](?={_MEASURE}))"
)
"""A number that is denied, or a bound, or more than the digits before it: 不是3个, 3개 이상, 20多个."""


def han_integers(folded: str) -> tuple[frozenset[str | None], str]:
    """Return (the numbers that `folded` mentions in these scripts, the text left for digits and English words).

    The text left is `folded` with "minus " for 负 and the like, and without digits that a Chinese scale follows (3万).
    """
    text = _MINUS.sub(" minus ", folded)
    found: set[str | None] = set()

    def scaled(match: re.Match[str]) -> str:
        if match["unit"] and match["scale"] == "千" and not match["rest"]:
            return match["digits"] + _PLACEHOLDER * 2
        found.add(_scaled_value(match))
        return _PLACEHOLDER

    text = _SCALED.sub(scaled, text)
    if not any(character >= "\u1100" for character in text):
        return frozenset(found), text
    plain = _ORDINARY.sub(lambda match: _PLACEHOLDER * len(match[0]), text)
    found |= {_number(plain, match) for match in _NUMBER.finditer(plain) if _counts(plain, match)}
    if _HALF.search(plain) or _INEXACT.search(plain):
        found.add(None)
    found |= {str(value) for pair, value in _PAIRS.items() if pair in plain}
    found |= {str(_KANA[match[0]]) for match in _KANA_WORD.finditer(plain)}
    found |= {value for match in _HANGUL_NUMBER.finditer(plain) if (value := _hangul(match)) is not None}
    return frozenset(found), text


def _counts(text: str, match: re.Match[str]) -> bool:
    """Return whether the numeral can be nothing but a number (see the head of the module)."""
    start, end = match.start("run"), match.end()
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    if before.isdecimal() or after.isdecimal():
        return False
    if match["run"] == "千" and text.startswith(_THOUSANDS_OF, match.end("run")):
        return False  # 千克 and 千米 are units
    if match["before"] or match["more"] or match["fraction"] or match["minus"] or match["measure"]:
        return True
    return _open(before, _BEFORE) and (_open(after, _AFTER) or _AFTER_WORDS.match(text, end) is not None)


def _open(neighbour: str, words: str) -> bool:
    """Return whether `neighbour` is the end of a phrase, or one of the `words` that go with a number."""
    return not neighbour or neighbour in words or not (neighbour.isalnum() or neighbour == _PLACEHOLDER)


def _number(text: str, match: re.Match[str]) -> str | None:
    if match["before"] or match["more"] or match["fraction"] or match["half"]:
        return None
    run = match["run"]
    if len(run) > 1 and run[-1] == "千" and text.startswith(_THOUSANDS_OF, match.end("run")):
        run = run[:-1]  # 三千克: kilograms
    value = value_of(run)
    if value is None:
        return None
    return f"-{value}" if match["minus"] and value else str(value)


def value_of(run: str) -> int | None:
    """Return the number that Chinese digits and units write; None if it is not certain ("三四", "三百五")."""
    if len(run) > _LONGEST:
        return None
    if len(run) > 1 and all(character in _DIGIT_VALUES for character in run):
        # Digit by digit, as years are (一九九八, 二〇二四); but 三四 is "three or four".
        plain = len(run) >= 4 or "〇" in run or "零" in run
        return int("".join(str(_DIGIT_VALUES[character]) for character in run)) if plain else None
    total = section = 0
    digit: int | None = None
    zero, last = False, 10**9
    for character in run:
        if character in _DIGIT_VALUES:
            if digit is not None:
                return None
            if _DIGIT_VALUES[character] == 0 and len(run) > 1:
                zero = True
                continue
            digit = _DIGIT_VALUES[character]
        elif character in _UNIT_VALUES:
            unit = _UNIT_VALUES[character]
            if unit >= last:
                return None
            section, digit, last, zero = section + (1 if digit is None else digit) * unit, None, unit, False
        else:
            big = _BIG_VALUES[character]
            if (not section and digit is None) or (total >= 10**8 and big == 10**8):
                return None
            part = section + (digit or 0)
            total = (total + part) * big if big == 10**8 else total + part * big
            section, digit, last, zero = 0, None, 10**9, False
    if digit is not None and total + section and last != 10 and not zero:
        return None
    return total + section + (digit or 0)


def _scaled_value(match: re.Match[str]) -> str | None:
    """Return the value of digits and a scale ("3万", "2千"); None if more follows or the digits are no whole number."""
    value = {**_UNIT_VALUES, **_BIG_VALUES}.get(match["scale"])
    digits = match["digits"].replace(",", "")
    if value is None or match["rest"] or not digits.isdecimal() or len(digits) > 18:
        return None
    return str(int(digits) * value)


def _hangul(match: re.Match[str]) -> str | None:
    if match["alone"]:
        return str(_HANGUL_ALONE[match["alone"]])
    tens, unit = match["tens"], match["unit"]
    if not tens and not unit:
        return None
    return str((20 if tens == "스무" else _HANGUL_TENS.get(tens or "", 0)) + _HANGUL_UNITS.get(unit or "", 0))
