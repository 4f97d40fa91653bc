"""Attention backends of the engine: each turns a list of segments into a plan that the backbone runs.

`torch_sdpa` runs everywhere; FlashInfer and flash-attn join it behind the same interface.
"""

from rollout.attention.segments import Segment
from rollout.attention.torch_sdpa import TorchPagedPlan

__all__ = ["Segment", "TorchPagedPlan"]
