"""Contiguous positions: where keys stand, and engine = learner = a slow engine that lays out every turn anew."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.engine.engine import Engine
from rollout.engine.forward import PoolAttention
from streams.log.record import Kind
from streams.memory import MemoryConfig, SinkWindow, knobs, make_policy
from streams.positions.mrope import PositionCursor
from streams.positions.regions import Region
from streams.positions.rotary import Rotary
from streams.scoring.block_mask import BLOCK
from streams.scoring.logprobs import score_rows
from streams.scoring.packing import pack
from streams.writing.writer import StreamWriter
from tests.support.contiguous import angles_in_float64, layout_of, slow_logps
from tests.support.policies import LAYOUTS, generate, header, plans
from tests.support.strategies import ANY_MEMORY, contiguous, for_backbone, watched
from tests.support.streams import (
    CAUGHT,
    FP64_BAR,
    differences,
    joined_features,
    loud_backbone,
    random_requests,
    random_turns,
    request,
    run,
    run_to_the_end,
)

SMALL = MemoryConfig("sink_window", 2, 3, sink_tokens=4, tail_tokens=5, positions="contiguous")


@given(memory=contiguous(), turns=plans(), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_keys_stand_where_the_regions_laid_out_by_hand_put_them(memory, turns, layout, seed):
    writer = StreamWriter(header(memory), layout, make_policy(memory), PositionCursor(2, 1.0))
    rng = np.random.default_rng(seed)
    keys = []
    stands: dict[int, int] = {}
    for turn_input in turns:
        writer.begin_turn(turn_input, version=0)
        stands |= dict(zip(*(array.tolist() for array in writer.regions.turned), strict=True))
        keys.append({i: stands.get(i) for i in writer.live.tolist()})
        generate(writer, layout, rng)
    log = writer.finish()
    assert len(log.regions.offsets) == log.num_turns
    moves = sorted(zip(log.regions.entry, log.regions.token, log.regions.region, log.regions.coordinate, strict=True))
    for turn, expected in enumerate(layout_of(log, turns, memory)):
        start = int(np.flatnonzero(log.turn == turn)[0])
        latest = {int(token): (int(r), int(at)) for entry, token, r, at in moves if entry <= start}
        # Shifted so that the turn's own first token stands at its native position: RETAINED's frame.
        shift = log.positions[:, start] - expected[start]
        for i, position in expected.items():
            native = log.positions[:, i]
            if i in latest:
                r, at = latest[i]
                native = np.full(3, at - log.regions.offsets[turn, r])
                assert keys[turn][i] == native[0], "what the engine is told to rotate to"
            elif i in keys[turn]:
                assert keys[turn][i] is None
            assert (native == position + shift).all()


def test_regions_are_filled_and_positions_stay_within_the_window(fp64):
    memory = for_backbone(dataclasses.replace(SMALL, window=2), fp64)
    stream = request(fp64, memory, random_turns(fp64, np.random.default_rng(5), 40), "long")
    log = run(fp64, [stream])[0]
    assert set(log.regions.region.tolist()) == {r for r in Region if r != Region.RETAINED}
    assert int(log.positions.max()) > 400
    reach = [max(int(p.max()) for p in turn.values()) for turn in layout_of(log, stream.turns, memory)]
    assert max(reach[20:]) < 200


@st.composite
def mixed(draw, backbone):
    """Streams that share the engine's steps and the learner's rows: contiguous ones, and one of any memory."""
    memories = (contiguous(), ANY_MEMORY, contiguous())
    return [draw(watched(backbone, memory, str(i), turns=9)) for i, memory in enumerate(memories)]


@given(data=st.data())
@settings(max_examples=12)
def test_engine_learner_and_slow_engine_agree(fp64, data):
    drawn = data.draw(mixed(fp64))
    requests = [stream for _, stream in drawn]
    logs = run(fp64, requests)
    assert differences(fp64, logs, requests).max(initial=0.0) <= FP64_BAR
    for (memory, stream), log in zip(drawn, logs, strict=True):
        assert (log.regions is None) == (memory.positions == "native")
        if log.regions is not None and log.sampled.any():
            with torch.no_grad():
                slow = slow_logps(fp64, log, stream, memory)
            assert np.abs(slow.numpy() - log.behaviour_logp[log.sampled]).max() <= FP64_BAR


def test_while_nothing_moves_contiguous_positions_are_the_native_ones(fp64):
    turns = random_turns(fp64, np.random.default_rng(3), 8)
    wide = {"window": 40, "text_window": 40}
    with angles_in_float64():
        both = [
            run(fp64, [request(fp64, MemoryConfig("sink_window", **wide, positions=p), turns, "s")])[0]
            for p in ("native", "contiguous")
        ]
    assert (both[0].ids == both[1].ids).all()
    sampled = both[0].sampled
    assert np.abs(both[0].behaviour_logp - both[1].behaviour_logp)[sampled].max() <= FP64_BAR


@pytest.fixture(scope="module")
def evicting(fp64):
    memory = for_backbone(SMALL, fp64)
    requests = random_requests(fp64, memory, 3, seed=4, low=9)
    logs = run(fp64, requests)
    evicted = sum((log.expiry[log.kind == Kind.VIDEO] < len(log)).sum() for log in logs)
    assert evicted >= 0.3 * sum((log.kind == Kind.VIDEO).sum() for log in logs)
    return memory, requests, logs


class TestPlantedDefects:
    def rescored(self, fp64, evicting, wrong):
        memory, requests, logs = evicting
        logs = [wrong(log, r, memory) for log, r in zip(logs, requests, strict=True)]
        return differences(fp64, logs, requests).max()

    def test_the_logs_as_they_are_pass(self, fp64, evicting):
        assert self.rescored(fp64, evicting, lambda log, *_: log) <= FP64_BAR

    def test_native_positions_under_a_plain_mask(self, fp64, evicting):
        assert self.rescored(fp64, evicting, lambda log, *_: dataclasses.replace(log, regions=None)) > CAUGHT

    def test_reindexed_positions_under_a_plain_mask(self, fp64, evicting):
        """Each token where it stood when it was written: what a learner without regions would do."""

        def reindexed(log, r, memory):
            layout = layout_of(log, r.turns, memory)
            at = [layout[int(turn)][i] for i, turn in enumerate(log.turn)]
            return dataclasses.replace(log, regions=None, positions=np.stack(at, axis=1).astype(np.int32))

        assert self.rescored(fp64, evicting, reindexed) > CAUGHT

    def test_a_plain_causal_mask(self, fp64, evicting):
        def causal(log, *_):
            return dataclasses.replace(log, expiry=np.full_like(log.expiry, np.iinfo(np.int32).max))

        assert self.rescored(fp64, evicting, causal) > CAUGHT

    @pytest.mark.parametrize("region", [r for r in Region if r != Region.RETAINED], ids=lambda r: r.name)
    def test_an_offset_of_one(self, fp64, evicting, region):
        def shifted(log, *_):
            offsets = log.regions.offsets.copy()
            offsets[:, region] += 1
            return dataclasses.replace(log, regions=dataclasses.replace(log.regions, offsets=offsets))

        assert self.rescored(fp64, evicting, shifted) > CAUGHT

    def test_moves_one_turn_late(self, fp64, evicting):
        def late(log, *_):
            starts = np.array([np.flatnonzero(log.turn == t)[0] for t in range(log.num_turns)])
            entry = np.append(starts, len(log))[np.searchsorted(starts, log.regions.entry) + 1]
            return dataclasses.replace(log, regions=dataclasses.replace(log.regions, entry=entry.astype(np.int32)))

        assert self.rescored(fp64, evicting, late) > CAUGHT

    def test_a_ban_list_missing_in_the_learner(self, fp64, evicting, monkeypatch):
        monkeypatch.setattr(fp64, "_banned", torch.tensor([], dtype=torch.long))
        assert self.rescored(fp64, evicting, lambda log, *_: log) > CAUGHT

    def test_an_end_token_that_sees_keys_where_the_next_turn_has_them(self, fp64, evicting, monkeypatch):
        _, requests, _ = evicting
        plain = PoolAttention.__init__

        def hoisted(self, pool, passes, tables=None):
            """Keys move before the first pass, the turns that end, and not before the second."""
            moves = [move for part in passes for move in part.before]
            plain(self, pool, [dataclasses.replace(p, before=() if i else moves) for i, p in enumerate(passes)], tables)

        monkeypatch.setattr(PoolAttention, "__init__", hoisted)
        assert differences(fp64, run(fp64, requests), requests).max() > CAUGHT

    def test_keys_that_stay_as_they_were_rotated(self, fp64, evicting, monkeypatch):
        _, requests, _ = evicting
        monkeypatch.setattr("rollout.engine.contiguous.MovedKeys.move", lambda *_: None)
        assert differences(fp64, run(fp64, requests), requests).max() > CAUGHT


def test_flex_attention_merges_regions_to_the_dense_softmax(fp64, evicting):
    memory, *_ = evicting
    # Rows of uneven length, of which one holds a native stream, too; short ones, as eager FlexAttention is slow.
    native = MemoryConfig("rcsm", 3)
    requests = [
        *random_requests(fp64, memory, 1, seed=4, low=4, high=5),
        *random_requests(fp64, memory, 1, seed=6, low=6, high=7),
        *random_requests(fp64, native, 1, seed=9, low=3, high=4),
    ]
    logs = run(fp64, requests)
    assert any((log.expiry[log.kind == Kind.VIDEO] < len(log)).any() for log in logs[:2])
    rows = pack(logs, [[0, 2], [1]], which="sampled")
    features = torch.cat([joined_features(r) for r in requests])
    with torch.no_grad():
        dense, flex = (score_rows(fp64, rows, features, attention=kind).logp for kind in ("sdpa", "flex"))
    assert torch.isfinite(flex).all()
    assert (dense - flex).abs().max() <= FP64_BAR


def test_the_merge_runs_in_float32_too(tmp_path):
    """Where FlexAttention would be compiled, had the CPU's kernel a log-sum-exp."""
    backbone = loud_backbone(tmp_path, torch.float32)
    (made,) = random_requests(backbone, SMALL, 1, seed=4, low=9)
    rows = pack(run(backbone, [made]), [[0]], which="sampled")
    assert rows.regions.filled
    with torch.no_grad():
        dense, flex = (
            score_rows(backbone, rows, joined_features(made), attention=kind).logp for kind in ("sdpa", "flex")
        )
    assert (dense - flex).abs().max() <= 3e-4


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_without_a_backward_not_all_scores_of_a_long_row_exist_at_once(fp64, evicting, monkeypatch):
    _, requests, logs = evicting
    longest = max(range(len(logs)), key=lambda i: len(logs[i]))
    rows = pack([logs[longest]], [[0]], which="sampled")
    features = joined_features(requests[longest])
    with torch.no_grad():
        whole = score_rows(fp64, rows, features, head_chunk=8).logp
        monkeypatch.setattr("streams.scoring.contiguous.REGION_SCORES", 2**14)
        with LargestTensor() as largest:
            piecewise = score_rows(fp64, rows, features, head_chunk=8).logp
    assert (whole - piecewise).abs().max() <= FP64_BAR
    heads = fp64.model.config.text_config.num_attention_heads
    assert largest.numbers < heads * len(logs[longest]) ** 2 / 2


