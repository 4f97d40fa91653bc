"""Which rows a stream can answer under a run's settings: shared by the run's start and `python -m streams.data.check`.

A finding concerns one answer of a row, or the whole row. A row is left out if nothing can be learned from it; otherwise
it is kept and reported (`Finding.answer` says which part is lost).

Invariants:
* pure, except for the tokenizer behind a Layout;
* the clock is `StreamTask.chunk_of`, as in rewards and layout;
* texts are judged by `Layout.query_ids` and `Layout.text_ids`, as when a run lays out a stream.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streams.data.rows import VIDEOS_KNOWN
from streams.layout.layout import STREAMING_TOKENS, Layout, OverBudget
from streams.messages import RowTexts, RowWords
from streams.task import Plan, Reason, StreamTask

CERTAIN_TOKENS = (
    *STREAMING_TOKENS,
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
)
"""Control tokens that every usable checkpoint has, since the layout is made of them."""


@dataclass(frozen=True)
class Finding:
    """What cannot be answered as the row says.

    answer: index of the answer that is lost; None if none is, or if the reason concerns the whole row.
    """

    kind: Reason
    reason: str
    answer: int | None = None


def untimely(task: StreamTask, plan: Plan, max_turns: int) -> list[Finding]:
    """Return a finding for every answer with a time that no stream can keep.

    Such an answer is due after the plan's last turn, while its question is closed, or in a turn that another answer
    needs. max_turns: data.max_turns, for the message.
    """
    turns, chunk_seconds = plan.turns, plan.chunk_seconds
    found = []
    due = [task.chunk_of(answer.time, chunk_seconds) for answer in task.answers]
    for i, (turn, answer) in enumerate(zip(due, task.answers, strict=True)):
        if turn >= turns:
            cut = f"raise data.max_turns={max_turns}" if turns >= max_turns else f"the row ends at {task.end:g} s"
            found.append(
                Finding(
                    Reason.AFTER_LAST_TURN,
                    f"answers[{i}] is due at {answer.time:g} s, in turn {turn}, after the stream's last turn {turns - 1} "
                    f"({cut})",
                    i,
                )
            )
            continue
        asked = task.chunk_of(task.queries[answer.query].time, chunk_seconds)
        earlier = [j for j, other in enumerate(due) if j != i and asked <= other < turn]
        if earlier and not task.queries[answer.query].stay_open:
            first = min(earlier, key=lambda j: due[j])
            found.append(
                Finding(
                    Reason.QUESTION_CLOSED,
                    f"answers[{i}] is due in turn {turn}, but any response closes queries[{answer.query}], and "
                    f"answers[{first}] is due in turn {due[first]} (set queries[{answer.query}].stay_open=true)",
                )
            )
        if turn in due[:i]:
            found.append(
                Finding(
                    Reason.TURN_SHARED,
                    f"answers[{i}] is due in turn {turn} ({chunk_seconds:g} s long), like answers[{due.index(turn)}]: a "
                    "turn holds one response, the other comes late",
                )
            )
    return found


def texts_of(task: StreamTask) -> list[tuple[str, str]]:
    """Return (field, text) for everything in a row that is tokenised."""
    texts = [(f"queries[{i}].text", query.text) for i, query in enumerate(task.queries)]
    texts += [(f"answers[{i}].text", answer.text) for i, answer in enumerate(task.answers)]
    return texts + [(f"thoughts[{i}].text", thought.text) for i, thought in enumerate(task.thoughts)]


def spelled_token(task: StreamTask, layout: Layout | None) -> str | None:
    """Return which text of the row a run refuses because of a control token, and why; None if it accepts all of them.

    Without a layout, only the tokens are searched for that every usable tokenizer has.
    """
    for field, text in texts_of(task):
        if layout is None:
            if token := next((token for token in CERTAIN_TOKENS if token in text), None):
                return f"{field} spells the control token {token!r}"
            continue
        try:
            if field.startswith("queries"):
                layout.query_ids(text)
            else:
                layout.text_ids(text, "the text")
        except ValueError as error:
            return f"{field}: {error}"
    return None


def read_words(row: RowTexts, layout: Layout) -> RowWords:
    """Return what the tokenizer says about one row: why it is refused, or which answers are longer than a turn."""
    if refused := spelled_token(row.task, layout):
        return RowWords(refused=(Reason.CONTROL_TOKEN, refused))
    for turn, scripted in row.script:
        try:
            layout.within_budgets(scripted.thought, scripted.response, turn)
        except OverBudget as error:
            thought = error.key == "layout.think_budget"
            return RowWords(refused=(Reason.THOUGHT_TOO_LONG if thought else Reason.ANSWER_TOO_LONG, str(error)))
        except ValueError as error:
            return RowWords(refused=(Reason.CONTROL_TOKEN, str(error)))
    fits = {i: layout.fitting(answer.text) for i, answer in enumerate(row.task.answers)}
    return RowWords(fits={i: text for i, text in fits.items() if text is not None})


def too_long(answer: int, fits: str, max_new_tokens: int) -> Finding:
    """Return the finding for answer number `answer`, of which a turn can hold only the beginning `fits`."""
    return Finding(
        Reason.ANSWER_TOO_LONG,
        f"answers[{answer}].text is longer than a turn: layout.max_new_tokens={max_new_tokens} leaves room for {fits!r}",
        answer,
    )


def lost(task: StreamTask, findings: Iterable[Finding]) -> bool:
    """Return whether nothing can be learned from the row, because no response to it can be right.

    An answer that is due after the last turn does not count as lost: until then, silence is right.
    """
    spoiled = {finding.answer for finding in findings if finding.kind is not Reason.AFTER_LAST_TURN}
    return spoiled >= set(range(len(task.answers)))


def overlap(train: Sequence[StreamTask], heldout: Sequence[StreamTask]) -> list[tuple[StreamTask, StreamTask]]:
    """Return (held-out task, training task) for every held-out row that repeats a question of the training rows.

    Two rows ask the same if the words and the video file are the same; the first such training task is returned.
    """
    file = lru_cache(VIDEOS_KNOWN)(os.path.realpath)

    def asked(task: StreamTask) -> list[tuple[str, str]]:
        return [(file(task.video), " ".join(query.text.split())) for query in task.queries]

    # Of two files the held-out one is the one to hold in memory.
    wanted = {key for task in heldout for key in asked(task)}
    known: dict[tuple[str, str], StreamTask] = {}
    for task in train:
        for key in wanted.intersection(asked(task)):
            known.setdefault(key, task)
    pairs = ((task, next((known[key] for key in asked(task) if key in known), None)) for task in heldout)
    return [(task, other) for task, other in pairs if other is not None]
