"""The kind of a turn's next token while the turn is generated, and whether it is forced.

Invariant: the engine and the writer of demonstrations derive kinds from this state machine alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streams.layout.layout import LayoutConfig, LayoutTokens
from streams.log.record import GENERATED

# As plain numbers: a list of those becomes bytes several times as fast as one of an IntEnum's members.
_THINK, _DECISION, _RESPONSE, _END = map(int, GENERATED)


@dataclass
class TurnState:
    """Follows one turn while it is generated.

    A thought may have `think_budget` tokens, tags included; the last of them is forced to be `</think>`. The last of
    `max_new_tokens` tokens is forced to be the end token.

    Attributes:
        count: tokens generated so far.
        thinking: `</think>` has not come yet.
        decided: the decision has come.
        spoke: the decision was `<response>`.
        over: the end token has come.
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

    def advance(self, ids: Sequence[int]) -> list[int]:
        """Advance by the next tokens and return their kinds, numbers of Kind."""
        silent, response = self.tokens.silent, self.tokens.response
        im_end, think_end = self.tokens.im_end, self.tokens.think_end
        kinds = []
        # Every generated token passes here: one loop for all of them, and no call for each.
        for token in ids:
            assert not self.over, "the turn has ended"
            kind = _RESPONSE
            if token == im_end:
                self.over = True
                kind = _END
            elif self.thinking:
                self.thinking = token != think_end
                kind = _THINK
            elif not self.decided:
                self.decided = True
                if token in (silent, response):
                    self.spoke = token == response
                    kind = _DECISION
            kinds.append(kind)
        self.count += len(kinds)
        return kinds
