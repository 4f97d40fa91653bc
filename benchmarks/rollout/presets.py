"""What is run: shapes of model, clips and streams by preset, and the random model and clips themselves.

Every turn writes as many tokens as the layout allows: the ban list leaves words only, so budgets end thought and turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rollout.engine.request import StreamRequest
from streams.backbone.backbone import Backbone
from streams.backbone.fused.modules import settle_fused_kernels
from streams.backbone.tiny import build_tiny
from streams.backbone.tiny_spec import TinySpec
from streams.layout.layout import LayoutConfig
from streams.memory import MemoryConfig, make_policy
from streams.writing.writer import QueryInput, TurnInput
from tests.support.exactness.backbones import with_ban_list
from tests.support.exactness.streams import chunk_record, stream_header

PATCH_SECONDS = 0.5
FRAMES = 2
"""Frames of a chunk: one temporal patch."""


@dataclass(frozen=True)
class Preset:
    """One size of everything.

    Attributes:
        spec: the random model. gain, std: how loud its weights are (None: the spec's own std).
        window: chunks whose video stays (`rcsm`, all text stays).
        prompts, group, chunks: streams are prompts times group, of so many turns.
        grid: video tokens of a chunk, rows by columns.
        quick_chunks: turns with --quick.
    """

    name: str
    spec: TinySpec
    window: int
    prompts: int
    group: int
    chunks: int
    grid: tuple[int, int]
    quick_chunks: int
    think_budget: int = 20
    max_new_tokens: int = 22
    dtype: torch.dtype = torch.float32
    gain: float = 2.0
    std: float | None = 1.0

    @property
    def streams(self) -> int:
        return self.prompts * self.group


PRESETS = {
    "tiny": Preset("tiny", TinySpec(), 3, 3, 4, 8, (2, 2), 5, think_budget=5, max_new_tokens=7),
    # Six layers of the tower cost 0.78 of a chunk's prefill (one thread); `tower_over_prefill` is what a run has measured.
    "small": Preset(
        "small",
        TinySpec(
            hidden=512,
            layers=8,
            heads=8,
            kv_heads=2,
            mlp=2048,
            vocab_rows=4096,
            vision_depth=6,
            vision_hidden=256,
            vision_heads=4,
            vision_mlp=1024,
        ),
        6,
        8,
        8,
        24,
        (8, 8),
        8,
    ),
    # The shapes of conf/model/random_qwen2_5_vl_3b.yaml.
    "qwen2.5-vl-3b": Preset(
        "qwen2.5-vl-3b",
        TinySpec(
            hidden=2048,
            layers=36,
            heads=16,
            kv_heads=2,
            mlp=11008,
            vision_depth=32,
            vision_hidden=1280,
            vision_heads=16,
            vision_mlp=3420,
            full_attention=(7, 15, 23, 31),
            vocab_rows=151936,
            tie_embeddings=True,
            embedding_std=0.05,
        ),
        20,
        8,
        8,
        40,
        (12, 16),
        24,
        dtype=torch.bfloat16,
        gain=1.0,
        std=None,
    ),
}


@dataclass(frozen=True)
class World:
    """One preset made real. clips: one of each prompt, uint8 [chunks, FRAMES, h, w, 3]."""

    preset: Preset
    backbone: Backbone
    clips: tuple[np.ndarray, ...]
    turns: tuple[tuple[TurnInput, ...], ...]
    folder: Path

    @property
    def chunks(self) -> int:
        return len(self.turns[0])

    def encode(self, prompts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
        """Features of these prompts' clips, each chunk [tokens, F]: encoded once each."""
        return [tuple(self.backbone.encoding(self.clips[prompt]).finish()) for prompt in prompts]

    def requests(
        self,
        prompts: Sequence[int],
        features: Sequence[Sequence[torch.Tensor]],
        *,
        temperature: float = 1.0,
        chunks: int | None = None,
        max_new_tokens: int | None = None,
        group: int | None = None,
    ) -> Iterator[StreamRequest]:
        """Make the streams of these prompts' groups; chunks, max_new_tokens, group: where not the preset's."""
        preset, memory = self.preset, MemoryConfig("rcsm", self.preset.window)
        layout = self.backbone.layout
        if max_new_tokens is not None:
            extra = max_new_tokens - preset.max_new_tokens
            config = replace(layout.config, max_new_tokens=max_new_tokens, think_budget=preset.think_budget + extra)
            banned, layout = layout.banned, layout.with_config(config)
            layout.banned = banned
        stop = chunks or self.chunks
        for prompt, encoded in zip(prompts, features, strict=True):
            for row in range(group or preset.group):
                header = stream_header(self.backbone, memory, f"{prompt}/{row}", temperature)
                policy = make_policy(memory)
                shown = self.turns[prompt][:stop]
                yield StreamRequest(header, shown, encoded[:stop], policy, layout, PATCH_SECONDS)


def words_only(backbone: Backbone) -> Backbone:
    """The same model under a ban list that leaves words: nothing ends a thought or a turn but its budget."""
    tokens = len(backbone.tokenizer)
    control = set(backbone.tokenizer.added_tokens_decoder)
    return with_ban_list(backbone, tuple(i for i in range(backbone.layout.vocab_rows) if i >= tokens or i in control))


def make_world(preset: Preset, folder: Path, device: str, chunks: int, seed: int = 0) -> World:
    """Draw the model into `folder` and the clips; all streams have `chunks` turns, and a question in the first."""
    layout = LayoutConfig("Watch.", preset.think_budget, preset.max_new_tokens)
    path = build_tiny(folder / "model", preset.spec, seed=7, gain=preset.gain, std=preset.std, dtype=preset.dtype)
    fused = settle_fused_kernels("auto", device, str(preset.dtype).removeprefix("torch."))
    loaded = Backbone.load(path, layout, dtype=preset.dtype, device=device, fused_kernels=fused.name)
    backbone = words_only(loaded)
    rng = np.random.default_rng(seed)
    side = preset.spec.token_side
    height, width = preset.grid
    shape = (chunks, FRAMES, height * side, width * side, 3)
    clips = tuple(rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(preset.prompts))
    query = QueryInput(tuple(backbone.layout.query_ids("What colour is the shape now?")))
    turns = tuple(TurnInput(chunk_record(turn, (1, height, width)), None if turn else query) for turn in range(chunks))
    return World(preset, backbone, clips, (turns,) * preset.prompts, folder)
