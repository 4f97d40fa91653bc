"""With `full` memory and greedy decoding, the engine writes what the backbone's own `generate` writes, token for token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from rollout.engine import StreamRequest
from streams.layout import LayoutConfig
from streams.log import ChunkRecord, LogHeader
from streams.memory import MemoryConfig, knobs, make_policy
from streams.positions import PositionCursor
from streams.video import normalize_patches, patchify
from streams.writer import QueryInput, TurnInput
from tests.streams_lib import loud_backbone, norms_in_input_dtype, run

SIZES = ((56, 56), (28, 56), (56, 28), (28, 28), (84, 56))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    with norms_in_input_dtype():
        layout = LayoutConfig(think_budget=12, max_new_tokens=16)
        yield loud_backbone(tmp_path_factory.mktemp("generate"), torch.float64, layout)


def stream(backbone, seed, turns=6):
    """A greedy stream over real frames: (request, uint8 frames of each chunk)."""
    rng = np.random.default_rng(seed)
    height, width = SIZES[seed % len(SIZES)]
    frames = rng.integers(0, 256, (turns, 2, height, width, 3), np.uint8)
    with torch.no_grad():
        features = backbone.encode_video([frames])[0]
    inputs = []
    for turn in range(turns):
        chunk = ChunkRecord(turn, "clip.mp4", (turn, turn + 0.5), (1, height // 28, width // 28))
        query = (
            QueryInput(tuple(backbone.layout.query_ids("What colour is the shape now?"))) if turn in (1, 4) else None
        )
        inputs.append(TurnInput(chunk, query))
    memory = MemoryConfig("full")
    header = LogHeader(
        stream_id=f"g/{seed}",
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


def test_greedy_tokens_equal_the_backbones_own_generate(backbone, tmp_path):
    # The reference runs with transformers' own attention, cache and positions, from the exported checkpoint.
    backbone.save(tmp_path / "export", {})
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", dtype=torch.float64).eval()
    assert reference.config.text_config._attn_implementation == "sdpa"
    requests, clips = zip(*(stream(backbone, seed) for seed in range(5)), strict=True)
    compared = 0
    for log, frames in zip(run(backbone, list(requests)), clips, strict=True):
        chunks, _, height, width, _ = frames.shape
        pixels = torch.cat([torch.from_numpy(patchify(chunk)) for chunk in frames])
        pixels = normalize_patches(pixels, backbone.image.mean, backbone.image.std).double()
        for start, stop in sampled_runs(log):
            shown = int(log.turn[start]) + 1
            ids = torch.from_numpy(log.ids[None, :start].astype(np.int64))
            is_video = ids == backbone.layout.tokens.video_pad
            per_chunk = (height // 14) * (width // 14)
            generated = reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=torch.where(is_video, 2, 0),
                pixel_values_videos=pixels[: shown * per_chunk],
                video_grid_thw=torch.tensor([[1, height // 14, width // 14]] * shown),
                second_per_grid_ts=torch.ones(shown, dtype=torch.long),
                suppress_tokens=list(log.header.banned),
                do_sample=False,
                max_new_tokens=int(stop - start),
            )[0, start:]
            assert generated.tolist() == log.ids[start:stop].tolist()
            compared += stop - start
        assert shown == chunks
    assert compared > 150


def test_our_positions_equal_transformers_for_one_patch_chunks(backbone, tmp_path):
    request, frames = stream(backbone, 0)
    log = run(backbone, [request])[0]
    ids = torch.from_numpy(log.ids[None].astype(np.int64))
    types = torch.where(ids == backbone.layout.tokens.video_pad, 2, 0)
    grid = torch.tensor([[1, frames.shape[2] // 14, frames.shape[3] // 14]] * len(frames))
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


def test_patches_half_a_second_apart_do_not_collapse():
    cursor = PositionCursor(tokens_per_second=4, patch_seconds=0.5)
    assert cursor.video((3, 1, 1))[0].tolist() == [0, 2, 4]
    assert cursor.offset == 5


def test_dropped_video_tokens_keep_their_ids_and_the_offset_moves_by_the_full_grid():
    whole, kept = PositionCursor(2, 1.0), PositionCursor(2, 1.0)
    full = whole.video((1, 2, 2))
    assert (kept.video((1, 2, 2), keep=(0, 3)) == full[:, [0, 3]]).all()
    assert kept.offset == whole.offset
