"""Qwen3-VL's layout: time as text before every temporal patch, equal to its processor's; its tokens and ban list."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny, build_tokenizer
from streams.backbone.tiny_spec import QWEN3_SPEC
from streams.layout.layout import STREAMING_TOKENS, Layout, LayoutConfig
from streams.log.record import ChunkRecord, Kind, LogHeader
from streams.memory import Full, Rcsm, RecentFrames
from streams.positions.mrope import TimestampCursor
from streams.task import ExpectedAnswer, StreamTask, TimedQuery
from streams.video.reader import Clip, frame_times
from streams.writing.inputs import patch_times, turn_inputs
from streams.writing.writer import StreamWriter, TurnInput, check_timestamps_kept

QUERY = "What colour is the shape now?"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return Backbone.load(build_tiny(tmp_path_factory.mktemp("tiny"), QWEN3_SPEC), LayoutConfig())


@pytest.fixture(scope="module")
def layout(backbone):
    return backbone.layout


def processor_text(tokenizer, indices, fps, grid):
    """What transformers' own processor writes for one clip; its video processor, unused here, needs torchvision."""
    processor = object.__new__(Qwen3VLProcessor)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    processor.video_token = "<|video_pad|>"
    inputs = {
        "video_grid_thw": np.array([grid]) * np.array([1, 2, 2]),
        "video_metadata": [SimpleNamespace(fps=fps, frames_indices=list(indices))],
    }
    return processor.replace_video_token(inputs, 0)


def clip_of(chunks, frames, start=0.0, chunk_seconds=1.0):
    pixels = np.zeros((chunks, frames, 28, 56, 3), np.uint8)
    return Clip(pixels, frame_times(start, chunks, chunk_seconds, frames))


def task_of(start, chunks):
    asked = start + 1.0
    return StreamTask("t", "v.mp4", start, start + chunks, (TimedQuery(asked, QUERY),), (ExpectedAnswer(asked, "red"),))


@pytest.mark.parametrize("start", [0.0, 0.1, 7.3, 1234.56])
@pytest.mark.parametrize("frames", [2, 4, 6])
def test_a_stream_is_the_chat_template_with_the_processors_video_text(layout, start, frames):
    """For the frames that the stream shows, as a processor would find them in a file that starts with the stream."""
    chunks, patches = 13, frames // 2
    turns = turn_inputs(task_of(start, chunks), clip_of(chunks, frames, start), layout, 1.0, 2)
    rate = 2 * frames
    messages = [{"role": "system", "content": layout.config.system_prompt}]
    ids = list(layout.system_ids)
    for turn, turn_input in enumerate(turns):
        shown = [2 * (turn * frames + k) + 1 for k in range(frames)]
        video = processor_text(layout.tokenizer, shown, rate, (patches, 1, 2))
        content = video + ("\n" + QUERY if turn == 1 else "")
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": "<think></think><silent>"}]
        query = None if turn_input.query is None else list(turn_input.query.ids)
        for part in layout.prefill(turn_input.chunk, query):
            ids += part.ids.tolist()
        ids += layout.demonstration("", None)
    text = layout.tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<12.5 seconds>" in text or frames > 2
    assert ids == layout.tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)


