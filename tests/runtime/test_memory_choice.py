"""Staging and micro-batches are chosen by what the card has, and the choice is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from learner.config import LearnerConfig
from runtime.planning.device_plan import MARGIN, plan_devices
from runtime.planning.footprint import gib
from tests.support.one_gpu import GIB, H200, TASKS, planned, smoke, three_b


def card(gib_free):
    return replace(H200, total=int(gib_free * GIB), free=int(gib_free * GIB))


def parts(plan, process):
    return dict(next(f for f in plan.footprints if f.process == process).parts)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("gib_free", "staging", "whole", "said"),
    [
        (141.0, "device", True, ""),
        (79.1, "host", True, " (weights.staging=device learner.micro_batch_tokens=16384 does not fit)"),
        # What two processes' contexts leave of the same card.
        (78.0, "host", False, " (weights.staging=device learner.micro_batch_tokens=16384 does not fit)"),
    ],
)
def test_the_smoke_run_fits_the_card_that_there_is_and_says_by_what(gib_free, staging, whole, said):
    plan = planned(smoke(), card(gib_free))
    assert (plan.staging, plan.micro_batch_tokens) == (staging, 16384)
    assert plan.wanted_slots == planned(smoke()).kv_slots
    assert (plan.kv_slots == plan.wanted_slots) is whole
    assert plan.kv_slots > plan.wanted_slots // 2
    assert sum(f.total for f in plan.footprints) <= gib_free * GIB * (1 - MARGIN)
    assert parts(plan, "rollout worker")["staged weights"] == (2 * 3_085_939_712 if staging == "device" else 0)
    assert plan.lines[0] == (
        f"memory choice: weights.staging={staging} learner.micro_batch_tokens=16384: {plan.kv_slots:,} KV slots of the "
        f"{plan.wanted_slots:,} that a worker's streams can fill{said}"
    )
    if said:
        with pytest.raises(ValueError, match=r"GiB too many"):
            planned(smoke("weights.staging=device"), card(gib_free))


def test_a_card_that_is_too_small_is_refused_with_what_was_tried_and_what_is_left():
    with pytest.raises(
        ValueError, match=r"GiB too many\. Ways out: learner\.offload=cpu, .*2048, the least of"
    ) as refused:
        planned(smoke(), card(22))
    assert "weights.staging=host, " not in str(refused.value)
    with pytest.raises(ValueError, match=r"GiB too many\. Ways out: a smaller learner"):
        planned(smoke("learner.offload=cpu"), card(22))


def test_micro_batches_shrink_until_the_pool_holds_all_streams():
    offloaded, tight = smoke("learner.offload=cpu"), card(27)
    plan = planned(offloaded, tight)
    assert (plan.staging, plan.kv_slots) == ("host", plan.wanted_slots)
    assert plan.micro_batch_tokens < 16384
    chosen = f"learner.micro_batch_tokens={plan.micro_batch_tokens}"
    assert planned(smoke("learner.offload=cpu", "weights.staging=host", chosen), tight).kv_slots == plan.kv_slots
    larger = planned(smoke("learner.offload=cpu", "learner.micro_batch_tokens=16384"), tight)
    assert 0 < larger.kv_slots < plan.kv_slots
    assert plan.settled(offloaded.learner) == replace(offloaded.learner, micro_batch_tokens=plan.micro_batch_tokens)
    given = replace(offloaded.learner, micro_batch_tokens=999)
    assert plan.settled(given) is given


def test_where_nothing_is_open_nothing_is_chosen():
    plan = planned(smoke("weights.staging=host", "learner.micro_batch_tokens=4096"))
    assert (plan.staging, plan.settled(LearnerConfig(micro_batch_tokens=4096)).micro_batch_tokens) == ("host", 4096)
    assert not any("memory choice" in line for line in plan.lines)
    # Host memory is one: staging elsewhere would be the same bytes.
    host = replace(H200, key="n/host", cuda=False)
    assert planned(smoke(), host).staging == "device"


def test_a_refusal_names_the_rows_that_set_the_size_of_a_stream():
    first = TASKS[0]
    long = replace(first, id="long", end=200.0, answers=(replace(first.answers[0], time=150.0),), origin="rows.jsonl:7")
    wordy = replace(first, id="wordy", queries=(replace(first.queries[0], text="w" * 9000),), origin="rows.jsonl:9")
    config = smoke("data.max_turns=400", "data.tail_chunks=0")
    with pytest.raises(ValueError, match=r"too many\. Ways out") as refused:
        plan_devices(config, {"rl": config.learner}, three_b(), (first, long, wordy), ([card(24)], [card(24)]))
    assert "as one of 151 turns (task long (row rows.jsonl:7))" in str(refused.value)
    assert "9,000 bytes of questions (task wordy (row rows.jsonl:9))" in str(refused.value)


@pytest.mark.parametrize(("count", "said"), [(4096, "4.0 KiB"), (2**20, "1.0 MiB"), (3 * 2**30, "3.00 GiB")])
def test_bytes_for_people_are_never_zero(count, said):
    assert gib(count) == said