def test_padding_fills_no_region_that_was_empty(fp64):
    """With text as long as video nothing stands in TEXT: no queries are turned for it."""
    memory = dataclasses.replace(SMALL, window=3)
    logs = run(fp64, random_requests(fp64, memory, 1, seed=3, low=9))
    rows = pack(logs, [[0]])
    assert Region.TEXT not in rows.regions.filled
    padded = rows.padded(BLOCK, at_least=BLOCK).regions
    assert padded.token.shape[1] % BLOCK == 0
    assert padded.filled == rows.regions.filled


def test_a_row_is_scored_alike_alone_packed_and_padded(fp64, evicting):
    _, requests, logs = evicting
    rows = pack(logs, [[0, 1], [2]], which="sampled")
    features = torch.cat([joined_features(r) for r in requests[:3]])
    with torch.no_grad():
        packed = score_rows(fp64, rows, features).logp
        padded = score_rows(fp64, rows.padded(64, at_least=0), features).logp
        alone = [
            score_rows(fp64, pack([log], [[0]], which="sampled"), joined_features(r)).logp
            for log, r in zip(logs[:3], requests[:3], strict=True)
        ]
    assert (packed - padded).abs().max() <= FP64_BAR
    assert (packed - torch.cat(alone)).abs().max() <= FP64_BAR


