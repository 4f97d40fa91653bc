"""How fast it could be: peak FLOP/s of the machine, the linear layers' share, and what ratio they alone would leave.

`linear_floor` times the model's own linear layers at the numbers of rows that each side runs them with, and nothing else: the
ratio of both sums is what engine and `copy_evict` would come to if attention, norms, copies, draws and the host cost nothing.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.baselines.decoder import DenseDecoder, Stopwatch
from benchmarks.rollout.presets import FRAMES, World
from rollout.config import PREFILL_ROWS

PEAK_SIZE = 1024


def median_seconds(function: Any, repeats: int, device: torch.device) -> float:
    """Median wall time of a call, after one to warm up."""
    taken = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> float:
    """FLOP/s of a square matrix product: the best of several, as a peak is."""
    a, b = (torch.randn((PEAK_SIZE, PEAK_SIZE), dtype=dtype, device=device) for _ in range(2))
    best = min(median_seconds(lambda: a @ b, 3, device) for _ in range(repeats))
    return 2 * PEAK_SIZE**3 / best


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), 9, device)


def _linears(module: Any) -> list[torch.nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]


def linear_parameters(world: World) -> dict[str, int]:
    """Weights of linear layers: per token of the text model, per sampled token of the head, per video token of the tower."""
    model = world.backbone.model
    visual = model.model.visual
    merge = int(visual.config.spatial_merge_size) ** 2
    merger = sum(layer.weight.numel() for layer in _linears(visual.merger))
    patch = visual.patch_embed.proj.weight.numel()
    blocks = sum(layer.weight.numel() for layer in _linears(visual.blocks))
    return {
        "text": sum(layer.weight.numel() for layer in _linears(model.model.language_model)),
        "head": model.lm_head.weight.numel(),
        # A merger works once a video token, what lies before it once a patch.
        "tower": merger + merge * (blocks + patch),
    }


def linear_flops(world: World, forwarded: int, headed: int, video_tokens: int) -> float:
    """FLOPs of linear layers for so many tokens forwarded, rows of logits and video tokens encoded."""
    each = linear_parameters(world)
    return 2.0 * (forwarded * each["text"] + headed * each["head"] + video_tokens * each["tower"])


def linear_seconds(world: World, rows: int, repeats: int = 3) -> float:
    """Seconds of the text model's linear layers for one forward of `rows` tokens."""
    backbone = world.backbone
    layers = _linears(backbone.model.model.language_model)
    inputs = {
        width: torch.randn((rows, width), dtype=backbone.dtype, device=backbone.device)
        for width in {layer.in_features for layer in layers}
    }

    @torch.no_grad()
    def run() -> None:
        for layer in layers:
            F.linear(inputs[layer.in_features], layer.weight, layer.bias)

    return median_seconds(run, repeats, backbone.device)


def head_seconds(world: World, rows: int, repeats: int = 5) -> float:
    head = world.backbone.model.lm_head
    given = torch.randn((rows, head.in_features), dtype=world.backbone.dtype, device=world.backbone.device)
    with torch.no_grad():
        return median_seconds(lambda: head(given), repeats, world.backbone.device)


def prefill_seconds(world: World, tokens: int, repeats: int = 3) -> float:
    """Seconds that the text model takes per stream to prefill a turn of so many tokens, a group at once over a full window."""
    backbone, rows = world.backbone, world.preset.group
    held = world.preset.window * int(np.prod(world.preset.grid))
    decoder = DenseDecoder(backbone, rows, held + tokens, Stopwatch(False))
    ids = torch.zeros((rows, tokens), dtype=torch.long, device=backbone.device)
    positions = torch.arange(held, held + tokens, device=backbone.device).expand(3, rows, -1)

    @torch.no_grad()
    def run() -> None:
        decoder.length = held
        decoder.forward(ids, positions, None)

    return median_seconds(run, repeats, backbone.device) / rows


def tower_seconds(world: World, chunks: int = 8) -> float:
    """Seconds of the tower per chunk, `chunks` in one call."""
    frames = world.clips[0][:1].repeat(chunks, axis=0)
    assert frames.shape[1] == FRAMES
    with torch.no_grad():
        encode = lambda: world.backbone.encode_video([frames])  # noqa: E731
        return median_seconds(encode, 3, world.backbone.device) / chunks


def floor_ratio(world: World, prefill: int, prompts: int) -> dict[str, float]:
    """The arithmetic of one turn of all prompts, from linear layers alone; prefill: tokens of a turn's prefill, END included.

    One side forwards G rows a step and prompt, the other all streams together. Both sides: `decodes` steps, logits for each
    sampled token, the tower once per stream or once per prompt.
    """
    preset = world.preset
    group, streams = preset.group, preset.group * prompts
    decodes = preset.max_new_tokens - 3
    cut = max(1, -(-streams * prefill // PREFILL_ROWS))
    text = {
        rows: linear_seconds(world, rows) for rows in {group, streams, group * prefill, -(-streams * prefill // cut)}
    }
    head = {rows: head_seconds(world, rows) for rows in {group, streams}}
    tower = tower_seconds(world)
    theirs = prompts * (text[group * prefill] + decodes * text[group] + (decodes + 1) * head[group])
    ours = cut * text[-(-streams * prefill // cut)] + decodes * text[streams] + (decodes + 1) * head[streams]
    return {
        "tower_seconds_per_chunk": tower,
        "prefill_seconds_per_chunk": prefill_seconds(world, prefill),
        "copy_evict_linear_seconds_per_turn": theirs,
        "engine_linear_seconds_per_turn": ours,
        "ratio": (theirs + streams * tower) / (ours + prompts * tower),
        "ratio_shared_vision": (theirs + prompts * tower) / (ours + prompts * tower),
    }
