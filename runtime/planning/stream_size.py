"""How many tokens a stream can have, by its settings and the sizes of its model: used by all plans and checks.

Once a stream exists the engine knows its exact sizes (`rollout.engine.feed`), from the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from conf.schema import RunConfig
from streams.checkpoint.families import TEMPORAL_PATCH
from streams.checkpoint.model_shape import ModelGeometry
from streams.data.dataset import at_row
from streams.layout.lengths import max_copy, max_scaffold
from streams.memory import Lanes, live_bound, make_policy
from streams.task import StreamTask

SYSTEM_SCAFFOLD = 8
"""Tokens of the system message beside its text, at most."""


@dataclass(frozen=True)
class StreamSize:
    """The largest stream of a run, in tokens.

    Attributes:
        turns: turns of the stream.
        video: video tokens of one turn.
        text: other tokens of one turn.
        fixed: tokens outside of turns: the system message, queries, copies of turns.
        tasks: number of tasks of the run.
        sized_by: which rows it takes its size from, in words.
    """

    turns: int
    video: int
    text: int
    fixed: int
    tasks: int = 1
    sized_by: str = field(default="", compare=False)

    @classmethod
    def largest(cls, config: RunConfig, tasks: Iterable[StreamTask], geometry: ModelGeometry) -> StreamSize:
        """Return an upper bound over the tasks; frames count as data.video.max_pixels."""
        turns, queries, count = 1, 0, 0
        longest, wordiest = "", ""
        for task in tasks:
            count += 1
            lasts = config.data.plan_of(task).turns
            asks = sum(len(query.text.encode()) for query in task.queries)
            # Of equal ones the last.
            if lasts >= turns or not longest:
                turns, longest = lasts, f"{task.id}{at_row(task)}"
            if asks >= queries:
                queries, wordiest = asks, f"{task.id}{at_row(task)}"
        found = cls._of(
            config,
            turns=turns,
            queries=queries,
            tasks=count,
            token_side=geometry.token_side,
            timestamps=geometry.family.timestamps,
        )
        if not count:
            return found
        return replace(
            found,
            sized_by=(
                f"A stream may be as large as one of {turns} turns (task {longest}) with "
                f"{queries:,} bytes of questions (task {wordiest})"
            ),
        )

    @classmethod
    def possible(cls, config: RunConfig, *, token_side: int, timestamps: bool) -> StreamSize:
        """Return an upper bound over whatever tasks there may be, without their queries.

        token_side: pixels along one side of a video token. timestamps: see `streams.checkpoint.families.Family`.
        """
        turns = config.data.max_turns
        return cls._of(config, turns=turns, queries=0, tasks=1, token_side=token_side, timestamps=timestamps)

    @classmethod
    def _of(
        cls, config: RunConfig, *, turns: int, queries: int, tasks: int, token_side: int, timestamps: bool
    ) -> StreamSize:
        """queries: bytes of the texts of one task."""
        video, layout = config.data.video, config.layout
        patches = video.frames_per_chunk // TEMPORAL_PATCH
        copies = 0
        if make_policy(config.memory).lanes is Lanes.MEMORY:
            copies = (turns - 1) * max_copy(layout.max_new_tokens)
        return cls(
            turns=turns,
            # A frame is never made smaller than one token.
            video=patches * max(1, video.max_pixels // token_side**2),
            text=max_scaffold(timestamps=timestamps, patches=patches) + layout.max_new_tokens,
            # Byte-level BPE: a text of n bytes has about n / 4 tokens.
            fixed=SYSTEM_SCAFFOLD + len(layout.system_prompt.encode()) // 4 + queries // 4 + copies,
            tasks=tasks,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the whole log."""
        return self.fixed + self.turns * (self.video + self.text)

    @property
    def text_share(self) -> float:
        return self.text / max(1, self.video + self.text)

    def live(self, config: RunConfig) -> int:
        """Return how many tokens are in memory at once, at most. Raises ValueError: the policy's own (see `live_bound`)."""
        return live_bound(
            make_policy(config.memory),
            per_turn=self.video + self.text,
            fixed=self.fixed,
            video_per_turn=self.video,
            turns=self.turns,
        )
