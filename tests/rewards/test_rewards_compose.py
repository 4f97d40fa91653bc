"""The composed reward: worked examples, its laws, and what it refuses."""

import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Reward, RewardConfig, StreamOutcome, get, oracle_turns, register, silent_turns
from streams.task import Plan
from tests.support.configs import reward_preset
from tests.support.rewards import make_task, one_answer, outcome, stream

pytestmark = pytest.mark.smoke

LIB = "tests.support.rewards"
QUICKSTART = Reward.from_config(reward_preset("quickstart"))
WEIGHTED_TERMS = {
    "format": {"weight": 0.2},
    "correctness": {"weight": 0.5},
    "timing": {"weight": 0.3, "slack": 1, "late_slope": 0.2, "early_slope": 1.0},
}
WEIGHTED = Reward.from_config(RewardConfig("weighted_sum", WEIGHTED_TERMS))


def reward_of(terms, combine="product"):
    return Reward.from_config(RewardConfig(combine, terms))


@pytest.mark.parametrize(
    ("said", "total", "correct", "timing"),
    [
        ({5: "red"}, 1.0, True, 1.0),
        ({6: "Red."}, 0.75, True, 0.75),
        ({9: "red"}, 0.0, True, 0.0),
        ({5: "blue"}, 0.0, False, 1.0),
        ({4: "red"}, 0.0, True, 0.0),
        ({3: "blue", 5: "red"}, 0.0, False, 0.0),
        ({1: "red", 5: "red"}, 1.0, True, 1.0),
        ({}, 0.0, False, 0.0),
    ],
)
def test_quickstart_reward_by_hand(said, total, correct, timing):
    result = QUICKSTART(outcome(one_answer(2, 5), said))
    (answer,) = result.answers
    assert result.failed is None
    assert result.total == answer.value == pytest.approx(total)
    assert (answer.index, answer.category, answer.due_turn) == (0, "proactive", 5)
    assert answer.correct is correct
    assert answer.timing == pytest.approx(timing)
    assert result.components == pytest.approx({"correctness": float(correct), "timing": timing})


def test_several_queries_by_hand():
    task = make_task([0.0, 4.0], [(2.0, "3", "integer", 0), (6.0, "red", "text", 1), (9.0, "blue", "text", 1)])
    # three in time; red one chunk late; blue never said.
    result = QUICKSTART(outcome(task, {2: "three", 7: "red"}))
    assert [a.value for a in result.answers] == pytest.approx([1.0, 0.75, 0.0])
    assert [a.response_turn for a in result.answers] == [2, 7, None]
    assert result.total == pytest.approx(1.75 / 3)
    assert result.components == pytest.approx({"correctness": 2 / 3, "timing": 1.75 / 3})


def test_weighted_sum_by_hand():
    # Format 10/12, right, two late with slack 1: 0.8.
    result = WEIGHTED(outcome(one_answer(2, 5), {7: "red"}, ill_formed=(0, 1)))
    assert result.total == pytest.approx(0.2 * 10 / 12 + 0.5 + 0.3 * 0.8)
    assert result.answers[0].timing == pytest.approx(0.8)
    # Weights are relative: a total stays in [0, 1].
    doubled = {name: {**params, "weight": 2 * params["weight"]} for name, params in WEIGHTED_TERMS.items()}
    again = reward_of(doubled, "weighted_sum")(outcome(one_answer(2, 5), {7: "red"}, ill_formed=(0, 1)))
    assert again.total == pytest.approx(result.total)
    # Silence earns its good form, nothing else.
    assert WEIGHTED(outcome(one_answer(2, 5), {})).total == pytest.approx(0.2)


def test_correct_and_timing_are_reported_without_their_terms():
    result = reward_of({"format": {}})(outcome(one_answer(2, 5), {6: "red"}))
    assert (result.answers[0].correct, result.answers[0].timing) == (True, 0.75)
    assert result.components == {"format": 1.0}


TEXTS = st.sampled_from(["red", "blue", "yes", "3", "C", ""])
SAID = st.dictionaries(st.integers(0, 13), TEXTS, max_size=6)
DUE = st.lists(st.tuples(st.integers(0, 11), st.sampled_from([0, 1])), min_size=1, max_size=4, unique_by=lambda d: d[0])
KINDS = {"red": "text", "yes": "yes_no", "3": "integer", "C": "choice"}


@st.composite
def tasks(draw):
    """Two queries, at 0 and 4; answers due in different turns."""
    answers = []
    for time, query in draw(DUE):
        text = draw(st.sampled_from(sorted(KINDS)))
        answers.append((float(max(time, 4) if query else time), text, KINDS[text], query))
    answers = list({time: (time, *rest) for time, *rest in answers}.values())
    return make_task([0.0, 4.0], answers)


@given(tasks(), SAID)
def test_totals_lie_between_0_and_1(task, said):
    for reward in (QUICKSTART, WEIGHTED):
        result = reward(outcome(task, said, 14))
        assert result.failed is None
        assert 0.0 <= result.total <= 1.0
        assert all(0.0 <= value <= 1.0 for value in result.components.values())


