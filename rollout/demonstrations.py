"""A demonstration written as a log: the turns of a clip with the words of a script, as if a model had said them.

Invariant: layout, memory and positions are those of a rollout, because the same StreamWriter makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from streams.log.record import StreamLog
from streams.messages import ScriptTask
from streams.video.reader import VideoError
from streams.writing.inputs import TurnInput
from streams.writing.writer import StreamWriter


def write_demonstration(writer: StreamWriter, turns: Sequence[TurnInput], task: ScriptTask, version: int) -> StreamLog:
    """Write the task's script into the turns of its clip; every scripted token is a target.

    Raises OverBudget for a turn that is longer than a rollout's may be, VideoError for one that speaks after the video's end.
    """
    script = task.script
    # A task without a known end: its tail is cut where the video ends.
    if any(scripted.response is not None for scripted in script[len(turns) :]):
        raise VideoError(
            task.task.video, f"the demonstration speaks after the video's end, which comes in turn {len(turns) - 1}"
        )
    for turn_input, scripted in zip(turns, script, strict=False):
        ids = writer.layout.within_budgets(scripted.thought, scripted.response, writer.turn + 1)
        writer.begin_turn(turn_input, version=version)
        for token in ids:
            writer.append_generated(token, version, target=True)
    return writer.finish()
