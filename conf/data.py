"""Typed settings of the data (Hydra key `data`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from streams.data.dataset import FORMATS
from streams.data.synthetic.questions import SyntheticConfig
from streams.task import Plan, StreamTask
from streams.video.config import VideoConfig


@dataclass(frozen=True)
class DataConfig:
    """The rows of a run and how much of their videos a stream shows."""

    train: str = ""
    """JSONL file of the rows that are trained on; empty = the generated ones, under `run_root/data`. Set together
    with `data.heldout`.
    """
    heldout: str = ""
    """JSONL file of the rows that evaluations use; empty = the generated ones. Set together with `data.train`."""
    format: str = "auto"
    """Format of the rows: `sightline` (ours), `thinkstream`, or `auto` to decide by the first row."""
    root: str = ""
    """Folder that every video of a row must lie in, with symbolic links followed; empty = the folder of its task file, `/` =
    anywhere. A row whose video lies elsewhere is left out by name: rows from somebody else could name any file.
    """
    ignore_fields: list[str] = field(default_factory=list)
    """Fields that rows may have although no format reads them. Any other unknown field makes its row unusable."""
    tail_chunks: int = 5
    """Chunks that a stream goes on after its last answer is due (0 = it ends with that chunk)."""
    max_turns: int = 240
    """Longest stream, in turns (one chunk each). Longer videos are cut."""
    cache_mb: int = 256
    """MiB for each of three caches: the frames of a worker (host memory), the features of a worker (device memory; those that
    wait for its engine included), and the features that the driver keeps in Ray's object store.
    """
    video: VideoConfig = field(default_factory=VideoConfig)
    """What a chunk is."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """The clips that `job=data` generates."""

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
