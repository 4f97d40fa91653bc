"""Answers in scripts without spaces between words: a letter or digit beside them stands alone; hedging stays wrong."""

import string
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rewards import correct_answers, is_correct
from rewards.thinkstream import literal_answer
from streams.answers.choices import letters, polarity
from streams.answers.han_numerals import value_of
from streams.answers.numerals import integers
from tests.support.rewards import cases, make_task, outcome

RIGHT = {
    ("B", "choice"): "选B|答案是B|B。|（Ｂ）|选项B|B项|Ｂ|我选B。|应该是B吧|Bです|Bだと思う|답은 B입니다|B번|「B」"
    "|是B，因为它是红色的|B、红色|答案：B|【B】|b项|选择B|B选项|B 是对的|ตอบB|ຂໍ້B",
    ("A", "choice"): "选A|答案是A|A是对的|A。|选A吧|A项|选项A red|（Ａ）|Aです|답은 A입니다|A 红色",
    ("I", "choice"): "选I|I项",
    ("C. 红色", "choice"): "C|选C|红色|C红色|是红色|C。红色|是红色的",
    ("选项C", "choice"): "C|选C",
    ("答案：C", "choice"): "C",
    ("3", "integer"): "3|有3个|3只|３个|共3只|มี3ตัว|3개|3개입니다|图中有3个人|第3个|3匹|3つ|มี๓ตัว"
    "|三个|有三只猫|一共三个|一共有三只|答案是三|三|三。|答案：三|是三个。|图中有三辆车。|我看到三个人|大约三个|三岁|三点|三月"
    "|里面一共有三个。|有三个，在桌子上|十字路口有三辆车|我一直看到三个|三个人一起走|万一有三个|仨|叁|三千克|3千克"
    "|三匹です|三つ|みっつ|三人|答えは三|三です|세 개|셋|셋입니다|세 명입니다",
    ("2", "integer"): "两个|二|俩|有两只|两边有两个|二つ|ふたつ|두 개|둘",
    ("12", "integer"): "十二|十二个|12个|一共十二个|열두 개",
    ("10", "integer"): "十个|十|10个|十分钟|열 개",
    ("20", "integer"): "二十个|二十|有二十只|스무 명",
    ("100", "integer"): "一百|一百个|百个",
    ("105", "integer"): "一百零五个|一百〇五",
    ("1", "integer"): "一个|一|有一个人|1个|是一|一只|一共一个|ひとつ|하나|한 명|十字路口有一辆车",
    ("-3", "integer"): "负三|零下三度|-3度|是-3|负3",
    ("30000", "integer"): "3万|三万|30000个|3 万",
    ("3000", "integer"): "三千个|3千",
    ("120000000", "integer"): "一亿二千万",
    ("0", "integer"): "零|0个|零个",
    ("2024", "integer"): "二〇二四年|2024年",
    ("1998", "integer"): "一九九八年",
    ("三", "integer"): "3|三个|three",
    ("yes", "yes_no"): "是|是的|对|有|没错|はい|네|是的，有一只猫|yes，有|对，是猫|はい、そうです|네, 맞아요|네 있어요"
    "|答案是对|答案：是|答案是yes",
    (
        "no",
        "yes_no",
    ): "不是|没有|不对|否|不|いいえ|아니요|没有猫|不，是狗|图里没有猫|아니요, 없어요|いません|猫はいません|不是的",
    ("是", "yes_no"): "是|是的|yes|对|有",
    ("没有", "yes_no"): "没有|no|不是|没有。",
    ("红色", "text"): "红色|红色。|「红色」|是红色|是红色的|答案是红色|答案为红色|红 色|它是红色的",
    ("赤", "text"): "赤|赤です|赤。|答えは赤です",
    ("빨간색", "text"): "빨간색|빨간색입니다.|정답은 빨간색입니다",
}
RIGHT_OF_THE_FORMS_AROUND = {
    ("B", "choice"): "B没错|要不选B|B不错|B是对的，没有别的",
    ("B. 红色的车", "choice"): "应该是红色的车",
    ("yes", "yes_no"): "确实|确实是|的确是|会的",
    ("no", "yes_no"): "不存在|无|선수 없습니다|没有显示猫",
    (
        "3",
        "integer",
    ): "三盏灯|三顶帽子|敲了三下|三面旗|三桶|三声|3个半圆|三个半圆|3个多边形|三个多边形|3个左右|3명 있고 다른 사람이 없습니다",
    ("2", "integer"): "ふたり|ふたりです",
    ("1", "integer"): "ひとり",
    ("0", "integer"): "ゼロ",
    ("红色", "text"): "应该是红色的",
}
DENIED_OR_INEXACT = {
    (
        "B",
        "choice",
    ): "不是B|不选B|没选B|并非B|B不对|B是错的|B错误|B选项不正确|排除B|B以外|Bではない|Bではありません|Bじゃない"
    "|B 아닙니다|B가 아니에요|B번은 틀렸습니다|ไม่ใช่ B|不是选项B|不是“B”",
    ("B. 红色", "choice"): "不是B|不是红色|B不对",
    (
        "3",
        "integer",
    ): "不是3个|不是三个|没有三个|没有3个|不到三个|不到3个|超过三个|不止3个|少于3个|多于三个|至少三个|3个以上|三人以上"
    "|3匹未満|3匹ではない|三匹ではありません|3개 이상|세 개 이상|3개 미만|3개가 아닙니다"
    "|3个半|3点半|3个多|3多个|3几个|周三下午|周三面试",
    ("20", "integer"): "20多个|20几个|20余人",
    ("1", "integer"): "没有一个|不止一个|ひとりもいない|一面走一面说",
    (
        "no",
        "yes_no",
    ): "알 수 없습니다|판단할 수 없습니다|정보가 없습니다|情報がありません"
    "|没有看清|没有足够的信息|沒有辦法判斷|没有把握|没有明确的答案",
}
WRONG = {
    (
        "B",
        "choice",
    ): "B，也可能选C|B或C|B、C|A和B都对|不是A，是B|选A|AB|B2层|BC|A或B|选C或者B|维生素B|B也行C也行|A・B|B还是D"
    "|BかC|A 또는 B|Ｂ或Ｃ|红色",
    ("A", "choice"): "这是a red car|选B",
    ("T", "choice"): "T恤|Tシャツ",
    ("C. 红色", "choice"): "蓝色|选D|项|红色或蓝色",
    (
        "3",
        "integer",
    ): "三个或四个|3个或4个|三或四|三四个|三、四个|三到五个|3到5个|十三个|三十|三万|3万|三明治|第三|三点五|三分之一"
    "|百分之三|三个半|十几个|三个多|不是三个，是四个|3点5|三十个|一个或三个|三千克和两克|周三|四|3.5个|负三|负3|三或一"
    "|세 개 또는 네 개|셋 아니면 넷|3개나 4개|三个还是四|三和四|三角形|有B3|几个|3个4|三百五",
    (
        "1",
        "integer",
    ): "一起|一样|第一|一些|一下|统一|万一|一点|一共|每一个|唯一|一直在走|一半|一定|之一|下一个"
    "|一个也没有|一个都没有|一つもない|ひとつもない",
    ("10", "integer"): "十分|十足|十分好|数十个|几十个|十多个|十来个",
    ("2", "integer"): "两边|两三个|二三|俩或三个",
    ("5", "integer"): "五角星|五星",
    ("1000", "integer"): "千万小心|千克",
    (
        "yes",
        "yes_no",
    ): "不是|是不是|有没有|可能是|也许有|不知道|是，也不是|有可能|是吗|네 개|是或者不是|不一定|有时有|はい、いいえ"
    "|是没有|不|没有|すいません|yes或no",
    ("no", "yes_no"): "有没有|不知道|不错|不一定|没问题|是|不清楚|可能不是|すいません",
    ("红色", "text"): "红色，蓝色|不是红色|红|红色蓝色",
    ("什么", "text"): "为什么",
    ("否", "text"): "是否",
}


