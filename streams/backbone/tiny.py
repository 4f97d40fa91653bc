"""Tiny backbones: a random Qwen2.5-VL or Qwen3-VL with its own small tokenizer, in the standard Hugging Face format.

The tokenizer follows Qwen's pre-tokenizer rules and has merges over newlines and leading spaces, so that tokenisation at
the seams of a turn is exercised. Weights are Xavier-initialised: with the default standard deviation of 0.02 a model
this small does not learn colours.

Invariants:
* whatever loads a real checkpoint loads these, through the same code;
* the same spec and seed give the same files.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging as transformers_logging

from streams.backbone.tiny_spec import TinySpec
from streams.checkpoint.families import FAMILIES, MERGE, QWEN2_5_VL, TEMPORAL_PATCH

LARGE = 2**27
"""Numbers from which on a model's weights are drawn by all cores."""
DRAWN_AT_ONCE = 2**22
"""Numbers that one generator draws of a large model."""

Draw = Callable[..., torch.Tensor]

QWEN_CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

_CORPUS = (
    "You watch a video that arrives in chunks. After every chunk, first think briefly inside the think tags.\n"
    "Then write the response and your answer if an answer is due now, otherwise stay silent.\n\n",
    "What colour is the shape now?\nWhat colour was the first shape?\n",
    "Say the colour of the next shape as soon as it appears.\n\n",
    "red green blue yellow nothing\nred\ngreen\nblue\nyellow\nnothing\n",
    "a red square, a green circle, a blue triangle, a yellow square\n\n\n",
    "nothing answer red, red answer red, green answer green, blue answer blue, yellow answer yellow\n",
    "nothing answer green, nothing answer blue, nothing answer yellow\n",
    "system\nuser\nassistant\nThe answer is yes. The answer is no. A. B. C. D.\n\n",
    "How many shapes are there? There are two shapes. Which one is first?\n",
)


_TIMES = ("<0.5 seconds><1.5 seconds><12.5 seconds>",)
"""As in Qwen's own vocabulary, the word of a timestamp is one token."""


def build_tokenizer(model_type: str = QWEN2_5_VL.model_type) -> Qwen2Tokenizer:
    """Train the small tokenizer on a few lines (byte-level BPE, deterministic) and add Qwen's control tokens."""
    trainee = Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainee.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    family = FAMILIES[model_type]
    corpus = (*_CORPUS, *_TIMES) if family.timestamps else _CORPUS
    trainee.train_from_iterator(corpus * 4, trainer)
    model = json.loads(trainee.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)  # type: ignore[arg-type]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_CONTROL_TOKENS])
    # Not special: the model writes them, decoding shows them.
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.text_tokens])
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(spec: TinySpec, tokenizer: Any) -> PretrainedConfig:
    """Return transformers' configuration of the spec's family, with the tokenizer's ids."""
    family = spec.family
    token = tokenizer.convert_tokens_to_ids
    half = (spec.head_dim or spec.hidden // spec.heads) // 2
    # A rotary half is split into time, height and width.
    above, below = family.rotary_share
    side = half * above // below
    text_config: dict[str, Any] = {
        "vocab_size": spec.vocab_rows,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": spec.tie_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "mrope_section": [half - 2 * side, side, side],
        },
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision_config: dict[str, Any] = {
        "depth": spec.vision_depth,
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_mlp,
        "num_heads": spec.vision_heads,
        "out_hidden_size": spec.hidden,
        "patch_size": spec.patch_size,
    }
    ids = {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }
    tied = spec.tie_embeddings
    if family.own_head_dim:
        text_config |= {"head_dim": 2 * half}
    if family.interleaved:
        text_config["rope_parameters"] |= {"mrope_interleaved": True}
    if family.deepstack:
        # An 8 x 8 grid of learned positions: frames of other sizes go through the interpolation.
        vision_config |= {"deepstack_visual_indexes": list(spec.deepstack), "num_position_embeddings": 64}
    else:
        whole = list(spec.full_attention) or [spec.vision_depth - 1]
        vision_config |= {"tokens_per_second": 2, "fullatt_block_indexes": whole}
    parts = {"text_config": text_config, "vision_config": vision_config}
    return AutoConfig.for_model(spec.model_type, **parts, tie_word_embeddings=tied, **ids)


def initialise(model: torch.nn.Module, seed: int, *, gain: float = 1.0, embedding_std: float = 0.5) -> None:
    """Set every parameter: Xavier on matrices, normal embeddings, small random biases; norms to 1, their biases to 0.

    A model of LARGE numbers or more is drawn by all cores, each slice of DRAWN_AT_ONCE numbers from a generator of its own:
    the numbers depend on the seed and not on the number of cores. A smaller one is drawn by one generator, parameter by
    parameter: the models that runs and figures began with must stay what they are.
    """
    drawn: list[tuple[torch.Tensor, Draw]] = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "embed_tokens" in name:
                drawn.append((parameter, partial(torch.nn.init.normal_, mean=0.0, std=embedding_std)))
            elif parameter.ndim >= 2:
                rows, columns = parameter.flatten(1).shape
                bound = math.sqrt(3.0) * gain * math.sqrt(2.0 / (rows + columns))
                drawn.append((parameter, partial(torch.nn.init.uniform_, a=-bound, b=bound)))
            else:
                drawn.append((parameter, partial(torch.nn.init.normal_, mean=0.0, std=0.02)))
        if sum(tensor.numel() for tensor, _ in drawn) < LARGE:
            generator = torch.Generator().manual_seed(seed)
            for tensor, draw in drawn:
                draw(tensor, generator=generator)
        else:
            _draw_by_all_cores(drawn, seed)


def _draw_by_all_cores(drawn: list[tuple[torch.Tensor, Draw]], seed: int) -> None:
    slices = [(part, draw) for tensor, draw in drawn for part in tensor.view(-1).split(DRAWN_AT_ONCE)]
    seeds = np.random.SeedSequence(seed).generate_state(len(slices), np.uint64).astype(np.int64).tolist()

    def fill(work: tuple[tuple[torch.Tensor, Draw], int]) -> None:
        (part, draw), own = work
        # Torch holds no lock of Python's while it draws: the threads run side by side.
        draw(part, generator=torch.Generator().manual_seed(own))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        deque(threads.map(fill, zip(slices, seeds, strict=True)), maxlen=0)


def build_tiny(
    path: Path,
    spec: TinySpec | None = None,
    *,
    seed: int = 0,
    gain: float = 1.0,
    std: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random checkpoint (model, tokenizer, chat template, image processor settings) to `path`.

    std: standard deviation of the embeddings; None: the spec's.
    """
    spec = spec or TinySpec()
    transformers_logging.disable_progress_bar()
    tokenizer = build_tokenizer(spec.model_type)
    # Without memory first: at 3B, transformers' own initialisation would take longer than ours and be thrown away.
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(spec, tokenizer), dtype=dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    initialise(model, seed, gain=gain, embedding_std=spec.embedding_std if std is None else std)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    # Inputs centred near the mean of grey footage: the tower then sees colours as signed deviations.
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": spec.patch_size,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "size": {"shortest_edge": (2 * spec.patch_size) ** 2, "longest_edge": (4 * spec.patch_size) ** 2},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return path
