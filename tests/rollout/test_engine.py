"""The engine beside exactness: admission, slots, errors, versions, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.decode import sampler
from rollout.engine.engine import Engine
from rollout.engine.request import stream_bound
from streams.memory import MemoryConfig
from streams.turns import ParsedTurn
from tests.support.streams import MODEL_TYPES, loud_backbone, random_turns, request, run


@pytest.fixture(scope="module", params=MODEL_TYPES)
def backbone(request, tmp_path_factory):
    return loud_backbone(tmp_path_factory.mktemp("engine"), torch.float32, request.param)


MEMORY = MemoryConfig("rcsm", 2)


def requests(backbone, count=6, temperature=1.0, memory=MEMORY):
    rng = np.random.default_rng(0)
    return [
        request(backbone, memory, random_turns(backbone, rng, 6), f"s{i}", temperature=temperature)
        for i in range(count)
    ]


def to_the_end(engine):
    """Step until nothing is left to do; returns the logs by stream."""
    done = {}
    while engine.busy:
        done |= {log.header.stream_id: log for log in engine.step()}
    return done


def test_a_stream_that_can_never_fit_is_refused_with_the_arithmetic(backbone):
    engine = Engine(backbone, kv_slots=40, max_streams=4)
    with pytest.raises(ValueError, match=r"may need \d+ KV slots but the pool holds 40.*rollout\.kv_memory_mb"):
        engine.add(requests(backbone, 1)[0])


def test_a_small_pool_runs_streams_one_after_another_and_to_the_same_end(backbone):
    wanted = requests(backbone)
    need = max(stream_bound(r) for r in wanted)
    small = Engine(backbone, kv_slots=need + 5, max_streams=16)
    done = {}
    for r in wanted:
        small.add(r)
    while small.busy:
        assert small.pool.available >= 0
        for log in small.step():
            done[log.header.stream_id] = log
    assert small.pool.available == small.pool.capacity
    for log in run(backbone, wanted):
        assert (log.ids == done[log.header.stream_id].ids).all()


@pytest.mark.smoke
def test_cancelled_streams_give_their_slots_back_and_leave_the_others_alone(backbone):
    wanted = requests(backbone)
    engine = Engine(backbone, kv_slots=20000, max_streams=3)
    for r in wanted:
        engine.add(r)
    for _ in range(5):
        engine.step()
    engine.cancel({"s0", "s1", "s5"})
    done = set()
    while engine.busy:
        done |= {log.header.stream_id for log in engine.step()}
    assert done == {"s2", "s3", "s4"}
    assert engine.pool.available == engine.pool.capacity


@pytest.mark.parametrize("fails_at", ["row", "draw", "forward"])
def test_after_an_error_inside_a_step_the_engine_runs_as_many_streams_as_before(backbone, monkeypatch, fails_at):
    """Wherever a step fails, `drop_all` gives every slot and every seat back; what runs then is what would have run."""
    wanted = requests(backbone)
    engine = Engine(backbone, kv_slots=20000, max_streams=3)
    owner, name = {
        "row": (type(engine.pool.book.open(1, keeps=False)), "row"),
        "draw": (sampler, "draw"),
        "forward": (backbone, "hidden"),
    }[fails_at]
    engine.pool.book.clear()
    for calls in (1, 2, 3, 5):
        left = iter(range(calls))
        working = getattr(owner, name)

        def failing(*args, left=left, working=working):
            if next(left, None) is None:
                raise RuntimeError("planted")
            return working(*args)

        for r in requests(backbone):
            engine.add(r)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(RuntimeError, match="planted"):
                to_the_end(engine)
        engine.drop_all()
        assert not engine.busy
        assert engine.pool.available == engine.pool.capacity
    for r in wanted:
        engine.add(r)
    done = to_the_end(engine)
    for log in run(backbone, requests(backbone)):
        assert (log.ids == done[log.header.stream_id].ids).all()


def test_greedy_streams_repeat_and_are_marked_untrainable(backbone):
    first, second = run(backbone, requests(backbone, 2, 0.0)), run(backbone, requests(backbone, 2, 0.0))
    for a, b in zip(first, second, strict=True):
        assert (a.ids == b.ids).all()
        assert not a.header.trainable
        assert a.header.score_temperature == 1.0


@pytest.mark.smoke
def test_behaviour_log_probs_are_of_the_sampling_temperature(backbone):
    """At a high temperature the choice among the allowed ids is nearly uniform, and so is its log-prob."""
    log = run(backbone, requests(backbone, 1, temperature=1e6))[0]
    allowed = backbone.layout.vocab_rows - len(backbone.layout.banned)
    np.testing.assert_allclose(log.behaviour_logp[log.sampled], -np.log(allowed), atol=1e-3)


@pytest.mark.smoke
def test_banned_ids_are_never_sampled(backbone):
    banned = set(backbone.layout.banned)
    for log in run(backbone, requests(backbone, 6, temperature=5.0)):
        assert not banned & set(log.ids[log.sampled].tolist())


@pytest.mark.smoke
@pytest.mark.parametrize("decode_steps", [1, 3])
def test_every_token_carries_the_version_it_was_made_with(backbone, decode_steps):
    engine = Engine(backbone, kv_slots=20000, max_streams=8, decode_steps=decode_steps)
    for r in requests(backbone):
        engine.add(r)
    logs = []
    while engine.busy:
        logs += engine.step()
        engine.version += 1
    for log in logs:
        assert (np.diff(log.version) >= 0).all()
        assert log.single_version is None
        sampled = log.version[log.sampled]
        assert np.bincount(sampled).max() <= decode_steps + 1, "a visit draws that many tokens of a stream at most"
        turns = [set(log.version[log.turn == turn]) for turn in range(log.num_turns)]
        assert any(len(versions) > 1 for versions in turns), "weights may change inside a turn"


def test_generated_turns_parse_into_one_parsed_turn_each(backbone):
    for log in run(backbone, requests(backbone)):
        parsed = backbone.layout.parse_turns(log)
        assert [p.turn for p in parsed] == list(range(log.num_turns))
        assert all(isinstance(p, ParsedTurn) for p in parsed)
        assert sum(p.new_tokens for p in parsed) == int(np.isin(log.kind, (4, 5, 6, 7)).sum())


def test_attention_without_a_plan_raises_instead_of_seeing_everything(backbone):
    embeds = torch.zeros(1, 3, backbone.model.config.text_config.hidden_size)
    positions = torch.arange(3).expand(3, 1, 3)
    with pytest.raises(RuntimeError, match="without a plan"):
        backbone.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=torch.zeros(1, 1, 1, 1), use_cache=False
        )


def test_the_layout_for_few_rows_keeps_values_and_outlives_a_swap_in_place(tmp_path):
    model = loud_backbone(tmp_path, torch.float32, MODEL_TYPES[0])
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    Engine(model, kv_slots=40, max_streams=1)
    parameters = dict(model.model.named_parameters())
    assert parameters.keys() == before.keys()
    up = parameters["model.language_model.layers.0.mlp.up_proj.weight"]
    assert up.stride() == (1, up.shape[0])
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]), name
    with torch.no_grad():
        up.copy_(before["model.language_model.layers.0.mlp.up_proj.weight"] + 1)
    assert up.stride() == (1, up.shape[0])
