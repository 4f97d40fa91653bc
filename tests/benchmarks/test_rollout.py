"""benchmarks.rollout in small: baselines write what the engine writes, and the result has its keys. Times are not tested."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch

from benchmarks.baselines import copy_evict
from benchmarks.baselines.copy_evict import CopyEvict
from benchmarks.baselines.rebuild import Rebuild
from benchmarks.rollout import __main__ as command
from benchmarks.rollout import compare, host, lengths
from benchmarks.rollout.presets import PATCH_SECONDS, PRESETS, World, make_world
from benchmarks.rollout.ready_made import ready_made
from benchmarks.rollout.runs import make_engine, run_copy_evict, run_engine, step_through, written
from rollout.engine.engine import Engine
from streams.layout.layout import LayoutConfig
from tests.support.one_step import OneStepEngine
from tests.support.streams import loud_backbone

KEYS = (
    *("device", "preset", "ratio_vs_copy_evict", "ratio_vs_copy_evict_shared_vision", "ratio_vs_rebuild"),
    *("ratio_vs_copy_evict_one_group", "host_us_per_token", "host_us_per_token_256", "host_us_per_token_before"),
    *("draw_us_per_token", "copy_evict_host_share", "late_over_early_p50", "vision_encodes_per_chunk"),
    *("kv_bytes_copied_per_turn", "live_kv_bytes", "decode_over_floor", "decode_tokens_per_s_b1", "turn_p99_ms_b1"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(PRESETS["tiny"], tmp_path_factory.mktemp("world"), "cpu", 6)


def test_greedy_tokens_of_engine_and_baselines_agree(world):
    found = compare.agreement(world, 2, 6)
    assert found["copy_evict"]
    assert found["rebuild"]
    assert found["rebuild_turns"] == [0, world.preset.window - 1]
    # Every row of a group is greedy, and every turn has as many tokens as it may.
    assert found["tokens"] == 2 * world.preset.group * 6 * world.preset.max_new_tokens


def test_turns_that_end_by_themselves_agree(tmp_path):
    backbone = loud_backbone(tmp_path, torch.float32, layout=LayoutConfig("Watch.", 5, 10))
    world = make_world(PRESETS["tiny"], tmp_path / "world", "cpu", 6)
    free = replace(world, backbone=backbone)
    (log,) = run_engine(free, [0], temperature=0.0, group=1).logs
    lengths = [len(turn) for turn in written(log)]
    assert len(set(lengths)) > 1, "turns of several lengths"
    made, _ = run_copy_evict(free, [0], temperature=0.0)
    assert all(row == written(log) for row in made[0].ids)


def test_padding_of_rows_is_never_seen(world, tmp_path, monkeypatch):
    """Rows whose turns end apart choose from the logits that each would have alone."""
    backbone = loud_backbone(tmp_path, torch.float32, layout=LayoutConfig("Watch.", 5, 10))
    tokens, word = backbone.layout.tokens, backbone.tokenizer.encode("red")[0]
    # After 0, 1, ... words a row ends its thought, is silent and ends its turn.
    plans = [[tokens.think, *[word] * row, tokens.think_end, tokens.silent, tokens.im_end] for row in range(3)]
    together = chosen_from(backbone, world, plans, monkeypatch)
    for row, plan in enumerate(plans):
        (alone,) = chosen_from(backbone, world, [plan], monkeypatch)
        assert len(alone) == len(plan) * world.chunks
        torch.testing.assert_close(torch.stack(together[row]), torch.stack(alone), atol=3e-4, rtol=0)


def chosen_from(backbone, world, plans, monkeypatch) -> list[list[torch.Tensor]]:
    """Run one row per plan, which says what it writes in every turn; the logits that each row chose from."""
    seen: list[list[torch.Tensor]] = [[] for _ in plans]

    def choose(self, logits, pending):
        for row, state in enumerate(self._states):
            if not pending[row] and not state.over:
                seen[row].append(logits[row].clone())
                token = plans[row][len(self.made.ids[row][-1])]
                pending[row].append(token)
                state.advance([token])
                self.made.ids[row][-1].append(token)

    monkeypatch.setattr(copy_evict._Group, "_choose", choose)
    copy_evict.CopyEvict(backbone, 2, PATCH_SECONDS).run(world.turns[0], world.clips[0], len(plans), temperature=1.0)
    return seen


def test_copy_evict_copies_what_is_live_and_shares_vision_on_demand(world):
    (own,), _ = run_copy_evict(world, [0])
    (shared,), _ = run_copy_evict(world, [0], share_vision=True)
    assert own.chunks_encoded == world.preset.group * world.chunks
    assert shared.chunks_encoded == world.chunks
    evictions = world.chunks - world.preset.window
    assert 0 < own.copied <= evictions * own.live
    assert own.sampled == world.preset.group * world.chunks * (world.preset.max_new_tokens - 2)
    lengths = {len(turn) for row in own.ids for turn in row}
    assert lengths == {world.preset.max_new_tokens}
    assert len({tuple(chain(*row)) for row in own.ids}) == world.preset.group, "rows draw apart"


def test_rebuild_refuses_rows_of_unequal_contexts(world, tmp_path):
    logs = run_engine(world, [0]).logs
    shorter = next(iter(run_engine(world, [0], max_new_tokens=6, group=1).logs))
    with pytest.raises(ValueError, match="rows cannot share a call"):
        Rebuild(world.backbone, tmp_path).turn([logs[0], shorter], 2, world.clips[0])


@pytest.mark.parametrize("engine_type", [Engine, OneStepEngine])
def test_with_ready_made_answers_no_model_runs_and_logs_are_whole(world, engine_type, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(world.backbone.model.model.language_model, "forward", never)
    monkeypatch.setattr(world.backbone.model.lm_head, "forward", never)
    requests = host._requests(world, 5, 4)
    engine = make_engine(world, requests, engine_type=engine_type)
    with ready_made(world.backbone, host._word(world)):
        run = step_through(engine, requests)
    budgets = world.preset.max_new_tokens
    assert run.sampled == 5 * 4 * (budgets - 2)
    assert all(len(turn) == budgets for log in run.logs for turn in written(log))
    assert "hidden" not in vars(world.backbone), "the answers are gone afterwards"


def test_mixed_and_even_streams_have_as_many_rows_and_keys(world):
    mixed, even = (lengths._decoding(world, given) for given in ([10, 10, 10, 90], [30] * 4))
    held = [[len(stream.writer.held) for stream in engine.admission.running] for engine in (mixed, even)]
    assert len(held[0]) == len(held[1]) == 4
    assert sum(held[0]) == sum(held[1])
    assert max(held[0]) - min(held[0]) == 80
    assert max(held[1]) == min(held[1])
    assert all(engine.busy for engine in (mixed, even)), "there are steps left to time"


def test_the_result_has_the_keys_that_are_promised(monkeypatch, capsys):
    small = replace(PRESETS["tiny"], prompts=2, group=2, chunks=4, quick_chunks=4)
    monkeypatch.setitem(command.PRESETS, "tiny", small)
    monkeypatch.setattr(command, "host", lambda *_, **__: dict.fromkeys(HOST, 1.0))
    monkeypatch.setattr(command, "growth", lambda world: host.growth(world, streams=1, block=2, late=22))
    monkeypatch.setattr(lengths, "LONG", 200)
    # A second thread only waits where tests share the cores.
    monkeypatch.setattr(command, "measure", partial(command.measure, threads=(1,)))
    threads = torch.get_num_threads()
    try:
        assert command.main(["--quick", "--preset", "tiny", "--device", "cpu", "--json", "-"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert set(KEYS) <= found.keys()
    assert found["vision_encodes_per_chunk"] == 1
    assert found["decode_over_floor"] is None
    unmeasured = {key for key in KEYS if found[key] is None}
    assert unmeasured <= {"decode_over_floor", "kv_bytes_copied_per_turn"}
    assert all(np.isfinite(found[key]) for key in KEYS if key.startswith("ratio"))
    assert found["mixed_lengths"]["ratio"] > 0
    assert set(found["threads"]) == {"1"}


def test_every_part_is_saved_when_it_is_there(world, monkeypatch):
    """A run that is cut off keeps what it had, and what it had not is null."""

    def cut(*_, **__):
        raise KeyboardInterrupt

    saved = []
    monkeypatch.setattr(command, "make_world", lambda *_: world)
    monkeypatch.setattr(command, "measure_threads", cut)
    with pytest.raises(KeyboardInterrupt):
        command.measure(world.preset, "cpu", True, save=lambda found: saved.append(dict(found)))
    assert len(saved) == 2
    assert set(KEYS) <= saved[0].keys()
    assert saved[0]["agreement"]["copy_evict"]
    assert saved[0]["turn_p99_ms_b1"] is None
    assert saved[1]["turn_p99_ms_b1"] > 0
    assert saved[1]["ratio_vs_copy_evict"] is None
    assert not saved[1]["complete"]


def test_greedy_tokens_must_agree_in_float32_only():
    found = {"agreement": {"copy_evict": False, "rebuild": True}}
    assert not command.agreed(found, PRESETS["small"])
    assert command.agreed(found, PRESETS["qwen2.5-vl-3b"])


HOST = ("before", "now", "before_256", "now_256", "before_cpu", "now_cpu")


def test_a_memory_that_differs_by_one_chunk_is_seen(world):
    """`copy_evict` with another window writes other tokens: the agreement above is no accident."""
    made, _ = run_copy_evict(world, [0], temperature=0.0)
    wrong = CopyEvict(world.backbone, world.preset.window - 1, PATCH_SECONDS)
    other = wrong.run(world.turns[0], world.clips[0], 1, temperature=0.0)
    assert other.ids[0] != made[0].ids[0]
