"""A demonstration written as a log: the turns of a clip with the words of a script, as if a model had said them.

Owner: rollout. Invariant: layout, memory and positions are those of a rollout, because the same StreamWriter makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from streams.inputs import TurnInput
from streams.log import StreamLog
from streams.messages import ScriptedTurn
from streams.writer import StreamWriter


def write_demonstration(
    writer: StreamWriter, turns: Sequence[TurnInput], script: Sequence[ScriptedTurn], version: int
) -> StreamLog:
    """Write `script` into the turns of a clip; every scripted token is a target.

    Raises ValueError for a turn that is longer than a rollout's may be, or that speaks after the video's end.
    """
    layout = writer.layout
    # A task without a known end: its tail is cut where the video ends.
    if any(scripted.response is not None for scripted in script[len(turns) :]):
        raise ValueError(f"the demonstration speaks after the video's end, which comes in turn {len(turns) - 1}")
    for turn_input, scripted in zip(turns, script, strict=False):
        ids = layout.demonstration(scripted.thought, scripted.response)
        thought = ids.index(layout.tokens.think_end) + 1
        if thought > layout.config.think_budget:
            raise ValueError(
                f"the thought of turn {writer.turn + 1} has {thought} tokens with its tags, more than "
                f"layout.think_budget={layout.config.think_budget}: {scripted.thought!r}"
            )
        if len(ids) > layout.config.max_new_tokens:
            raise ValueError(
                f"the demonstration of turn {writer.turn + 1} has {len(ids)} tokens, more than "
                f"layout.max_new_tokens={layout.config.max_new_tokens}"
            )
        writer.begin_turn(turn_input, version=version)
        for token in ids:
            writer.append_generated(token, version, target=True)
    return writer.finish()
