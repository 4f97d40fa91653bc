"""Property: with `full` memory and greedy decoding, the engine writes what the backbone's own `generate` writes, token for
token; and golden tables of the positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from rollout.engine.request import StreamRequest
from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.folder import token_side
from streams.layout.layout import LayoutConfig
from streams.log.record import LogHeader
from streams.memory import MemoryConfig, knobs, make_policy
from streams.positions.mrope import PositionCursor, TimestampCursor
from streams.video.patches import normalize_patches, patchify
from streams.writing.writer import QueryInput, TurnInput
from tests.support.streams import SPECS, chunk_record, loud_backbone, norms_in_input_dtype, run

SIZES = ((2, 2), (1, 2), (2, 1), (1, 1), (3, 2))
"""Frames, in video tokens."""


@dataclass(frozen=True)
class Case:
    """A backbone and the temporal patches of a chunk. Two of them need timestamps: in Qwen2.5-VL they are one grid."""

    spec: TinySpec
    patches: int = 1


CASES = {
    "qwen2_5_vl": Case(SPECS["qwen2_5_vl"]),
    "qwen3_vl": Case(SPECS["qwen3_vl"], patches=2),
    "qwen3_vl of 16 pixels, tied": Case(replace(SPECS["qwen3_vl"], patch_size=16, tie_embeddings=True)),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(case, tmp_path_factory):
    with norms_in_input_dtype():
        layout = LayoutConfig(think_budget=12, max_new_tokens=16)
        yield loud_backbone(tmp_path_factory.mktemp("generate"), torch.float64, case.spec, layout)


@dataclass(frozen=True)
class Shown:
    """A stream to be watched: frames by seed, all of one size; some turns without video, some with a query."""

    seed: int = 0
    turns: int = 6
    patches: int = 1
    size: tuple[int, int] = SIZES[0]
    text_only: frozenset[int] = frozenset()
    asked: frozenset[int] = frozenset({1, 4})


def stream(backbone, shown):
    """A greedy stream over real frames: (request, uint8 frames of each chunk)."""
    rng = np.random.default_rng(shown.seed)
    height, width = shown.size
    side = token_side(backbone.source)
    chunks = [turn for turn in range(shown.turns) if turn not in shown.text_only]
    frames = rng.integers(0, 256, (len(chunks), 2 * shown.patches, height * side, width * side, 3), np.uint8)
    with torch.no_grad():
        features = backbone.encode_video([frames])[0]
    inputs = []
    for turn in range(shown.turns):
        chunk = chunk_record(turn, (shown.patches, height, width)) if turn in chunks else None
        asked = turn in shown.asked
        query = QueryInput(tuple(backbone.layout.query_ids("What colour is the shape now?"))) if asked else None
        inputs.append(TurnInput(chunk, query))
    memory = MemoryConfig("full")
    header = LogHeader(
        stream_id=f"g/{shown.seed}",
        task_id="g",
        backbone=backbone.name,
        policy="full",
        policy_knobs=knobs(memory),
        position_convention=backbone.position_convention,
        banned=backbone.layout.banned,
        seed=0,
        temperature=0.0,
    )
    request = StreamRequest(header, tuple(inputs), tuple(features), make_policy(memory), backbone.layout, 1.0)
    return request, frames


def sampled_runs(log):
    """(start, stop) of every maximal run of sampled tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], log.sampled.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.fixture(scope="module")
def reference(backbone, tmp_path_factory):
    """The exported checkpoint with transformers' own attention, cache and positions."""
    folder = tmp_path_factory.mktemp("export")
    backbone.save(folder, {})
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    assert model.config.text_config._attn_implementation == "sdpa"
    return model


def generated_again(backbone, reference, log, shown, frames):
    """Ids that `generate` writes where the engine sampled, each run from what the engine had written before it."""
    patch = backbone.image.patch_size
    grid = [shown.patches, frames.shape[2] // patch, frames.shape[3] // patch]
    pixels = torch.cat([torch.from_numpy(patchify(chunk, patch)) for chunk in frames])
    pixels = normalize_patches(pixels, backbone.image.mean, backbone.image.std).double()
    for start, stop in sampled_runs(log):
        chunks = sum(turn not in shown.text_only for turn in range(int(log.turn[start]) + 1))
        ids = torch.from_numpy(log.ids[None, :start].astype(np.int64))
        is_video = ids == backbone.layout.tokens.video_pad
        # Only Qwen2.5-VL's positions know of seconds.
        extra = {} if backbone.layout.timestamps else {"second_per_grid_ts": torch.ones(chunks, dtype=torch.long)}
        written = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=torch.where(is_video, 2, 0),
            pixel_values_videos=pixels[: chunks * int(np.prod(grid))],
            video_grid_thw=torch.tensor([grid] * chunks),
            **extra,
            suppress_tokens=list(log.header.banned),
            do_sample=False,
            max_new_tokens=int(stop - start),
        )
        yield written[0, start:].tolist(), log.ids[start:stop].tolist()


