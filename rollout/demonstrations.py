"""A demonstration written as a log: the turns of a clip with the words of a script, as if a model had said them.

Runs on the prepare thread: it needs the clip and the tokenizer, and no model.

Invariants:
* layout, memory and positions are those of a rollout, because the same StreamWriter makes them;
* a demonstration's failure is its result, with its cause; ReaderClosedError is no failure and passes through.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rollout.clips import ClipFrames
from rollout.groups import GroupResult, failure
from rollout.recipe import StreamRecipe
from streams.log.record import StreamLog
from streams.memory import make_policy
from streams.messages import GroupPayload, GroupSummary, ScriptTask
from streams.support.doing import doing
from streams.video.reader import ReaderClosedError, VideoError
from streams.writing.inputs import TurnInput
from streams.writing.writer import StreamWriter


class Demonstrations:
    """Lays out the demonstrations of one worker."""

    def __init__(self, worker: int, recipe: StreamRecipe, frames: ClipFrames) -> None:
        self._worker, self._recipe, self._frames = worker, recipe, frames

    def write(self, task: ScriptTask) -> GroupResult:
        """Return the demonstration's summary and payload, or a summary that says why it failed. Raises ReaderClosedError."""
        began = time.monotonic()
        try:
            return self._write(task, began)
        except ReaderClosedError:
            raise
        except Exception as error:  # noqa: BLE001 - named boundary: one task's rollout
            return failure(self._worker, task.group, task.task.id, 0.0, began, error)

    def _write(self, task: ScriptTask, began: float) -> GroupResult:
        setup = self._recipe.setup
        with doing(f"reads {task.task.video} for the demonstration of {task.group}"):
            clip = self._frames.read(task.task, task.plan)
        layout = self._recipe.layout()
        writer = StreamWriter(
            self._recipe.header(task.group, task.task.id, setup.memory, layout, 1.0),
            layout,
            make_policy(setup.memory),
            self._recipe.cursor(task.plan),
        )
        stream = write_demonstration(
            writer, self._recipe.turns(task.task, task.plan, clip, layout), task, setup.version
        )
        summary = GroupSummary(
            group=task.group,
            task_id=task.task.id,
            worker=self._worker,
            turns=(layout.parse_turns(stream),),
            log_tokens=len(stream),
            seconds=time.monotonic() - began,
            clip_seconds=self._recipe.clip_seconds(task.task, task.plan),
        )
        return summary, GroupPayload((stream,), "frames", clip.frames)


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
        writer.extend_generated(ids, version, target=True)
    return writer.finish()
