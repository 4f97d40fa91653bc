"""A generated turn after parsing: what the model thought, and what it said if it said anything.

`Layout.parse_turn` makes it from token ids; rewards, evaluation and transcripts read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParsedTurn:
    """One turn of one stream.

    Attributes:
        turn: 0-based index of the turn in its stream.
        thought: the text inside the think tags, '' if it is empty or missing.
        response: the text said in this turn; None if the turn chose silence or could not be parsed.
        well_formed: the turn is a pair of think tags, one decision, text exactly if the decision is <response>, and the
            end token; nothing in it was forced except by the think budget.
        think_tokens: tokens of the think span, tags included.
        new_tokens: all generated tokens.
    """

    turn: int
    thought: str
    response: str | None
    well_formed: bool
    think_tokens: int = 0
    new_tokens: int = 0
