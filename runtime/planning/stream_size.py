"""How many tokens a stream can have, by its settings and the sizes of its model."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import RunConfig
from streams.checkpoint.model_shape import ModelGeometry
from streams.memory import Lanes, live_bound, make_policy
from streams.task import StreamTask

SCAFFOLD = 13


TIMESTAMP = 11
"""Tokens of a turn's scaffold, and of a timestamp with its own vision tags (one for every temporal patch), at most."""


MEMORY_TEMPLATE = 24
"""Tokens of a copied turn beside its words, at most (see streams.layout.lanes)."""


@dataclass(frozen=True)
class StreamSize:
    """The largest stream of a run: turns, video and other tokens of one turn, tokens outside of turns. tasks: of the run."""

    turns: int
    video: int
    text: int
    fixed: int
    tasks: int = 1

    @classmethod
    def largest(cls, config: RunConfig, tasks: tuple[StreamTask, ...], geometry: ModelGeometry) -> StreamSize:
        """Upper bound over the tasks; frames count as data.video.max_pixels."""
        patches = config.data.video.frames_per_chunk // geometry.temporal_patch_size
        stamps = TIMESTAMP * patches if geometry.deepstack_levels else 0
        queries = max((sum(len(q.text.encode()) for q in task.queries) for task in tasks), default=0)
        turns = max((config.data.plan_of(task).turns for task in tasks), default=1)
        copies = 0
        if make_policy(config.memory).lanes is Lanes.MEMORY:
            copies = (turns - 1) * (MEMORY_TEMPLATE + config.layout.max_new_tokens)
        return cls(
            turns=turns,
            video=patches * (config.data.video.max_pixels // geometry.token_side**2),
            text=SCAFFOLD + stamps + config.layout.max_new_tokens,
            # Byte-level BPE: a text of n bytes has about n / 4 tokens.
            fixed=8 + len(config.layout.system_prompt.encode()) // 4 + queries // 4 + copies,
            tasks=len(tasks),
        )

    @property
    def tokens(self) -> int:
        """Of the whole log."""
        return self.fixed + self.turns * (self.video + self.text)

    @property
    def text_share(self) -> float:
        return self.text / max(1, self.video + self.text)

    def live(self, config: RunConfig) -> int:
        """At most in memory at once."""
        return live_bound(
            make_policy(config.memory),
            per_turn=self.video + self.text,
            fixed=self.fixed,
            video_per_turn=self.video,
            turns=self.turns,
        )
