"""The kind of a turn's next token while the turn is generated, and whether it is forced."""

from __future__ import annotations

from dataclasses import dataclass

from streams.layout.layout import LayoutConfig, LayoutTokens
from streams.log.record import Kind


@dataclass
class TurnState:
    """Follows one turn while it is generated: the kind of the next token, and whether it is forced.

    A thought may hold `think_budget` tokens with its tags: the last of them is forced to be `</think>`. The last of
    `max_new_tokens` is forced to be the end token.
    """

    tokens: LayoutTokens
    config: LayoutConfig
    count: int = 0
    thinking: bool = True
    decided: bool = False
    spoke: bool = False
    over: bool = False

    def forced(self) -> int | None:
        """Return the id that must come next, or None if the model chooses."""
        if self.config.force_empty_thoughts and self.count < 2:
            return self.tokens.think if self.count == 0 else self.tokens.think_end
        if self.count == self.config.max_new_tokens - 1:
            return self.tokens.im_end
        if self.thinking and self.count == self.config.think_budget - 1:
            return self.tokens.think_end
        return None

    def advance(self, token: int) -> Kind:
        """Take the next token; returns its kind."""
        assert not self.over, "the turn has ended"
        self.count += 1
        if token == self.tokens.im_end:
            self.over = True
            return Kind.END
        if self.thinking:
            self.thinking = token != self.tokens.think_end
            return Kind.THINK
        if not self.decided:
            self.decided = True
            if token in (self.tokens.silent, self.tokens.response):
                self.spoke = token == self.tokens.response
                return Kind.DECISION
        return Kind.RESPONSE
