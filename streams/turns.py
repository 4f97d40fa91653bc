"""A generated turn after parsing: what the model thought and whether, and what, it said.

Made by `layout.parse_turn` from token ids; read by rewards, evaluation and transcripts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParsedTurn:
    """One turn of one stream.

    turn: chunk index, 0-based. thought: text inside the think tags, '' if empty or missing.
    response: the text said in this turn, None if the turn chose silence or could not be parsed.
    well_formed: think pair, then one decision, then text only after <response>, then the end token, nothing forced
    except the think budget. think_tokens: tokens of the think span with its tags. new_tokens: all generated tokens.
    """

    turn: int
    thought: str
    response: str | None
    well_formed: bool
    think_tokens: int = 0
    new_tokens: int = 0