def test_gradients_are_those_of_the_slow_engine(fp64, evicting):
    memory, requests, logs = evicting
    log, stream = logs[0], requests[0]
    weights = torch.randn(int(log.sampled.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fp64.model.requires_grad_(True)
    parameters = [p for n, p in fp64.model.named_parameters() if "language_model" in n]
    learner = score_rows(fp64, pack([log], [[0]], which="sampled"), joined_features(stream)).logp
    slow = slow_logps(fp64, log, stream, memory)
    both = [torch.autograd.grad((logp * weights).sum(), parameters) for logp in (learner, slow)]
    fp64.model.requires_grad_(False)
    largest = max(float(g.abs().max()) for g in both[1])
    assert max(float((a - b).abs().max()) for a, b in zip(*both, strict=True)) <= 1e-10 * largest


class TestEngine:
    def streams(self, fp64):
        memory = for_backbone(SMALL, fp64)
        return random_requests(fp64, memory, 4, seed=6, low=8)

    def ran(self, engine):
        done = []
        while engine.busy:
            done += engine.step()
            available = [s.bound for s in engine.admission.running]
            assert engine.pool.capacity - engine.pool.available <= sum(available)
        return {log.header.stream_id: log for log in done}

    @pytest.mark.parametrize("how", ["cancel", "drop_all"])
    def test_streams_that_were_given_up_leave_nothing_behind(self, fp64, how):
        requests = self.streams(fp64)
        fresh = run(fp64, requests)
        engine = Engine(fp64, kv_slots=1200, max_streams=4, decode_steps=1)
        for r in requests:
            engine.add(r)
        for _ in range(40):
            engine.step()
        assert engine.busy
        if how == "cancel":
            engine.cancel({r.header.stream_id for r in requests})
        else:
            engine.drop_all()
        assert engine.pool.available == engine.pool.capacity
        for r in requests:
            engine.add(dataclasses.replace(r, policy=make_policy(for_backbone(SMALL, fp64))))
        again = self.ran(engine)
        assert engine.pool.available == engine.pool.capacity
        for log in fresh:
            other = again[log.header.stream_id]
            assert (other.ids == log.ids).all()
            assert np.nanmax(np.abs(other.behaviour_logp - log.behaviour_logp)) <= FP64_BAR

    def test_native_streams_alone_need_no_second_buffer(self, fp64):
        engine = Engine(fp64, kv_slots=2000, max_streams=4)
        engine.add(random_requests(fp64, MemoryConfig("rcsm", 3), 1)[0])
        self.ran(engine)
        assert engine.pool.raw is None
        engine.add(self.streams(fp64)[0])
        bytes_each = engine.pool.bytes_per_slot(fp64.num_layers, *fp64.kv_shape, fp64.dtype, raw=True)
        assert engine.pool.kv.nbytes + engine.pool.raw.nbytes == (2000 + 1) * bytes_each

    def test_weights_may_change_in_the_middle_of_a_stream(self, fp64):
        memory = for_backbone(SMALL, fp64)
        stream = self.streams(fp64)[0]
        projection = fp64.model.model.language_model.layers[1].self_attn.k_proj.weight
        old = projection.detach().clone()
        engine = Engine(fp64, kv_slots=2000, max_streams=4)
        engine.add(stream)

        def swap():
            with torch.no_grad():
                projection.mul_(1.1)

        try:
            while engine.admission.running == [] or engine.admission.running[0].writer.turn < 5:
                engine.step()
            cut = engine.admission.running[0].forwarded
            swap()
            engine.version = 1
            (log,) = self.ran(engine).values()
            assert log.versions == (0, 1)
            with torch.no_grad():
                projection.copy_(old)
                slow = slow_logps(fp64, log, stream, memory, cut, swap)
        finally:
            with torch.no_grad():
                projection.copy_(old)
        assert np.abs(slow.numpy() - log.behaviour_logp[log.sampled]).max() <= FP64_BAR


class MovesVideo(SinkWindow):
    """Lets video move, too: everything of an older turn stands in TEXT, one after the other."""

    def __init__(self, window: int = 3) -> None:
        super().__init__(window, window, 3, 4)

    def regions(self, live, start):
        region = super().regions(live, start)
        region[(live.turn < start.turn - 1) & (region == Region.RETAINED)] = Region.TEXT
        return region


class Wrong(MovesVideo):
    """Answers with what it was made with."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def regions(self, live, start):
        region = super().regions(live, start)
        if self.answer == "back" and start.turn == 2:
            region[:] = Region.RETAINED
        return {"ints": region.astype(int), "none": None, "back": region}[self.answer]


def custom(name: str, **args) -> MemoryConfig:
    return MemoryConfig("custom", target=f"{__name__}:{name}", args=args, positions="contiguous")


def test_regions_of_ones_own_are_exact_in_any_case(fp64):
    requests = random_requests(fp64, custom("MovesVideo"), 4, seed=8, low=8)
    logs = run(fp64, requests)
    assert any((log.kind[log.regions.token] == Kind.VIDEO).any() for log in logs)
    assert differences(fp64, logs, requests).max() <= FP64_BAR


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "ints",
            r"Wrong\.regions returned int64 \[0\] in turn 0; .* array of int8, one Region for each of the 0 tokens",
        ),
        ("none", r"Wrong\.regions returned None in turn 0"),
        (
            "back",
            r"Wrong\.regions puts token 0 into region 5 in turn 2, it was in 0 \(SYSTEM\): a token stays where it is",
        ),
    ],
)
def test_a_policy_whose_regions_are_wrong_is_told_what(fp64, answer, said):
    engine = Engine(fp64, kv_slots=4000, max_streams=1)
    engine.add(request(fp64, custom("Wrong", answer=answer), random_turns(fp64, np.random.default_rng(0), 6), "s"))
    with pytest.raises(ValueError, match=said):
        run_to_the_end(engine)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"positions": "near"}, r"memory\.positions='near' is not one of native, contiguous"),
        (
            {"positions": "contiguous"},
            r"memory\.positions=contiguous with memory\.name=rcsm: this policy has no regions .*own a method regions",
        ),
        (
            {"name": "sink_window", "text_window": 2, "window": 3, "positions": "contiguous"},
            r"memory\.positions=contiguous: text stays for memory\.text_window=2 .*memory\.window=3",
        ),
    ],
)
def test_positions_that_cannot_be_are_refused_by_key(values, said):
    with pytest.raises(ValueError, match=said):
        MemoryConfig(**values)


def test_positions_are_part_of_the_log_header_and_of_what_is_said_at_start():
    assert ("positions", "contiguous") in knobs(SMALL)
    assert SMALL.words.endswith(", contiguous positions")
    assert SMALL.notes() == []


def test_a_checkpoint_that_cannot_have_them_is_refused_before_a_stream_runs(fp64, monkeypatch):
    parameters = fp64.model.model.language_model.config.rope_parameters
    fp64.__dict__.pop("rotary", None)
    monkeypatch.setitem(parameters, "rope_type", "dynamic")
    engine = Engine(fp64, kv_slots=4000, max_streams=1)
    with pytest.raises(ValueError, match=r"rope_type='dynamic'.*memory\.positions=native"):
        engine.add(random_requests(fp64, SMALL, 1)[0])
    assert not engine.busy
    assert engine.pool.raw is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind):
    with pytest.raises(ValueError, match=rf"rope_type='{kind}'.*memory\.positions=native"):
        Rotary(torch.ones(8), {"rope_type": kind, "mrope_section": [4, 2, 2]}, interleaved=False)


def test_the_rotation_is_the_models_own(fp64):
    text = fp64.model.model.language_model
    positions = torch.randint(0, 5000, (3, 1, 50), generator=torch.Generator().manual_seed(1))
    with angles_in_float64():
        theirs = text.rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
    ours = fp64.rotary.tables(positions, torch.float64)
    for a, b in zip(theirs, ours, strict=True):
        assert (a - b).abs().max() <= 1e-12
    unpatched = text.rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
    assert max(float((a - b).abs().max()) for a, b in zip(unpatched, ours, strict=True)) <= 1e-3
