"""Spelling is forgiven, hedging is not."""

import string
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rewards import correct_answers, is_correct
from streams.answers.choices import letters
from streams.answers.numerals import integers
from tests.support.rewards import cases, make_task, outcome

RIGHT = {
    (
        "C",
        "choice",
    ): "C|c|(C)|C.|C. red|C) red|Answer: C|The answer is C.|**C**|option C|C: red|I think it's C"
    "|C because it is red|\\boxed{C}|[C]|Ｃ|__C__|‘C’|C - red|C. A red car is there|e.g. C",
    (
        "A",
        "choice",
    ): "A|a|(a)|A.|A) red|**A**|**A** red|option A|It's A|A - red|Answer: A|A is right|`A`|Choice A fits",
    ("B", "choice"): "I think it's B|I'd say B|B. I see it",
    ("I", "choice"): "I|(I)|I.|option I",
    ("C. red", "choice"): "C|c.|C. red|(C) red|red|It is red",
    ("A. a red car", "choice"): "A|A red car|A. red car",
    ("Yes", "yes_no"): "Yes.|yes|YES!|Yes, it is.|y|yeah",
    ("No.", "yes_no"): "no|No, it is not|nope|There is no car|n",
    ("10", "integer"): "10|10.|There are 10|ten|Ten!|10.0|+10|１０|10 (ten)|010|10s",
    ("1000", "integer"): "1,000|1000|1,000.",
    ("1,000", "integer"): "1000",
    ("-3", "integer"): "-3|−3|minus three|negative 3|It is -3.|(-3)",
    ("0", "integer"): "0|zero|-0|00",
    ("3", "integer"): "3|three|3...|...3|٣",
    ("121", "integer"): "a hundred and twenty-one|one hundred twenty one|121",
    ("42", "integer"): "forty-two|forty two",
    (
        "red",
        "text",
    ): "Red|It's red.|The colour is red|the answer is: red|**red**|a red|I think it's red|It’s red",
    ("-3", "text"): "-3|−3",
    ("the", "text"): "The|THE!",
    ("Straße", "text"): "STRASSE",
}
WRONG = {
    ("B", "choice"): "A|C or B|A or B|A, B|A/B|not A but B|A. red|vitamin-B|B2|bee||Because|B&B and C",
    ("C", "choice"): "Cats are nice|red|all of them|C and D|D|C. red D. blue",
    (
        "A",
        "choice",
    ): "A red car|A car|It is a red car|Answer: a red car|A or B|A and B|a T-shirt|a.m.|I|I'd say so|A's",
    ("T", "choice"): "T-shirt|a t-shirt",
    ("E", "choice"): "e.g. this|i.e. that",
    ("I", "choice"): "I think so|I'm sure|I, too",
    ("C. red", "choice"): "A. red|D) red|blue|B. red",
    ("Yes", "yes_no"): "no|yes and no|yesterday|maybe|No.||eyes",
    ("no", "yes_no"): "yes|not|know|noon|no-one|yes, no",
    ("10", "integer"): "11|10 or 11|10.5|100|-10|1e10|10e2|B10|1,0|ten thousand|8 then 10|2-10|many|",
    ("1000", "integer"): "1,00|1|1,0,0,0",
    ("3", "integer"): "3.5|2-3|3/4|thirty|1.3|.3|3:30|one two three|half of 3|-3|3 million|x3",
    ("-3", "integer"): "3|6-3|three",
    ("21", "integer"): "twenty|one|twenty-two",
    ("red", "text"): "red green|not red|red green blue yellow|re||it is|redder|blue",
    ("-3", "text"): "3",
}


@pytest.mark.parametrize(("response", "expected", "kind"), cases(RIGHT))
def test_spellings_that_are_right(response, expected, kind):
    assert is_correct(response, expected, kind)


@pytest.mark.parametrize(("response", "expected", "kind"), cases(WRONG))
def test_responses_that_are_wrong(response, expected, kind):
    assert not is_correct(response, expected, kind)


