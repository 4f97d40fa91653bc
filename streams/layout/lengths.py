"""How long the fixed parts of a turn can be, known before any tokenizer is loaded.

Invariants:
* each is an upper bound for the layout that a checkpoint's tokenizer makes (`tests/streams/test_lengths.py` compares both
  families), as long as the words of the template are single tokens, which they are in Qwen's vocabularies;
* whoever plans memory or checks settings asks here; nobody counts the template's tokens again.
"""

from __future__ import annotations

OPENING = 4
"""`\\n <|im_start|> user \\n`."""
CLOSING = 5
"""`<|im_end|> \\n <|im_start|> assistant \\n`."""
VISION_TAGS = 2
"""`<|vision_start|>` and `<|vision_end|>`."""
SPARE = 2
"""Tokens of a turn that no layout of today has."""
TIME = 9
"""`<9999.9 seconds>`: every digit is a token."""
COPY_TIMES = 20
"""`\\n[1000.25-1001.25 s]\\n`, the head of a copied turn (see `streams.layout.lanes`)."""
COPY_SAID = 8
"""`\\n[said]\\n`."""
NOT_COPIED = 3
"""Generated tokens that an answer costs a turn and that its copy leaves out: end of the thought, decision, end."""


def max_scaffold(*, timestamps: bool, patches: int) -> int:
    """Return the most SCAFFOLD tokens of one turn that shows a chunk of `patches` temporal patches.

    timestamps: every patch has its time in words and vision tags of its own (see `Layout.timestamps`).
    """
    return OPENING + VISION_TAGS + CLOSING + SPARE + (patches * (TIME + VISION_TAGS) if timestamps else 0)


def max_copy(max_new_tokens: int) -> int:
    """Return the most tokens of a turn's copy in a stream of two lanes. max_new_tokens: as in LayoutConfig."""
    return COPY_TIMES + COPY_SAID + max_new_tokens - NOT_COPIED
