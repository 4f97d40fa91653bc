"""The backbone: a Qwen2.5-VL or Qwen3-VL checkpoint through transformers, as engine, learner and scorers run it.

Rollout and learner use one class, so weight names are the same on both sides and any Hugging Face checkpoint loads.

Invariants:
* attention of the text model always goes through a plan that says who sees whom: a missing plan raises, it never means
  full attention;
* position ids are ours, and no KV cache of transformers is used;
* the embedding is never shrunk, and no trained row is re-initialised;
* the features of a video token are one row, from the cache through the wire to the forward: its embedding, followed by
  every DeepStack level (Qwen3-VL adds level i to the hidden states of the video tokens after text layer i).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from streams.backbone import tower
from streams.backbone.attention import (
    ATTENTION_NAME,
    VISION_ATTENTION_NAME,
    VISION_IMPLEMENTATIONS,
    AttentionPlan,
    _planned_attention,
    _vision_attention,
)
from streams.backbone.freezing import trained
from streams.backbone.fused.modules import fuse
from streams.backbone.head import Asked, let_score
from streams.backbone.kernel_choice import HEAD_VOCAB
from streams.backbone.vocabulary import add_streaming_tokens
from streams.checkpoint.families import FAMILIES
from streams.checkpoint.folder import (
    STREAMING_FILE,
    ImageSpec,
    check_image_statistics,
    check_no_dropout,
    check_rope_theta,
    read_processors,
)
from streams.checkpoint.weights import ModelConfigFile, check_weights, summary
from streams.layout.layout import Layout, LayoutConfig
from streams.positions.mrope import PositionCursor, TimestampCursor
from streams.positions.rotary import Rotary


@dataclass(frozen=True)
class VideoTokens:
    """The video tokens of one forward: flat row index int64 [M] of each, in any order, and its features [M, F]."""

    index: torch.Tensor
    features: torch.Tensor


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array to ship, bit for bit; bfloat16, which numpy lacks, travels as int16."""
    plain = tensor.detach().cpu().contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return the tensor that `to_array` shipped (a copy: arrays from the object store are read-only)."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


AttentionInterface.register(ATTENTION_NAME, _planned_attention)
AttentionInterface.register(VISION_ATTENTION_NAME, _vision_attention)


def _check_loaded(source: Path, model: Any, report: dict[str, Any]) -> None:
    """Raise ValueError for a parameter that transformers filled with random numbers, or a tied head that it did not tie.

    `check_weights` knows the modules of some releases only, so transformers' own report is checked as well.
    """
    if random := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise ValueError(
            f"{source}: transformers found no weights for {summary(random, model.state_dict())}, and would train them from "
            "random numbers: download the checkpoint again, or install a transformers release that knows it"
        )
    if model.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        if head is not embedding:
            raise ValueError(
                f"{source}: config.json says tie_word_embeddings=true, but the files hold a head that is not the embedding: "
                "set it to false if the head was trained, or delete lm_head.weight from the files"
            )


def _check_vocabulary(source: Path, tokens: int, rows: int) -> None:
    """Raise ValueError for the tokenizer of another, larger model: only the layout's own tokens may be new."""
    if tokens > rows:
        raise ValueError(
            f"{source}: its tokenizer has {tokens:,} tokens, but the weights have rows for {rows:,}: the others would start "
            "from random numbers; copy the tokenizer's files from the model that the weights are from"
        )


def _set_attention(model: Any, text: str, vision: str) -> None:
    model.config.text_config._attn_implementation = text
    model.config.vision_config._attn_implementation = vision