def test_an_expected_answer_that_does_not_fit_its_kind_is_compared_as_text():
    for kind in ("choice", "yes_no", "integer"):
        assert is_correct("It's red.", "red", kind)
        assert not is_correct("blue", "red", kind)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'colour' is not one of choice"):
        is_correct("red", "red", "colour")


LETTERS = st.sampled_from(string.ascii_uppercase)
FRAMES = st.sampled_from(
    ["{}", "({})", "{}.", "{}) red", "Answer: {}", "the answer is {}.", "**{}**", "option {}", "{}: x-ray"]
)


@given(LETTERS, LETTERS, FRAMES, FRAMES, st.booleans())
def test_one_letter_is_right_only_for_itself_and_two_never(said, other, frame, second, lower):
    text = frame.format(said)
    text = text.lower() if lower else text
    assert letters(text) == {said.lower()}
    assert is_correct(text, said, "choice")
    assume(said != other)
    assert not is_correct(text, other, "choice")
    assert not is_correct(f"{text} or {second.format(other)}", said, "choice")


@given(
    st.integers() | st.integers(-(10**60), 10**60),
    st.integers(),
    st.sampled_from(["{}", "{}.", "There are {}!", "({})", "{:,}"]),
)
def test_integers_of_any_size(number, other, frame):
    assert integers(frame.format(number)) == {str(number)}
    assert is_correct(frame.format(number), str(number), "integer")
    assert not is_correct(frame.format(number + 1), str(number), "integer")
    assert not is_correct(f"{number}.5", str(number), "integer")
    assume(other != number)
    assert not is_correct(f"{number} or {other}", str(number), "integer")


def test_integers_longer_than_python_converts():
    huge = "9" * 5000
    assert is_correct(f"It is {huge}.", huge, "integer")
    assert not is_correct(huge[:-1], huge, "integer")


def test_number_words_up_to_a_thousand():
    units = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
    ]
    units += ["sixteen", "seventeen", "eighteen", "nineteen"]
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

    def words(n):
        if n >= 100:
            return f"{units[n // 100]} hundred" + (f" and {words(n % 100)}" if n % 100 else "")
        if n >= 20:
            return tens[n // 10 - 2] + (f"-{units[n % 10]}" if n % 10 else "")
        return units[n]

    for n in range(1000):
        assert integers(words(n)) == {str(n)}


@given(
    st.text(string.ascii_letters + " ", min_size=1).filter(str.strip),
    st.text(" .,!?*\"'()"),
    st.text(" .,!?*\"'()"),
)
def test_text_is_blind_to_case_and_outer_punctuation(text, before, after):
    assert is_correct(before + text.swapcase() + after, text, "text")
    assert not is_correct(text + " zebra zebra", text, "text")


@given(st.text(), st.sampled_from(["yes_no", "integer", "choice", "text"]), st.text(min_size=1).filter(str.strip))
def test_any_text_is_judged_without_an_error_and_itself_is_right(response, kind, expected):
    assert is_correct(expected, expected, kind)
    assert isinstance(is_correct(response, expected, kind), bool)


@pytest.mark.parametrize("text", ["a " * 5000, "x" * 10000, "1," * 5000, "I think " * 2000, "-" * 10000])
@pytest.mark.parametrize("kind", ["choice", "integer", "yes_no", "text"])
def test_long_responses_are_judged_quickly(text, kind):
    began = time.process_time()
    is_correct(text, {"choice": "C", "integer": "3", "yes_no": "yes", "text": "red"}[kind], kind)
    assert time.process_time() - began < 2.0


def test_correct_answers_whatever_their_time():
    task = make_task([1.0, 6.0], [(3.0, "yes", "yes_no", 0), (8.0, "2", "integer", 1)])
    assert correct_answers(outcome(task, {1: "Yes.", 11: "two"})) == (True, True)
    assert correct_answers(outcome(task, {3: "no", 8: "two"})) == (False, True)
    assert correct_answers(outcome(task, {})) == (False, False)
