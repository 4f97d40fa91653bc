"""The streaming tokens in a checkpoint's vocabulary.

Invariant: a token that the checkpoint already has keeps its id and its rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from streams.layout.layout import STREAMING_TOKENS, Layout, LayoutConfig

SPARE_ROW_MULTIPLE = 128


def add_missing_tokens(tokenizer: Any) -> list[str]:
    """Add the layout's tokens that the tokenizer lacks, and return them."""
    known = tokenizer.get_vocab()
    missing = [token for token in STREAMING_TOKENS if token not in known]
    if missing:
        tokenizer.add_tokens(missing)
    return missing


def text_layout(checkpoint: str | Path, config: LayoutConfig) -> Layout:
    """Return the layout that `Backbone.load` makes of a checkpoint folder, for texts alone: no weight is read.

    Its ban list leaves out the padded rows of the LM head, which no text is tokenised to.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    add_missing_tokens(tokenizer)
    return Layout(tokenizer, config, len(tokenizer))


def add_streaming_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Add the layout's tokens that the tokenizer lacks, and return the new ids.

    New ids take spare rows of the embedding; rows are added (in multiples of 128) only when none is left. Only new ids
    are initialised, to the mean of the rows the tokenizer already used: a token that came with the checkpoint is trained.
    """
    used = len(tokenizer)
    missing = add_missing_tokens(tokenizer)
    if not missing:
        return ()
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(-(-len(tokenizer) // SPARE_ROW_MULTIPLE) * SPARE_ROW_MULTIPLE)
    new = tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in missing)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in matrices.values():
            mean = weight[:used].mean(dim=0)
            spread = weight[:used].std(dim=0)
            for i, token in enumerate(new):
                # A small deterministic spread: identical rows would stay identical under a shared gradient.
                sign = torch.where((torch.arange(len(mean), device=mean.device) // (i + 1)) % 2 == 0, 1.0, -1.0)
                weight[token] = mean + 0.1 * sign.to(mean.dtype) * spread
    return new
