"""Demonstrations: what a task's stream should think and say, turn by turn, in words. Pure.

A demonstration thinks and answers correctly. With `late_probability` it speaks `late_min`..`late_max` chunks
(uniformly) after the answer became due.

Invariants:
* the script depends on seed, epoch and task alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np

from conf.schema import RunConfig
from conf.training import SftConfig
from streams.messages import ScriptedTurn
from streams.task import Plan, StreamTask


def script_for(task: StreamTask, plan: Plan, config: SftConfig, *, seed: int, epoch: int) -> tuple[ScriptedTurn, ...]:
    """Return one ScriptedTurn per turn, with thoughts and answers in the chunk that contains their time.

    An answer delayed beyond the last turn is said in the last turn.
    """
    digest = hashlib.blake2b(f"{seed}:{epoch}:{task.id}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    thoughts: dict[int, str] = {}
    for item in task.thoughts:
        # Several thoughts in one chunk become one: a longer chunk collects what shorter ones would have apart.
        chunk = task.chunk_of(item.time, plan.chunk_seconds)
        thoughts[chunk] = " ".join(part for part in (thoughts.get(chunk, ""), item.text) if part)
    said: dict[int, list[str]] = {}
    for answer in task.answers:
        due = task.chunk_of(answer.time, plan.chunk_seconds)
        if due >= plan.turns:
            # The stream ends before the answer is due: it must not learn to answer what it has not seen.
            continue
        turn = due
        if rng.random() < config.late_probability:
            turn += int(rng.integers(config.late_min, config.late_max + 1))
        turn = min(turn, plan.turns - 1)
        said.setdefault(turn, []).append(answer.text)
        if config.pending_thought:
            for pending in range(due, turn + 1):
                thought = thoughts.get(pending, "")
                thoughts[pending] = config.pending_thought.format(thought=thought, answer=answer.text)
    return tuple(
        ScriptedTurn(thoughts.get(turn, ""), " ".join(said[turn]) if turn in said else None)
        for turn in range(plan.turns)
    )


def scripted_words(config: RunConfig, task: StreamTask) -> tuple[tuple[int, ScriptedTurn], ...]:
    """Return (turn, words) of the demonstration without delays: those of every epoch contain at least these words."""
    prompt = replace(config.sft, late_probability=0.0)
    plan = config.data.plan_of(task)
    script = script_for(task, plan, prompt, seed=config.seed, epoch=0)
    due = Counter(task.chunk_of(answer.time, plan.chunk_seconds) for answer in task.answers)
    found = []
    for turn, words in enumerate(script):
        if due[turn] > 1 and config.sft.late_probability:
            words = replace(words, response=None)  # said in one turn only if none comes late
        if words.thought or words.response is not None:
            found.append((turn, words))
    return tuple(found)