class Backbone:
    """A loaded checkpoint with its tokenizer, layout and image settings.

    Attributes:
        source: the folder it was loaded from, for messages. That folder may be deleted while the run goes on
            (checkpoint.keep), so nothing is read from it again.
        processors: content of the processor files that it came with, by name, for the exports.
        vision_attention: kernel of the vision tower, `sdpa` or `flash_attn`.
        fused_kernels: of the text model, `triton`, `torch` or `off`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout,
        image: ImageSpec,
        source: Path,
        processors: dict[str, bytes],
        vision_attention: str = "sdpa",
        fused_kernels: str = "off",
    ) -> None:
        self.model = model
        self.vision_attention, self.fused_kernels = vision_attention, fused_kernels
        if fused_kernels != "off":
            fuse(model.model.language_model, fused_kernels)
        _set_attention(model, ATTENTION_NAME, VISION_IMPLEMENTATIONS[vision_attention])
        self.tokenizer = tokenizer
        self.layout = layout
        self.image = image
        self.source = source
        self.processors = processors
        self.name = str(model.config.model_type)
        self.family = FAMILIES[self.name]
        self.position_convention = self.family.convention
        self._banned = torch.tensor(layout.banned, dtype=torch.long)
        self._ban_index = self._banned.to(self.device)
        let_score(model.lm_head)

    @classmethod
    def load(
        cls,
        path: str | Path,
        layout: LayoutConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        vision_attention: str = "sdpa",
        fused_kernels: str = "off",
    ) -> Backbone:
        """Load a checkpoint from a local folder (hub ids are resolved by the caller with `resolve_checkpoint`).

        Raises FileNotFoundError or ValueError for a folder that lacks weights or anything else it needs.

        vision_attention: `sdpa` or `flash_attn`, as `streams.backbone.kernel_choice` chose it.
        fused_kernels: `triton`, `torch` or `off`, as `streams.backbone.fused.modules` settled it.
        """
        source = Path(path)
        family = ModelConfigFile.read(source).family
        check_weights(source)
        check_rope_theta(source)
        check_no_dropout(source)
        # transformers draws a progress bar per load; five processes at once would fill the terminal with them.
        transformers_logging.disable_progress_bar()
        # Safetensors alone, as checked: a *.bin is a pickle, which runs code. (No code of a checkpoint's own is run, either.)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
        model, report = loaded
        _check_loaded(source, model, report)
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(source)
        _check_vocabulary(source, len(tokenizer), model.get_input_embeddings().weight.shape[0])
        add_streaming_tokens(model, tokenizer)
        model.config.use_cache = False
        model.eval()
        rows = model.get_output_embeddings().weight.shape[0]
        processors = read_processors(source)
        image = ImageSpec.load(processors, model.config.vision_config, family)
        check_image_statistics(source, image)
        made = Layout(tokenizer, layout, rows, family.timestamps)
        return cls(model, tokenizer, made, image, source, processors, vision_attention, fused_kernels)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def num_layers(self) -> int:
        return int(self.model.config.text_config.num_hidden_layers)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(KV heads, head dimension) of the text model."""
        text = self.model.config.text_config
        # Heads may be wider than the hidden size divided among them (`Family.own_head_dim`).
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(text.num_key_value_heads), int(head)

    @property
    def deepstack_levels(self) -> int:
        """How many DeepStack levels follow a video token's embedding (0 without DeepStack)."""
        return len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", ()))

    @property
    def feature_width(self) -> int:
        """F: values per video token, its embedding and all DeepStack levels."""
        return int(self.model.config.text_config.hidden_size) * (1 + self.deepstack_levels)

    def cursor(self, patch_seconds: float) -> PositionCursor:
        """Return a fresh position cursor for one stream. patch_seconds: time between temporal patches."""
        if self.layout.timestamps:
            return TimestampCursor()
        return PositionCursor(float(self.model.config.vision_config.tokens_per_second), patch_seconds)

    @cached_property
    def rotary(self) -> Rotary:
        """The text model's rotation, for keys and queries that a plan rotates itself."""
        text = self.model.model.language_model
        return Rotary(text.rotary_emb.inv_freq, text.config.rope_parameters, interleaved=self.family.interleaved)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings: int [...] -> [..., H]."""
        return self.model.get_input_embeddings()(ids)

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan, video: VideoTokens | None = None
    ) -> torch.Tensor:
        """Return the final hidden states [B, L, H] of ids int [B, L] at M-RoPE positions int [3, B, L] under `plan`.

        Engine and learner share it, so features are put in their tokens' places in one way only.
        """
        embeds = self.embed(ids)
        levels: dict[str, Any] = {}
        if video is not None:
            embeds, levels = self._place(embeds, video)
        # A 4-D mask passes through transformers untouched and keeps it from building one of its own.
        unused = embeds.new_zeros((1, 1, 1, 1))
        return self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=unused, use_cache=False, plan=plan, **levels
        ).last_hidden_state

    def _place(self, embeds: torch.Tensor, video: VideoTokens) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return embeddings [B, L, H] with the features in place, and the arguments that inject the DeepStack levels.

        Raises ValueError if features and video tokens differ in number, or the features have another width.
        """
        if len(video.index) != len(video.features):
            raise ValueError(
                f"{len(video.index)} video tokens but {len(video.features)} features: media and log do not match"
            )
        if video.features.shape[-1] != self.feature_width:
            raise ValueError(
                f"features of width {video.features.shape[-1]}, but {self.name} takes {self.feature_width}: they were "
                "encoded by another backbone"
            )
        width = embeds.shape[-1]
        features = video.features.to(embeds.dtype)
        placed = embeds.flatten(0, 1).index_put((video.index,), features[:, :width]).view_as(embeds)
        if not self.deepstack_levels or not len(video.index):
            return placed, {}
        mask = torch.zeros(embeds.shape[0] * embeds.shape[1], dtype=torch.bool, device=embeds.device)
        mask[video.index] = True
        # transformers takes the levels through a mask, so in ascending order; the learner's packing gives them log by log.
        levels = features[video.index.argsort(), width:].split(width, dim=-1)
        return placed, {"visual_pos_masks": mask.view(embeds.shape[:2]), "deepstack_visual_embeds": list(levels)}

    def logits(self, hidden: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
        """Return logits [N, V] / temperature of hidden [N, H], banned ids at -inf, in fp32 (fp64 stays fp64).

        temperature: one for all rows, or float [N] one for each. Both divide alike, so that the learner scores what the
        engine has drawn.
        """
        logits = self.model.lm_head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if isinstance(temperature, torch.Tensor):
            scale = temperature.to(wide)[:, None]
        else:
            # A tensor: a GPU would multiply by the reciprocal of a number.
            scale = torch.full((1,), temperature, dtype=wide, device=logits.device)
        # Dividing is what widens half precision: the one copy of [N, V], which the ban list is written into.
        return (logits / scale).index_fill_(-1, self._ban_index.to(logits.device), float("-inf"))

    def score(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        *,
        block: int = HEAD_VOCAB,
        entropy_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs of targets [N] and entropies, both [N] in nats, of `logits` of hidden [N, H].

        block, entropy_gradient: see `streams.backbone.head.Asked`.
        """
        asked = Asked(targets, self._banned, temperature, block, entropy_gradient)
        logp, entropy = self.model.lm_head(hidden, asked)
        return logp, entropy

    @property
    def pre_merger_width(self) -> int:
        """P: values per video token at the boundary of `freeze=tower`."""
        return tower.pre_merger_width(self.model.config.vision_config)

    def encode_video(self, frames: list[np.ndarray]) -> list[torch.Tensor]:
        """Encode clips, each uint8 [chunks, frames, h, w, 3] -> [chunks, tokens, F], in one call of the tower.

        Its memory grows with the clips: it is for the learner, whose ranks must make as many calls as one another, and for
        single chunks. `encoding` is for whole clips without gradient.
        """
        return tower.encode(self.model.model.visual, self.image, frames, self.dtype)

    def encoding(self, frames: np.ndarray, *, pre_merger: bool = False) -> tower.ClipEncoding:
        """Return a clip, uint8 [chunks, frames, h, w, 3], that is to be encoded without gradient, some chunks at a time.

        pre_merger: up to the mergers, [chunks, tokens, P]; `merge` makes features of that.
        """
        width = self.pre_merger_width if pre_merger else self.feature_width
        return tower.ClipEncoding(
            self.model.model.visual, self.image, frames, self.dtype, pre_merger=pre_merger, width=width
        )

    def merge(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the features of pre-merger rows through the current mergers, each called once for all clips.

        Raises ValueError for rows of another width.
        """
        for clip in rows:
            if clip.shape[-1] != self.pre_merger_width:
                raise ValueError(
                    f"pre-merger rows of width {clip.shape[-1]}, but {self.name} takes {self.pre_merger_width}: they were "
                    "encoded by another backbone"
                )
        return tower.merge(self.model.model.visual, rows)

    @torch.no_grad()
    def lay_out_for_few_rows(self) -> None:
        """Store the text model's matrices input by input: a CPU multiplies a few rows by them up to twice as fast.

        Names, shapes and values stay; copies into the parameters keep the layout. Not for a model that trains: optimisers
        flatten parameters.
        """
        embedding = self.model.get_input_embeddings().weight
        for module in (*self.model.model.language_model.modules(), self.model.lm_head):
            # A tied head is also read row by row, as the embedding.
            if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
                module.weight.data = module.weight.data.t().contiguous().t()

    def freeze(self, mode: str, patterns: Sequence[str] = ()) -> None:
        """Set which parameters train: those that neither `learner.freeze` nor a pattern of `learner.freeze_names` names."""
        parameters = dict(self.model.named_parameters())
        train = set(trained(parameters, mode, patterns))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in train)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, path: Path, streaming: dict[str, Any], state: dict[str, torch.Tensor] | None = None) -> None:
        """Write a standard Hugging Face checkpoint with tokenizer, chat template, processors and `streaming.json`.

        state: the whole state dict, if the model itself has only slices of it (ZeRO-3), or trains on meanwhile: with it,
            this may be called beside a forward or backward.
        """
        path.mkdir(parents=True, exist_ok=True)
        # The same modules under another configuration, which is all that is asked of them. The registered names mean nothing
        # to other programs: the export must load with their default attention.
        export = copy.copy(self.model)
        export.config = copy.deepcopy(self.model.config)
        _set_attention(export, "sdpa", "sdpa")
        export.save_pretrained(path, state_dict=state)
        self.tokenizer.save_pretrained(path)
        for name, content in self.processors.items():
            (path / name).write_bytes(content)
        streaming = {
            "position_convention": self.position_convention,
            "banned": list(self.layout.banned),
            "image_mean": list(self.image.mean),
            "image_std": list(self.image.std),
        } | streaming
        (path / STREAMING_FILE).write_text(json.dumps(streaming, indent=2, sort_keys=True) + "\n")
