"""A stage in which nothing can be learned says so: when, how often, and what to look at."""

from __future__ import annotations

import pytest

from rewards.compose import RewardResult
from rl.idle import IdleWatch
from rl.metrics import StepClock, step_metrics
from rl.results import ReadyGroup, RLResult
from streams.messages import GroupSummary, TrainReport
from tests.support.configs import composed


def group(*totals: float | None, **components: float) -> ReadyGroup:
    """A group with these rewards; None = the stream's reward failed."""
    summary = GroupSummary("0/a", "a", 0)
    return ReadyGroup(
        summary, None, tuple(RewardResult(t or 0.0, components, (), "broken" if t is None else None) for t in totals)
    )


def step(*groups: ReadyGroup) -> dict[str, float | None]:
    report = TrainReport(step=0, version=1, metrics={"loss": 0.0})
    return step_metrics(report, groups, [0], [], StepClock(1.0, 0.5), 0, RLResult())


def watch(*words: str, before=()) -> IdleWatch:
    return IdleWatch(composed(*words), before)


ZERO = step(group(0.0, 0.0, correctness=0.0, timing=0.5), group(0.0, 0.0, correctness=0.0, timing=0.5))
ALIKE = step(group(0.1, 0.1, 0.1, correctness=0.1, timing=1.0), group(0.7, None, 0.7, correctness=0.7, timing=1.0))
SOLVED = step(group(1.0, 1.0, correctness=1.0, timing=1.0))
TEACHES = step(group(0.0, 0.0, correctness=0.0, timing=0.0), group(0.0, 1e-9, correctness=0.0, timing=0.0))


def test_the_share_of_groups_that_teach_nothing_is_charted_exactly():
    assert ZERO["reward/zero_std_groups"] == 1.0
    # Rounding, and streams whose reward failed, make the standard deviation of such groups larger than 0.
    assert ALIKE["reward/group_std"] > 0
    assert ALIKE["reward/zero_std_groups"] == 1.0
    assert TEACHES["reward/zero_std_groups"] == 0.5


def said_at(steps, *words: str) -> list[int]:
    idle = watch(*words)
    return [i for i, values in enumerate(steps, start=1) if idle.see(values) is not None]


def test_it_is_said_after_so_many_steps_in_a_row_and_then_ever_more_rarely():
    assert said_at([ZERO] * 45) == [5, 10, 20, 40]
    assert said_at([ZERO] * 9, "monitor.idle_steps=2") == [2, 4, 8]
    assert said_at([ZERO] * 9, "monitor.idle_steps=0") == []
    assert said_at([ZERO] * 4 + [TEACHES] + [ZERO] * 6) == [10]
    assert said_at([TEACHES] * 50) == []


def test_a_resumed_stage_goes_on_counting_and_an_old_journal_says_nothing():
    idle = watch(before=[TEACHES, *[ZERO] * 4])
    assert "every reward of the last 5 steps is 0" in idle.see(ZERO)
    old = {key: value for key, value in ZERO.items() if key != "reward/zero_std_groups"}
    assert watch(before=[old] * 4).see(ZERO) is None


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [ZERO] * 5,
            (
                *("every reward of the last 5 steps is 0", "correctness 0, timing 0.5", "Look at correctness first"),
                *(
                    "reward.combine=product",
                    "sightline check",
                    "streams.data.check",
                    "data.max_turns",
                    "layout.max_new_tokens",
                ),
                *("rollout.temperature=1", "transcripts"),
            ),
        ),
        (
            [ZERO] * 4 + [ALIKE],
            ("in each group of the last 5 steps every stream earned the same", "rollout.temperature=1"),
        ),
        ([SOLVED] * 5, ("correctness 1, timing 1", "the tasks are solved")),
    ],
)
def test_it_says_what_to_look_at_by_what_the_terms_say(steps, words):
    idle = watch()
    said = [idle.see(values) for values in steps][-1]
    assert said.startswith("warning: rl: ")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_the_setting_is_checked():
    with pytest.raises(ValueError, match=r"monitor\.idle_steps=-1"):
        composed("monitor.idle_steps=-1")


def test_where_streams_are_compared_with_the_whole_step_groups_of_equal_rewards_teach():
    words = ("algorithm=reinforce_pp", "monitor.idle_steps=1")
    assert watch("monitor.idle_steps=1").see(ALIKE)
    assert watch(*words).see(ALIKE) is None
    assert "every reward of the last 1 steps is 0" in watch(*words).see(ZERO)