@given(tasks())
def test_the_oracle_is_worth_exactly_1_and_silence_nothing(task):
    turns = task.num_turns(1.0, tail_chunks=2, max_turns=40)
    for reward in (QUICKSTART, WEIGHTED):
        assert reward(StreamOutcome(task, oracle_turns(task, Plan(turns, 1.0)), 1.0)).total == 1.0
    assert QUICKSTART(StreamOutcome(task, silent_turns(turns), 1.0)).total == 0.0


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 6), st.integers(1, 6))
def test_delaying_a_right_answer_never_raises_the_reward(query, wait, late, more):
    task = one_answer(query, query + wait)
    for reward in (QUICKSTART, WEIGHTED):
        now, later = (
            reward(outcome(task, {task_turn: "red"}, 40)).total
            for task_turn in (query + wait + late, query + wait + late + more)
        )
        assert later <= now


@given(st.integers(0, 5), st.integers(1, 6), st.data(), TEXTS)
def test_speaking_between_query_and_event_is_worth_nothing(query, wait, data, text):
    task = one_answer(query, query + wait)
    spurious = data.draw(st.integers(query, query + wait - 1))
    right = {query + wait: "red"}
    assert QUICKSTART(outcome(task, right)).total == 1.0
    assert QUICKSTART(outcome(task, {**right, spurious: text})).total == 0.0


@settings(max_examples=25)
@given(tasks(), SAID)
def test_the_order_of_terms_does_not_matter(task, said):
    seen = outcome(task, said, 14, ill_formed=(3,))
    for combine in ("product", "weighted_sum"):
        terms = {
            k: {p: v for p, v in t.items() if p != "weight" or combine != "product"} for k, t in WEIGHTED_TERMS.items()
        }
        results = [reward_of(dict(order), combine)(seen) for order in itertools.permutations(terms.items())]
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("combine", ["product", "weighted_sum"])
def test_the_order_of_terms_does_not_change_the_last_bit(combine):
    # 0.1 * 0.2 * 0.3 and 0.2 * 0.3 * 0.1 differ as floats, and so do such sums.
    terms = {str(value): {"target": f"{LIB}:give", "value": value} for value in (0.1, 0.2, 0.3, 0.7)}
    orders = itertools.permutations(terms.items())
    assert len({reward_of(dict(order), combine)(outcome(one_answer(), {})).total for order in orders}) == 1


def test_user_terms_by_dotted_path():
    terms = {
        "correctness": {},
        "brief": {"target": f"{LIB}:Brief", "words": 2},
        "half": {"target": f"{LIB}:give", "value": 0.5},
    }
    reward = reward_of(terms)
    assert reward(outcome(one_answer(2, 5, "dark red"), {5: "dark red"})).total == 0.5
    assert reward(outcome(one_answer(2, 5, "dark red"), {5: "it is dark red"})).components == {
        "brief": 0.0,
        "correctness": 1.0,
        "half": 0.5,
    }
    twice = reward_of({"strict": {"target": "timing", "late_slope": 1.0}, "timing": {}})
    assert twice(outcome(one_answer(2, 5), {6: "red"})).components == {"strict": 0.0, "timing": 0.75}


def test_a_registered_term_is_known_by_name_and_names_are_not_taken_twice():
    @register("test_only_constant")
    def constant(seen, value=0.25):
        from tests.support.rewards import give

        return give(seen, value)

    assert reward_of({"test_only_constant": {}})(outcome(one_answer(), {})).total == 0.25
    assert get("test_only_constant") is constant
    with pytest.raises(ValueError, match=r"'timing' is already rewards\.timing:Timing"):
        register("timing")(constant)
    with pytest.raises(ValueError, match="'a:b'"):
        register("a:b")


@pytest.mark.parametrize(
    ("params", "cause"),
    [
        ({"target": f"{LIB}:fail", "on": "red"}, "KeyError: 'no such colour'"),
        ({"target": f"{LIB}:give", "value": 1.5}, "returned 1.5; every value must lie in [0, 1]"),
        ({"target": f"{LIB}:give", "value": -0.1}, "returned -0.1;"),
        ({"target": f"{LIB}:give", "value": float("nan")}, "returned nan;"),
        ({"target": f"{LIB}:give", "count": 2}, "returned shape (2,)"),
        ({"target": f"{LIB}:give", "count": ()}, "returned shape ()"),
        ({"target": f"{LIB}:give", "value": "much"}, "ValueError"),
    ],
)
@pytest.mark.parametrize("combine", ["product", "weighted_sum"])
def test_a_term_that_fails_costs_its_stream_and_is_named(params, cause, combine):
    reward = reward_of({"correctness": {}, "mine": params}, combine)
    result = reward(outcome(one_answer(2, 5), {5: "red"}))
    assert result.total == 0.0
    assert result.failed is not None
    assert result.failed.startswith("stream task-7: reward.terms.mine: ")
    assert cause in result.failed
    assert result.components == {"correctness": 0.0, "mine": 0.0}
    # What the model did is still told truly.
    assert (result.answers[0].correct, result.answers[0].timing, result.answers[0].value) == (True, 1.0, 0.0)