@given(st.integers(0, 50_000), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_the_text_around_a_timestamp_joins_without_merging(tenths, patches):
    """Ids of the pieces are ids of the whole, whatever the digits."""
    layout = _layout()
    times = tuple((tenths + k) / 10 for k in range(patches))
    chunk = ChunkRecord(0, "v", (), (patches, 1, 1), patch_times=times)
    ids = [i for part in layout.prefill(chunk, None) for i in part.ids.tolist()]
    text = layout.tokenizer.decode(ids)
    assert all(f"<{seconds:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>" in text for seconds in times)
    assert layout.tokenizer.encode(text, add_special_tokens=False) == ids


_CACHED: list[Layout] = []


def _layout() -> Layout:
    """Hypothesis cannot take module fixtures without a warning for every example."""
    if not _CACHED:
        tokenizer = build_tokenizer("qwen3_vl")
        tokenizer.add_tokens(list(STREAMING_TOKENS))
        _CACHED.append(Layout(tokenizer, LayoutConfig(), 640, timestamps=True))
    return _CACHED[0]


def test_times_count_from_the_start_of_the_stream_and_are_causal():
    assert patch_times(3, 1, 1.0, 2).tolist() == [[0.5], [1.5], [2.5]]
    assert patch_times(2, 2, 2.0, 4).tolist() == [[0.5, 1.5], [2.5, 3.5]]
    assert (patch_times(9, 2, 1.5, 4)[:4] == patch_times(4, 2, 1.5, 4)).all()


def test_every_patch_is_a_block_of_its_own_and_its_time_is_scaffold(layout):
    chunk = ChunkRecord(0, "v", (), (2, 1, 2), patch_times=(0.5, 1.5))
    parts = layout.prefill(chunk, layout.query_ids(QUERY))
    kinds = [part.kind for part in parts]
    video = [part for part in parts if part.kind == Kind.VIDEO]
    assert kinds.count(Kind.QUERY) == 1
    assert [part.grid for part in video] == [(1, 1, 2), (1, 1, 2)]
    assert [len(part.ids) for part in video] == [2, 2]
    scaffold = layout.tokenizer.decode(np.concatenate([p.ids for p in parts if p.kind == Kind.SCAFFOLD]).tolist())
    assert "<0.5 seconds>" in scaffold
    assert "<1.5 seconds>" in scaffold


def test_kept_tokens_go_to_their_own_patch_and_an_emptied_patch_still_moves_the_positions(layout):
    keep = (0, 3, 9)  # two of patch 0, none of patch 1, one of patch 2
    chunk = ChunkRecord(0, "v", (), (3, 2, 2), keep=keep, patch_times=(0.5, 1.5, 2.5))
    video = [part for part in layout.prefill(chunk, None) if part.kind == Kind.VIDEO]
    assert [part.keep for part in video] == [(0, 3), (), (1,)]
    whole, kept = write(layout, ChunkRecord(0, "v", (), (3, 2, 2), patch_times=(0.5, 1.5, 2.5))), write(layout, chunk)
    assert (kept.kind == Kind.VIDEO).sum() == len(keep) == chunk.num_tokens
    assert (kept.positions[:, kept.kind == Kind.VIDEO] == whole.positions[:, whole.kind == Kind.VIDEO][:, keep]).all()
    text = kept.kind != Kind.VIDEO
    assert (kept.positions[:, text] == whole.positions[:, whole.kind != Kind.VIDEO]).all()


def write(layout, chunk):
    header = LogHeader("s", "t", "qwen3_vl", "full", (), "c", layout.banned, 0)
    writer = StreamWriter(header, layout, Full(), TimestampCursor())
    writer.begin_turn(TurnInput(chunk), 0)
    return writer.finish()


def test_a_chunk_without_the_times_of_its_patches_is_refused(layout):
    with pytest.raises(ValueError, match=r"turn 3 of clip\.mp4: 1 patch times for 2 temporal patches"):
        layout.prefill(ChunkRecord(3, "clip.mp4", (), (2, 1, 1), patch_times=(0.5,)), None)


def test_text_may_not_leave_before_the_video_whose_time_it_tells(layout):
    short = RecentFrames(5)
    short.text_window = 4
    with pytest.raises(
        ValueError, match=r"text stays for 4 turns \(memory\.text_window\) but video for memory\.window=5"
    ):
        check_timestamps_kept(layout, short)
    without_times = Layout(layout.tokenizer, layout.config, layout.vocab_rows)
    for fine in (Full(), Rcsm(3), RecentFrames(3)):
        check_timestamps_kept(layout, fine)
    check_timestamps_kept(without_times, short)
    with pytest.raises(ValueError, match="tells the time of a chunk in text"):
        StreamWriter(LogHeader("s", "t", "b", "p", (), "c", (), 0), layout, short, TimestampCursor())


def test_only_silent_and_response_are_added_and_the_think_tags_keep_their_ids(backbone):
    plain = build_tokenizer("qwen3_vl")
    tokens = backbone.layout.tokens
    assert (tokens.think, tokens.think_end) == tuple(plain.convert_tokens_to_ids(["<think>", "</think>"]))
    assert (tokens.silent, tokens.response) == (len(plain), len(plain) + 1)
    assert len(backbone.tokenizer) == len(plain) + 2
    assert not plain.added_tokens_decoder[tokens.think].special


def test_the_think_tags_may_be_written_and_other_control_tokens_may_not(backbone):
    tokens, banned = backbone.layout.tokens, set(backbone.layout.banned)
    assert not banned & {tokens.think, tokens.think_end, tokens.silent, tokens.response, tokens.im_end}
    named = backbone.tokenizer.convert_tokens_to_ids(
        ["<tool_call>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>"]
    )
    assert set(named) <= banned
    assert not banned & set(backbone.tokenizer.encode("<12.5 seconds>", add_special_tokens=False))


def test_a_thought_comes_back_without_its_tags_although_they_are_not_special(layout):
    ids = layout.demonstration("red", "green")
    kinds = [Kind.THINK] * (ids.index(layout.tokens.think_end) + 1)
    kinds += [Kind.DECISION] + [Kind.RESPONSE] * (len(ids) - len(kinds) - 2) + [Kind.END]
    parsed = layout.parse_turn(0, np.array(ids), np.array(kinds), np.zeros(len(ids), bool))
    assert (parsed.thought, parsed.response, parsed.well_formed) == ("red", "green", True)
