"""How long the fixed parts of a turn can be, known before any tokenizer is loaded.

Invariants:
* each length is an upper bound for the layout that a checkpoint's tokenizer makes, as long as the words of the template
  are single tokens, as in Qwen's vocabularies (`tests/streams/test_lengths.py` compares both families);
* memory plans and checks of settings take the template's tokens from here and do not count them again.
"""

from __future__ import annotations

OPENING = 4
"""`\\n <|im_start|> user \\n`."""
CLOSING = 5
"""`<|im_end|> \\n <|im_start|> assistant \\n`."""
VISION_TAGS = 2
"""`<|vision_start|>` and `<|vision_end|>`."""
SPARE = 2
"""Margin: no layout of today needs these tokens."""
TIME = 9
"""`<9999.9 seconds>`: every digit is a token."""
COPY_TIMES = 20
"""`\\n[1000.25-1001.25 s]\\n`, the head of a copied turn (see `streams.layout.lanes`)."""
COPY_SAID = 8
"""`\\n[said]\\n`."""
NOT_COPIED = 3
"""Generated tokens of an answering turn that its copy leaves out: end of the thought, decision, end of the turn."""


def max_scaffold(*, timestamps: bool, patches: int) -> int:
    """Return the most SCAFFOLD tokens of one turn that shows a chunk of `patches` temporal patches.

    timestamps: every patch has its time in words and vision tags of its own (see `Layout.timestamps`).
    """
    return OPENING + VISION_TAGS + CLOSING + SPARE + (patches * (TIME + VISION_TAGS) if timestamps else 0)


def max_copy(max_new_tokens: int) -> int:
    """Return the most tokens that the copy of a turn can have (two lanes). max_new_tokens: as in LayoutConfig."""
    return COPY_TIMES + COPY_SAID + max_new_tokens - NOT_COPIED