@pytest.mark.parametrize(("response", "expected", "kind"), cases(RIGHT_OF_THE_FORMS_AROUND))
def test_more_spellings_that_are_right(response, expected, kind):
    assert is_correct(response, expected, kind)


@pytest.mark.parametrize(("response", "expected", "kind"), cases(DENIED_OR_INEXACT))
def test_what_is_denied_or_no_certain_number_or_cannot_be_told_is_wrong(response, expected, kind):
    assert not is_correct(response, expected, kind)


@pytest.mark.parametrize(("response", "expected", "kind"), cases(RIGHT))
def test_spellings_that_are_right(response, expected, kind):
    assert is_correct(response, expected, kind)


@pytest.mark.parametrize(("response", "expected", "kind"), cases(WRONG))
def test_responses_that_are_wrong(response, expected, kind):
    assert not is_correct(response, expected, kind)


# Han without numerals and what makes numbers of digits (3万, 负3, 百分之3), kana, Hangul, Thai.
PLAIN = st.text(
    st.sampled_from(
        "的红色猫选答案是在看到我你他车上下左右图里东西很好看のはがをでもねです猫犬車입니다은는이가고양자동차กขคงจ，。、！「」"
    ),
    max_size=6,
)
LETTERS = st.sampled_from(string.ascii_uppercase)


