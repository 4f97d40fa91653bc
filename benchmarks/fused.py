"""Fused kernels measured: a few text layers at the shape of a 3B model, with and without them.

Attention is left out: it is the same in both. Called by `benchmarks.attention`, on CUDA only, where they run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import medians_ms
from rollout.decode.graphs import CudaCapture
from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig

SPEC = TinySpec(hidden=2048, layers=2, heads=16, kv_heads=2, mlp=11008, vision_depth=1)
ROWS = (64, 4096)
"""Tokens of a forward: a decode step of 64 streams, and a micro-batch of the learner."""


class _NoAttention:
    """A plan under which every token gets its own query."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        return q.transpose(1, 2)


def fused_rows(
    device: str, dtype: torch.dtype, repeats: int, spec: TinySpec = SPEC, rows: tuple[int, ...] = ROWS
) -> Iterator[dict[str, Any]]:
    """Yield one row of figures per number of tokens: both ways' milliseconds, their ratio, and how far results are apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny(Path(folder) / "layers", spec, dtype=dtype)
        ways = {
            name: Backbone.load(path, LayoutConfig(), dtype=dtype, device=device, fused_kernels=name)
            for name in ("off", "triton")
        }
    for tokens in rows:
        ids = torch.arange(tokens, device=device)[None] % 100
        positions = torch.arange(tokens, device=device).expand(3, 1, -1)
        found: dict[str, Any] = {"tokens": tokens, "layers": spec.layers}
        forwards = {name: _forward(backbone, ids, positions) for name, backbone in ways.items()}
        with torch.no_grad():
            plain, fused = (forwards[name]().double() for name in ("off", "triton"))
            found["relative_difference"] = float((fused - plain).norm() / plain.norm())
            # Replayed, so that the time is the device's and not that of launching.
            capture = CudaCapture() if device == "cuda" else lambda call: call
            steps = {f"{name}_forward_ms": capture(forward) for name, forward in forwards.items()}
            found |= medians_ms(steps, device, repeats)
        if tokens == max(rows):
            both = {f"{name}_both_ways_ms": _both_ways(ways[name], forwards[name]) for name in ways}
            found |= medians_ms(both, device, repeats)
            found["both_ways_speedup"] = found["off_both_ways_ms"] / found["triton_both_ways_ms"]
        yield found | {"forward_speedup": found["off_forward_ms"] / found["triton_forward_ms"]}


def _forward(backbone: Backbone, ids: torch.Tensor, positions: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: backbone.hidden(ids, positions, _NoAttention())


def _both_ways(backbone: Backbone, forward: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    trained = [p for p in backbone.model.model.language_model.layers.parameters() if p.requires_grad]
    # Keys and values are not attended to: what they are made of gets no gradient.
    return lambda: torch.autograd.grad(forward().sum(), trained, allow_unused=True)
