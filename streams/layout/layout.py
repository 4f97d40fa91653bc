"""Watch-Think-Speak layout: the tokens of a turn, the ban list, forced tokens, and parsing what was generated.

Layout of turn t (Qwen2.5-VL), equal to `apply_chat_template` on the same conversation:

    [\\n <|im_start|> user \\n <|vision_start|>] [video] [<|vision_end|> (\\n query) <|im_end|>]
    [\\n <|im_start|> assistant \\n] [<think> thought </think> (<response> text | <silent>) <|im_end|>]

Qwen3-VL writes time as text: every temporal patch of a chunk is `<12.3 seconds> <|vision_start|> [video]
<|vision_end|>`, its time counted from the start of the stream. The system message precedes turn 0, without its trailing
newline: that newline opens turn 0, as it opens every other turn. With two lanes (`streams.layout.lanes`) the query
comes before all of this, and a copy of what was thought and said comes after it:
`\\n[12-13 s]\\n thought \\n[said]\\n answer`.

Source: ThinkStream (arXiv 2603.12938), Watch-Think-Speak paradigm.

Invariants:
* token ids in, token ids out: text is tokenised once, when a turn is laid out; generated ids are never re-tokenised;
* no text from a row or a model can produce a control token in a query, a demonstration or a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streams.layout.lanes import SAID, Lanes, Span, head
from streams.layout.lengths import NOT_COPIED
from streams.layout.runs import Part, Run, joined
from streams.log.record import GENERATED, ChunkRecord, Kind, StreamLog
from streams.turns import ParsedTurn

STREAMING_TOKENS = ("<silent>", "<response>", "<think>", "</think>")
"""Tokens that are added to a tokenizer, in the published order; those that it already has keep their ids."""

ANSWER_SCAFFOLD = 4
"""Generated tokens of a well-formed turn besides its thought and answer: both think tags, <response>, the end token."""

MAX_STAMPS = 4096
"""How many time stamps keep their ids in a cache: the streams of a group, and of an epoch, share them."""
MAX_RUNS = 256
"""Turns that are kept laid out: most turns look alike, and the streams of a group see the same times."""

DEFAULT_SYSTEM_PROMPT = (
    "You watch a video that arrives in chunks. After every chunk, first think briefly inside the think tags. "
    "Then write <response> and your answer if an answer is due now, otherwise write <silent>."
)


@dataclass(frozen=True)
class LayoutConfig:
    """The budgets of a turn and the system prompt."""

    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    """System message at the start of every stream."""
    think_budget: int = 20
    """Tokens of the think span with both tags, at least 2; then `</think>` is forced."""
    max_new_tokens: int = 30
    """Generated tokens of one turn with tags and end token, at least `layout.think_budget` + 2; the last one is
    forced to be the end token.
    """
    force_empty_thoughts: bool = False
    """Start every turn with a forced `<think></think>`."""

    def __post_init__(self) -> None:
        if self.think_budget < 2:
            raise ValueError(f"layout.think_budget={self.think_budget} must hold at least both think tags (2)")
        if self.max_new_tokens < self.think_budget + 2:
            raise ValueError(
                f"layout.max_new_tokens={self.max_new_tokens} must leave room for a decision and the end token "
                f"after layout.think_budget={self.think_budget} (at least {self.think_budget + 2})"
            )


class OverBudget(ValueError):
    """Raised for a demonstrated turn that is longer than a budget. key: the config key of that budget."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class LayoutTokens:
    """The ids that the layout is made of, read from a tokenizer once."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    video_pad: int
    silent: int
    response: int
    think: int
    think_end: int


@dataclass
class Layout:
    """Lays out turns for one tokenizer.

    Attributes:
        vocab_rows: rows of the checkpoint's LM head.
        timestamps: True: every temporal patch is a vision block of its own after its time in words (Qwen3-VL). False: a
            chunk is one vision block without a time (Qwen2.5-VL, whose position ids carry it).
        tokens: ids of the tokens that the layout is made of.
        banned: ids that may not be sampled, ascending.

    Raises ValueError for a tokenizer that lacks one of the layout's tokens.
    """

    tokenizer: Any
    config: LayoutConfig
    vocab_rows: int
    timestamps: bool = False
    tokens: LayoutTokens = field(init=False)
    banned: tuple[int, ...] = field(init=False)
    # Ids that no query, and that no thought or answer, may contain; sets, as every text is checked against them.
    _control: frozenset[int] = field(init=False)
    _refused: frozenset[int] = field(init=False)
    # Ids of short texts that recur: times.
    _stamps: dict[str, list[int]] = field(init=False, default_factory=dict)
    # Turns that show nothing but a whole chunk, by its grid and, where they are written, its times.
    _runs: dict[tuple[Any, Lanes], tuple[Run, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        def one(text: str) -> int:
            token = self.tokenizer.convert_tokens_to_ids(text)
            if token is None or self.tokenizer.convert_ids_to_tokens(token) != text:
                raise ValueError(
                    f"the tokenizer has no token {text!r}: load the checkpoint through streams.backbone.backbone"
                )
            return int(token)

        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
        self.tokens = LayoutTokens(*[one(name) for name in (*names, *STREAMING_TOKENS)])
        self._control = frozenset(int(i) for i in self.tokenizer.added_tokens_decoder)
        self.banned = self._ban_list()
        self._refused = self._control.union(self.banned)
        encode = self._encode
        self._said = encode(SAID)
        self._opening = _part([*encode("\n"), self.tokens.im_start, *encode("user\n")], Kind.SCAFFOLD)
        self._closing = _part(
            [self.tokens.im_end, *encode("\n"), self.tokens.im_start, *encode("assistant\n")], Kind.SCAFFOLD
        )
        self.system_ids = [
            self.tokens.im_start,
            *encode(f"system\n{self.config.system_prompt.strip()}"),
            self.tokens.im_end,
        ]

    def with_config(self, config: LayoutConfig) -> Layout:
        """Return the layout of the same checkpoint under other settings."""
        return replace(self, config=config)

    def query_ids(self, text: str, *, strip: bool = True) -> list[int]:
        """Return the ids of a query text. Raises ValueError if it spells a control token, which could forge a turn."""
        ids = self._encode(text.strip() if strip else text)
        for token in ids:
            if token in self._control:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise ValueError(f"the query {text!r} spells the control token {name!r}")
        return ids

    def text_ids(self, text: str, what: str) -> list[int]:
        """Return the ids of a demonstrated thought or answer.

        Raises ValueError, which begins with `what`, if the text spells a banned or a control token.
        """
        ids = self._encode(text.strip())
        for token in ids:
            if token in self._refused:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise ValueError(f"{what} {text!r} contains {name!r}, which the model may not write there")
        return ids

    def prefill(self, chunk: ChunkRecord | None, query: list[int] | None, lanes: Lanes = Lanes.ONE) -> tuple[Part, ...]:
        """Return what a turn is shown, in order. chunk: None for a turn of text alone.

        Generation continues in the lane of the last part. Raises ValueError as `_vision_blocks` does.
        """
        if lanes is Lanes.MEMORY:
            asked = (_part([*self._short("\n"), *query], Kind.QUERY),) if query else ()
            return (*asked, *(replace(part, lane=1) for part in self.prefill(chunk, None)))
        parts = [self._opening]
        if chunk is not None:
            for stamp, grid, keep in self._vision_blocks(chunk):
                tokens = grid[0] * grid[1] * grid[2] if keep is None else len(keep)
                parts.append(_part([*stamp, self.tokens.vision_start], Kind.SCAFFOLD))
                parts.append(Part(np.full(tokens, self.tokens.video_pad, np.int32), Kind.VIDEO, grid, keep))
                parts.append(_part([self.tokens.vision_end], Kind.SCAFFOLD))
        if query:
            # The newline before the query has the query's kind: it is evicted with the question.
            newline = self._short("\n") if chunk is not None else []
            parts.append(_part([*newline, *query], Kind.QUERY))
        parts.append(self._closing)
        return tuple(parts)

    def runs(
        self, chunk: ChunkRecord | None, query: list[int] | None, lanes: Lanes = Lanes.ONE, *, first: bool = False
    ) -> tuple[Run, ...]:
        """Return the same `prefill` as it is logged, lane by lane. first: of the turn that the system prompt precedes."""
        if first:
            system = _part(self.system_ids, Kind.SYSTEM)
            return joined((system, *self.prefill(chunk, query, lanes)))
        if query or (chunk is not None and chunk.keep is not None):
            return joined(self.prefill(chunk, query, lanes))
        key = None if chunk is None else (chunk.grid, chunk.patch_times if self.timestamps else ()), lanes
        runs = self._runs.get(key)
        if runs is None:
            runs = joined(self.prefill(chunk, None, lanes))
            if len(self._runs) >= MAX_RUNS:
                self._runs.clear()
            self._runs[key] = runs
        return runs

    def _vision_blocks(
        self, chunk: ChunkRecord
    ) -> Iterator[tuple[list[int], tuple[int, int, int], tuple[int, ...] | None]]:
        """Yield (ids of the time, merged grid, kept cells of that grid) for every vision block of a chunk.

        Raises ValueError if times are to be written and the chunk does not have one for each temporal patch.
        """
        if not self.timestamps:
            yield [], chunk.grid, chunk.keep
            return
        patches, height, width = chunk.grid
        if len(chunk.patch_times) != patches:
            raise ValueError(
                f"turn {chunk.turn} of {chunk.video}: {len(chunk.patch_times)} patch times for {patches} temporal patches; "
                "this backbone writes the time of each"
            )
        cells = height * width
        for patch, seconds in enumerate(chunk.patch_times):
            keep = chunk.keep
            if keep is not None:
                keep = tuple(i - patch * cells for i in keep if patch * cells <= i < (patch + 1) * cells)
            yield self._timestamp(seconds), (1, height, width), keep

    def memory(self, ids: np.ndarray, kinds: np.ndarray, span: Span | None) -> Part | None:
        """Return the copy of a turn, from the ids int [n] and kinds int [n] that it generated.

        None if it neither thought nor answered. The copy contains no tag and no other control token, even where a
        malformed turn has them inside its text.
        """
        said = list(zip(ids.tolist(), kinds.tolist(), strict=True))
        thought = [i for i, kind in said if kind == Kind.THINK and i not in self._refused]
        spoke = (self.tokens.response, Kind.DECISION) in said
        answer = [i for i, kind in said if kind == Kind.RESPONSE and i not in self._refused] if spoke else []
        if not thought and not answer:
            return None
        return _part([*self._short(head(span)), *thought, *(self._said if answer else ()), *answer], Kind.MEMORY)

    def max_memory(self, span: Span | None) -> int:
        """Return the most tokens that such a copy can have.

        An answering turn has at least three tokens that are not copied: `</think>`, `<response>` and its end.
        """
        return len(self._short(head(span))) + len(self._said) + self.config.max_new_tokens - NOT_COPIED

    def _timestamp(self, seconds: float) -> list[int]:
        return self._short(f"<{seconds:.1f} seconds>")

    def _short(self, text: str) -> list[int]:
        if text not in self._stamps:
            if len(self._stamps) >= MAX_STAMPS:  # an endless stream never stops making new times
                self._stamps.clear()
            self._stamps[text] = self._encode(text)
        return self._stamps[text]

    def demonstration(self, thought: str, response: str | None) -> list[int]:
        """Return a demonstrated turn's generated ids, end token included. Raises ValueError as `text_ids` does."""
        t = self.tokens
        ids = [t.think, *self.text_ids(thought, "the thought"), t.think_end]
        ids += [t.silent] if response is None else [t.response, *self.text_ids(response, "the answer")]
        return [*ids, t.im_end]

    def within_budgets(self, thought: str, response: str | None, turn: int) -> list[int]:
        """Return the `demonstration` of turn number `turn`.

        Raises OverBudget if no turn of the engine can be that long, ValueError as `text_ids` does.
        """
        ids = self.demonstration(thought, response)
        span = ids.index(self.tokens.think_end) + 1
        if span > self.config.think_budget:
            raise OverBudget(
                "layout.think_budget",
                f"the thought of turn {turn} has {span} tokens with its tags, more than "
                f"layout.think_budget={self.config.think_budget}: {thought!r}",
            )
        if len(ids) > self.config.max_new_tokens:
            raise OverBudget(
                "layout.max_new_tokens",
                f"the demonstration of turn {turn} has {len(ids)} tokens, more than "
                f"layout.max_new_tokens={self.config.max_new_tokens}",
            )
        return ids

    def fitting(self, answer: str) -> str | None:
        """Return the beginning of an answer that fits into a turn with an empty thought; None if all of it does."""
        ids = self.text_ids(answer, "the answer")
        room = self.config.max_new_tokens - ANSWER_SCAFFOLD
        return None if len(ids) <= room else str(self.tokenizer.decode(ids[:room])).strip()

    def parse_turns(self, log: StreamLog) -> tuple[ParsedTurn, ...]:
        """Return what each turn of a finished log thought and said."""
        generated = np.isin(log.kind, GENERATED)
        forced = generated & ~log.sampled & ~log.target
        turns = []
        for turn in range(log.num_turns):
            rows = np.flatnonzero(generated & (log.turn == turn))
            turns.append(self.parse_turn(turn, log.ids[rows], log.kind[rows], forced[rows]))
        return tuple(turns)

    def parse_turn(self, turn: int, ids: np.ndarray, kinds: np.ndarray, forced: np.ndarray) -> ParsedTurn:
        """Parse one turn's generated ids int [n], of kinds int [n].

        forced: bool [n], the tokens that the engine wrote instead of the model (at a budget's end, or the end token).
        """
        t = self.tokens
        think = ids[kinds == Kind.THINK]
        decision = ids[kinds == Kind.DECISION]
        said = ids[kinds == Kind.RESPONSE]
        pair = len(think) >= 2 and think[0] == t.think and think[-1] == t.think_end
        pair = pair and not np.isin(think[1:-1], (t.think, t.silent, t.response)).any()
        spoke = len(decision) == 1 and decision[0] == t.response
        structural = np.isin(said, (t.think, t.think_end, t.silent, t.response)).any()
        body = len(said) > 0 if spoke else len(said) == 0
        ended = len(ids) > 0 and kinds[-1] == Kind.END and not forced[-1]
        return ParsedTurn(
            turn=turn,
            thought=self._decode(think),
            response=self._decode(said) if spoke else None,
            well_formed=bool(pair and len(decision) == 1 and body and not structural and ended),
            think_tokens=len(think),
            new_tokens=len(ids),
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: np.ndarray) -> str:
        """Return the text without control and layout tokens, so a thought without its tags."""
        return str(self.tokenizer.decode([int(i) for i in ids if int(i) not in self._control])).strip()

    def _ban_list(self) -> tuple[int, ...]:
        t = self.tokens
        allowed = {t.im_end, t.silent, t.response, t.think, t.think_end}
        control = self._control - allowed
        padded = range(len(self.tokenizer), self.vocab_rows)
        return tuple(sorted(i for i in control.union(padded) if i < self.vocab_rows))


def _part(ids: list[int], kind: Kind) -> Part:
    return Part(np.asarray(ids, np.int32), kind)
