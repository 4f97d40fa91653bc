"""Memory policies: which tokens of a stream expire when the next turn starts.

`policy` defines what a policy is, one module per family of policies implements it, `config` is the Hydra side.

Invariant: importing it loads no torch; the driver does.
"""

from streams.layout.lanes import Lanes
from streams.memory.boundary import check_text_tells_time, evicted, lane_one_start, live_bound, placed
from streams.memory.config import CUSTOM, POLICIES, MemoryConfig, check_args_taken, knobs, make_policy
from streams.memory.policy import (
    CONTIGUOUS,
    NATIVE,
    TURN_TEXT,
    LiveTokens,
    MemoryPolicy,
    TurnStart,
    old_text,
    old_video,
)
from streams.memory.random_tokens import RandomTokens
from streams.memory.rows import Rows
from streams.memory.sink_window import SinkWindow
from streams.memory.text_memory import TextMemory
from streams.memory.visual_budget import VisualBudget
from streams.memory.windows import Full, Rcsm, RecentFrames
from streams.positions.regions import Region

__all__ = [
    "CONTIGUOUS",
    "CUSTOM",
    "NATIVE",
    "POLICIES",
    "TURN_TEXT",
    "Full",
    "Lanes",
    "LiveTokens",
    "MemoryConfig",
    "MemoryPolicy",
    "RandomTokens",
    "Rcsm",
    "RecentFrames",
    "Region",
    "Rows",
    "SinkWindow",
    "TextMemory",
    "TurnStart",
    "VisualBudget",
    "check_args_taken",
    "check_text_tells_time",
    "evicted",
    "knobs",
    "lane_one_start",
    "live_bound",
    "make_policy",
    "old_text",
    "old_video",
    "placed",
]