@given(LETTERS, LETTERS, PLAIN, PLAIN, PLAIN)
@example("I", "B", "", "", "，")
@example("I", "A", "选", "，", "，因为")
def test_such_text_around_a_letter_changes_nothing_and_two_letters_are_wrong(said, other, before, between, after):
    text = before + said + after
    assert letters(text) == {said.lower()}
    assert is_correct(text, said, "choice")
    assume(said != other)
    assert not is_correct(text, other, "choice")
    assume(between)
    assert not is_correct(before + said + between + other + after, said, "choice")


@given(st.integers(0, 10**12), st.integers(0, 10**12), PLAIN, PLAIN, PLAIN)
def test_such_text_around_a_number_changes_nothing_and_two_numbers_are_wrong(said, other, before, between, after):
    text = f"{before}{said}{after}"
    assert integers(text) == {str(said)}
    assert is_correct(text, str(said), "integer")
    assume(said != other)
    assert not is_correct(text, str(other), "integer")
    assume(between.strip("，。、"))
    assert not is_correct(f"{before}{said}{between}{other}{after}", str(said), "integer")


def chinese(number: int) -> str:
    """As it is read out, below a hundred million."""
    digits = "零一二三四五六七八九"
    if number >= 10**4:
        high, low = divmod(number, 10**4)
        gap = "零" if 0 < low < 1000 else ""
        return chinese(high) + "万" + gap + (chinese(low) if low else "")
    said, zero = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, unit)
        if digit:
            said += ("零" if zero else "") + digits[digit] + name
            zero = False
        elif said and number:
            zero = True
    return said or digits[0]


SAYINGS = ["{}个", "有{}只猫", "一共{}个", "答案是{}", "{}", "{}。", "是{}辆", "{}です", "第二排有{}人"]


@given(st.integers(0, 10**8 - 1), st.integers(0, 10**8 - 1), st.sampled_from(SAYINGS), st.sampled_from("或和、到"))
def test_chinese_numerals_of_any_size(number, other, saying, joint):
    assert value_of(chinese(number)) == number
    text = saying.format(chinese(number))
    assert is_correct(text, str(number), "integer"), text
    assert is_correct(saying.format(number), str(number), "integer")
    assert not is_correct(text, str(number + 1), "integer")
    assume(other != number)
    assert not is_correct(f"{chinese(number)}个{joint}{chinese(other)}个", str(number), "integer")
    assert not is_correct(f"{chinese(number)}{joint}{other}", str(number), "integer")


def test_ten_to_nineteen_and_the_formal_characters():
    assert [value_of("十" + digit) for digit in "一二三"] == [11, 12, 13]
    assert [value_of(run) for run in ("两千", "貳佰", "拾", "〇", "二〇二四")] == [2000, 200, 10, 0, 2024]
    assert [value_of(run) for run in ("三四", "三百五", "一万二", "百千", "万", "十十", "三亿亿")] == [None] * 7


@pytest.mark.parametrize(
    "text", ["三" * 10000, "三个" * 5000, "一 " * 5000, "〇" * 9000, "选A" * 4000, "第" * 9000, "3万" * 3000]
)
@pytest.mark.parametrize(("expected", "kind"), [("C", "choice"), ("3", "integer"), ("yes", "yes_no"), ("红", "text")])
def test_long_responses_are_judged_quickly(text, expected, kind):
    began = time.process_time()
    is_correct(text, expected, kind)
    assert time.process_time() - began < 2.0


@given(
    st.text(
        st.characters(min_codepoint=0x0E00, max_codepoint=0xFFFF, exclude_categories=("Cs",))
        | st.sampled_from("3A三十两一负半")
    )
)
def test_any_text_is_judged_without_an_error(text):
    for expected, kind in (("A", "choice"), ("3", "integer"), ("yes", "yes_no"), ("红", "text")):
        assert isinstance(is_correct(text, expected, kind), bool)
    assert polarity(text) in (True, False, None)


def test_the_published_reward_reads_answers_as_published():
    """Whole responses of A to E, yes or no, one ASCII digit, and nothing else, in whatever script."""
    read = {"B": "B", "(B)": "B", "B.": "B", "yes": "yes", "No": "no", "3": "3", " C ": "C"}
    unread = [
        "选B",
        "答案是B",
        "有3个",
        "三个",
        "三",
        "是",
        "没有",
        "（Ｂ）",
        "Ｂ",
        "３",
        "B。",
        "F",
        "10",
        "Yes.",
        "B或C",
        "네",
    ]
    assert {text: literal_answer(text) for text in read} == read
    assert [literal_answer(text) for text in unread] == [None] * len(unread)


def test_correct_answers_in_a_stream():
    task = make_task([1.0, 6.0], [(3.0, "B", "choice", 0), (8.0, "3", "integer", 1)])
    assert correct_answers(outcome(task, {3: "选B", 8: "有三只猫"})) == (True, True)
    assert correct_answers(outcome(task, {3: "B，也可能选C", 8: "三四只"})) == (False, False)
