"""Typed settings of the data (Hydra key `data`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from streams.data.dataset import FORMATS
from streams.data.synthetic.questions import SyntheticConfig
from streams.task import Plan, StreamTask
from streams.video.config import VideoConfig


@dataclass(frozen=True)
class DataConfig:
    """train, heldout: JSONL files; empty = the generator's, under run_root/data.

    format: what the rows look like; `auto` goes by the first one. ignore_fields: fields that rows may hold unread.
    """

    train: str = ""
    heldout: str = ""
    format: str = "auto"
    ignore_fields: list[str] = field(default_factory=list)
    tail_chunks: int = 5
    max_turns: int = 240
    cache_mb: int = 256
    video: VideoConfig = field(default_factory=VideoConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.tail_chunks < 0 or self.max_turns < 1 or self.cache_mb < 1:
            raise ValueError(
                f"data.tail_chunks={self.tail_chunks} must be >= 0, data.max_turns={self.max_turns} and "
                f"data.cache_mb={self.cache_mb} at least 1"
            )
        if self.format not in FORMATS:
            raise ValueError(f"data.format={self.format!r} is not one of {', '.join(FORMATS)}")
        if bool(self.train) != bool(self.heldout):
            raise ValueError("data.train and data.heldout must be set together, or both left to the generator")

    def plan_of(self, task: StreamTask) -> Plan:
        """Decide how a stream over this task runs. Raises ValueError (see `VideoConfig.chunk_seconds_of`)."""
        seconds = self.video.chunk_seconds_of(task)
        return Plan(task.num_turns(seconds, self.tail_chunks, self.max_turns), seconds)