def test_a_failure_of_one_stream_leaves_the_next_alone():
    reward = reward_of({"correctness": {}, "mine": {"target": f"{LIB}:fail", "on": "blue"}})
    results = [reward(outcome(one_answer(2, 5), {5: said})) for said in ("blue", "red")]
    assert [result.total for result in results] == [0.0, 1.0]
    assert [result.failed is None for result in results] == [False, True]


@pytest.mark.parametrize(
    ("combine", "terms", "message"),
    [
        ("sum", {"timing": {}}, r"reward\.combine='sum' is not one of product, weighted_sum"),
        (
            "product",
            {"tming": {}},
            r"reward\.terms\.tming: .*'tming'; known: .*correctness, format, .*timing",
        ),
        ("product", {"timing": {"slak": 1}}, r"reward\.terms\.timing\.slak=1: .* takes early_slack, .*slack"),
        ("product", {"format": {"x": 1}}, r"reward\.terms\.format\.x=1: .* takes none"),
        ("product", {"timing": {"slack": -1}}, r"reward\.terms\.timing\.slack=-1 must be"),
        ("product", {"timing": {"late_slope": "fast"}}, r"reward\.terms\.timing\.late_slope='fast' must be"),
        ("product", {"timing": None}, r"reward\.terms\.timing=None must be a mapping"),
        ("product", {"timing": {"weight": 1}}, r"reward\.terms\.timing\.weight=1 .*weighted_sum"),
        (
            "weighted_sum",
            {"timing": {"weight": 0}},
            r"reward\.terms\.timing\.weight=0 must be a number above 0",
        ),
        ("weighted_sum", {"timing": {"weight": -1}}, r"reward\.terms\.timing\.weight=-1"),
        ("weighted_sum", {"timing": {"weight": float("inf")}}, r"reward\.terms\.timing\.weight=inf"),
        ("weighted_sum", {"timing": {"weight": "a"}}, r"reward\.terms\.timing\.weight='a'"),
        ("product", {"mine": {"target": 3}}, r"reward\.terms\.mine\.target=3"),
        (
            "product",
            {"mine": {"target": "no.such.module:x"}},
            r"reward\.terms\.mine\.target='no.such.module:x' cannot",
        ),
        (
            "product",
            {"mine": {"target": f"{LIB}:nothing"}},
            r"reward\.terms\.mine\.target='.*:nothing' cannot",
        ),
        ("product", {"mine": {"target": f"{LIB}:NOT_CALLABLE"}}, r"reward\.terms\.mine\.target=.* is of type int"),
        (
            "product",
            {"mine": {"target": f"{LIB}:no_outcome"}},
            r"mine: .*no_outcome cannot be called .*write it as no_outcome\(outcome",
        ),
        ("product", {"mine": {"target": f"{LIB}:Breaks"}}, r"mine: .*Breaks\(\) raised KeyError: .*\.py:\d+\)"),
        (
            "product",
            {"mine": {"target": "decimal:Decimal"}},
            r"reward\.terms\.mine: decimal:Decimal has no __call__",
        ),
        ("product", {"mine": {"target": f"{LIB}:Brief"}}, r"reward\.terms\.mine\.words is missing"),
        ("product", {"mine": {"target": f"{LIB}:Brief", "words": 0}}, r"reward\.terms\.mine\.words=0 must"),
        (
            "product",
            {"mine": {"target": f"{LIB}:Brief", "words": "x"}},
            r"reward\.terms\.mine: .*words='x'\) raised TypeError: '<' not supported",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_by_key(combine, terms, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(combine, terms)


def test_a_reward_without_terms_is_refused():
    with pytest.raises(ValueError, match=r"reward\.terms is empty"):
        Reward.from_config(RewardConfig())


def test_config_and_result_travel_between_processes():
    config = pickle.loads(pickle.dumps(RewardConfig("weighted_sum", WEIGHTED_TERMS)))
    seen = StreamOutcome(one_answer(2, 5), stream({6: "red"}), 1.0)
    result = Reward.from_config(config)(seen)
    assert result == WEIGHTED(seen)
    assert pickle.loads(pickle.dumps(result)) == result


@pytest.mark.parametrize(
    ("source", "message"), [("raise RuntimeError('stop')", "RuntimeError: stop"), ("def :", "SyntaxError")]
)
def test_a_module_that_cannot_be_imported_is_a_wrong_setting(tmp_path, monkeypatch, source, message):
    (tmp_path / "broken_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=rf"reward\.terms\.mine\.target='broken_rewards:X' cannot be loaded \({message}"
    ):
        RewardConfig("product", {"mine": {"target": "broken_rewards:X"}})
