"""What a turn looks like in two lanes: its text, the copy that stays of it, and what malformed turns cannot copy."""

from __future__ import annotations

import numpy as np
import pytest

from evals.transcripts.occupancy import lives, turn_memory
from streams.backbone.tiny import build_tokenizer
from streams.layout import lanes
from streams.layout.layout import Layout, LayoutConfig
from streams.layout.lengths import max_copy
from streams.log.record import ChunkRecord, Kind, LogHeader
from streams.memory import MemoryConfig, make_policy
from streams.positions.mrope import PositionCursor
from streams.writing.writer import QueryInput, StreamWriter, TurnInput

TEXT_MEMORY = MemoryConfig("text_memory")
CHUNK = ChunkRecord(0, "v", (0.0,), (1, 1, 2))


def build_layout(model_type: str = "qwen2_5_vl") -> Layout:
    tokenizer = build_tokenizer(model_type)
    tokenizer.add_tokens(["<silent>", "<response>", "<think>", "</think>"])
    return Layout(tokenizer, LayoutConfig("Hi.", 12, 24), 640)


@pytest.fixture(scope="module")
def layout():
    return build_layout()


def written(layout: Layout, turns: list[tuple[TurnInput, str]]):
    """The log of turns whose generated text is given, with its tags, without the end token."""
    header = LogHeader("s", "t", "b", "text_memory", (), "p", (), 0)
    writer = StreamWriter(header, layout, make_policy(TEXT_MEMORY), PositionCursor(2, 1.0))
    for turn_input, text in turns:
        writer.begin_turn(turn_input, version=0)
        writer.extend_generated([*layout.tokenizer.encode(text), layout.tokens.im_end], 0, target=True)
    return writer.finish()


def copy_of(layout: Layout, text: str, span: lanes.Span | None = (1.0, 2.0)) -> str:
    log = written(layout, [(TurnInput(CHUNK, None, span), text), (TurnInput(CHUNK), "<think></think><silent>")])
    return layout.tokenizer.decode(log.ids[log.kind == Kind.MEMORY])


def test_a_stream_reads_as_the_guide_says(layout):
    query = QueryInput(tuple(layout.query_ids("which?")))
    log = written(
        layout,
        [
            (TurnInput(CHUNK, query, (0.0, 1.0)), "<think>a red square</think><response>red"),
            (TurnInput(None, None, (1.0, 2.0)), "<think>nothing</think><silent>"),
            (TurnInput(CHUNK, query, (2.0, 3.0)), "<think></think><silent>"),
        ],
    )
    decode = layout.tokenizer.decode
    above = "<|im_start|>system\nHi.<|im_end|>\nwhich?\n[0-1 s]\na red square\n[said]\nred\n[1-2 s]\nnothing\nwhich?"
    assert decode(log.ids[log.lane == 0]) == above
    video = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    for turn, (shown, said) in enumerate(
        [
            (video, "<think>a red square</think><response>red"),
            ("", "<think>nothing</think><silent>"),
            (video, "<think></think><silent>"),
        ]
    ):
        mine = decode(log.ids[(log.lane == 1) & (log.turn == turn)])
        assert mine == f"\n<|im_start|>user\n{shown}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>"
    copies = log.kind == Kind.MEMORY
    assert not (log.sampled | log.target)[copies].any()
    assert layout.parse_turns(log)[0].response == "red"
    assert [turn.thought for turn in layout.parse_turns(log)] == ["a red square", "nothing", ""]


def test_lane_one_begins_where_lane_zero_stands(layout):
    log = written(layout, [(TurnInput(CHUNK), "<think>red</think><silent>")] * 3)
    for turn in range(3):
        first = int(np.flatnonzero((log.turn == turn) & (log.lane == 1))[0])
        assert log.positions[0, first] == (log.lane[:first] == 0).sum()
    above = log.positions[0, log.lane == 0]
    assert (above == np.arange(len(above))).all()


@pytest.mark.parametrize(
    ("span", "time"),
    [
        ((12.0, 13.0), "\n[12-13 s]\n"),
        ((0.5, 1.0), "\n[0.5-1 s]\n"),
        ((1 / 3, 2 / 3), "\n[0.33-0.67 s]\n"),
        ((100.0, 110.0), "\n[100-110 s]\n"),
        (None, "\n"),
    ],
)
def test_times_are_told_to_a_hundredth_of_a_second(layout, span, time):
    assert copy_of(layout, "<think>red</think><silent>", span) == time + "red"


@pytest.mark.parametrize(
    ("text", "copied"),
    [
        ("<think></think><silent>", ""),
        ("<think></think><response>", ""),
        ("<think></think><response>red", "\n[1-2 s]\n\n[said]\nred"),
        ("<think>red</think><response>", "\n[1-2 s]\nred"),
        ("<think>red</think><silent>green", "\n[1-2 s]\nred"),
        ("<think>red</think>green", "\n[1-2 s]\nred"),
        ("<think>red", "\n[1-2 s]\nred"),
        ("", ""),
        (
            "<think><response>red<silent><think></think><response>a<think>b</think><silent>c",
            "\n[1-2 s]\nred\n[said]\nabc",
        ),
    ],
)
def test_of_a_malformed_turn_only_words_are_copied(layout, text, copied):
    assert copy_of(layout, text) == copied


def test_no_generated_id_can_bring_a_control_token_or_a_banned_row_into_the_copy(layout):
    """Whatever the kinds say: also ids that the ban list keeps a model from writing."""
    refused = sorted({*layout.banned, *layout.tokenizer.added_tokens_decoder} - {layout.tokens.response})
    ids = np.asarray([*refused, layout.tokens.response, *refused], np.int32)
    kinds = np.repeat([Kind.THINK, Kind.DECISION, Kind.RESPONSE], [len(refused), 1, len(refused)])
    assert layout.memory(ids, kinds, (0.0, 1.0)) is None
    word = layout.tokenizer.encode("red")
    part = layout.memory(np.append(ids, word), np.append(kinds, [Kind.RESPONSE] * len(word)), None)
    assert layout.tokenizer.decode(part.ids) == "\n\n[said]\nred"


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_the_memory_estimate_has_room_for_the_template(model_type):
    layout = build_layout(model_type)
    most = layout.config.max_new_tokens
    assert most < layout.max_memory((5998.5, 5999.75)) <= max_copy(most)


def test_occupancy_shows_the_copy_in_place_of_its_turn(layout):
    turns = [(TurnInput(CHUNK), "<think>red</think><silent>"), (TurnInput(CHUNK), "<think></think><silent>")]
    log = written(layout, [*turns, (TurnInput(None), "<think></think><silent>")])
    memory = turn_memory(log)
    copies = int((log.kind == Kind.MEMORY).sum())
    assert [turn.live.get(Kind.MEMORY, 0) for turn in memory] == [0, copies, copies]
    assert [turn.video_tokens for turn in memory] == [2, 2, 0]
    lane_one = [int(((log.turn == turn) & (log.lane == 1)).sum()) for turn in (0, 1)]
    assert [turn.evicted for turn in memory] == [0, *lane_one]
    assert lives(log, (Kind.VIDEO,)) == (((0, 2), (1, 0)), ((1, 2), (2, 0)), ())
    assert lives(log, (Kind.MEMORY,))[0] == ((1, copies),)