@given(data=st.data())
@settings(max_examples=5)
def test_greedy_tokens_equal_the_backbones_own_generate(backbone, reference, case, data):
    turns = data.draw(st.integers(3, 6))
    later = st.frozensets(st.integers(1, turns - 1))
    shown = Shown(
        seed=data.draw(st.integers(0, 2**32 - 1)),
        turns=turns,
        patches=case.patches,
        size=data.draw(st.sampled_from(SIZES)),
        text_only=data.draw(later),
        asked=data.draw(later),
    )
    request, frames = stream(backbone, shown)
    (log,) = run(backbone, [request])
    pairs = list(generated_again(backbone, reference, log, shown, frames))
    assert len(pairs) >= turns, "every turn has a choice"
    for theirs, ours in pairs:
        assert theirs == ours


def test_our_positions_equal_transformers_where_the_conventions_coincide(backbone, case):
    """Chunks of one temporal patch; with timestamps any chunk, for transformers takes its patches apart as we do."""
    request, frames = stream(backbone, Shown(patches=case.patches))
    log = run(backbone, [request])[0]
    ids = torch.from_numpy(log.ids[None].astype(np.int64))
    types = torch.where(ids == backbone.layout.tokens.video_pad, 2, 0)
    patch = backbone.image.patch_size
    grid = torch.tensor([[case.patches, frames.shape[2] // patch, frames.shape[3] // patch]] * len(frames))
    theirs, _ = backbone.model.model.get_rope_index(ids, types, video_grid_thw=grid)
    assert (theirs[:, 0].numpy() == log.positions).all()


def test_golden_position_table():
    cursor = PositionCursor(tokens_per_second=2, patch_seconds=1.0)
    assert cursor.text(3).tolist() == [[0, 1, 2]] * 3
    # Two temporal patches one second apart, 2 x 3 merged tokens each: the temporal id moves by 2 tokens per second.
    assert cursor.video((2, 2, 3)).tolist() == [
        [3, 3, 3, 3, 3, 3, 5, 5, 5, 5, 5, 5],
        [3, 3, 3, 4, 4, 4, 3, 3, 3, 4, 4, 4],
        [3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5],
    ]
    # Text goes on after the largest id used so far.
    assert cursor.text(2).tolist() == [[6, 7]] * 3
    # A long thin grid: the width rules.
    assert cursor.video((1, 1, 4)).tolist() == [[8, 8, 8, 8], [8, 8, 8, 8], [8, 9, 10, 11]]
    assert cursor.offset == 12


def test_golden_position_table_with_timestamps():
    cursor = TimestampCursor()
    # Scaffold up to and with the first timestamp's vision start.
    assert cursor.text(3).tolist() == [[0, 1, 2]] * 3
    # 2 x 3 merged tokens: all at one temporal id, rows and columns counted from there.
    assert cursor.video((1, 2, 3)).tolist() == [[3, 3, 3, 3, 3, 3], [3, 3, 3, 4, 4, 4], [3, 4, 5, 3, 4, 5]]
    # Vision end, the next timestamp and its vision start go on after the largest id: the longer side rules, not time.
    assert cursor.text(2).tolist() == [[6, 7]] * 3
    assert cursor.video((1, 2, 3)).tolist() == [[8, 8, 8, 8, 8, 8], [8, 8, 8, 9, 9, 9], [8, 9, 10, 8, 9, 10]]
    # A patch of which every token was dropped still takes its place.
    assert cursor.video((1, 4, 1), keep=()).shape == (3, 0)
    assert cursor.text(1).tolist() == [[15]] * 3
    with pytest.raises(ValueError, match="2 temporal patches"):
        cursor.video((2, 1, 1))


def test_patches_half_a_second_apart_do_not_collapse():
    cursor = PositionCursor(tokens_per_second=4, patch_seconds=0.5)
    assert cursor.video((3, 1, 1))[0].tolist() == [0, 2, 4]
    assert cursor.offset == 5


def test_dropped_video_tokens_keep_their_ids_and_the_offset_moves_by_the_full_grid():
    whole, kept = PositionCursor(2, 1.0), PositionCursor(2, 1.0)
    full = whole.video((1, 2, 2))
    assert (kept.video((1, 2, 2), keep=(0, 3)) == full[:, [0, 3]]).all()
    assert kept.offset == whole.offset
