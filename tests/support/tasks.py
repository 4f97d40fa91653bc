"""Tasks for tests that open no video."""

from __future__ import annotations

from streams.task import ExpectedAnswer, StreamTask, TimedQuery


def clip_task(name: str) -> StreamTask:
    """Return a task called `name`, with one question whose answer is due at once."""
    return StreamTask(
        name,
        f"{name}.mp4",
        start=0.0,
        end=10.0,
        queries=(TimedQuery(1.0, "what?"),),
        answers=(ExpectedAnswer(1.0, "red"),),
        category="perception",
    )
