"""What an evaluation keeps of every held-out stream, so that runs can be compared stream by stream (`evals.report`).

One JSON file for each result, `run_root/evaluations/NAME.json`.

Invariants:
* a stream is known by its task and by what was asked of it: the same name with other questions is another stream;
* a stream that failed is kept as it counts, as one that never spoke.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.categories import category_name
from evals.heldout import EvalResult, ScoredStream
from rewards.compose import RewardConfig
from streams.support.files import write_json
from streams.support.strict_json import dumps

FORMAT = 1
FOLDER = "evaluations"


@dataclass(frozen=True)
class StreamScore:
    """How one held-out stream did.

    Attributes:
        task: id of its row. asked: digest of its questions, answers and turns.
        reward: its reward. timing: the sum of its answers' timing scores. right: answers that were right, of `questions`.
    """

    task: str
    asked: str
    category: str
    reward: float
    timing: float
    right: int
    questions: int
    failed: bool = False


@dataclass(frozen=True)
class Kept:
    """One result of a run: its name, its streams, and the reward's settings."""

    name: str
    reward: Mapping[str, Any]
    streams: Sequence[StreamScore]


def write_results(root: Path, results: Mapping[str, EvalResult], reward: RewardConfig) -> None:
    """Write the streams of every result under `root`. Raises OSError."""
    for name, result in results.items():
        kept = {
            "format": FORMAT,
            "result": name,
            "reward": {"combine": reward.combine, "terms": reward.terms},
            "streams": [asdict(_score(stream)) for stream in result.streams],
        }
        write_json(root / FOLDER / f"{name}.json", kept)


def read_result(path: Path) -> Kept:
    """Return a result that `write_results` wrote. Raises ValueError, with the file, if it is none, or cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError(f"it has format {kept['format']!r}, known is {FORMAT}")
        return Kept(str(kept["result"]), kept["reward"], tuple(StreamScore(**stream) for stream in kept["streams"]))
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: it is no result of an evaluation: {error}") from None


def _score(stream: ScoredStream) -> StreamScore:
    answers = stream.result.answers
    return StreamScore(
        stream.task.id,
        _asked(stream),
        category_name(stream.task.category),
        stream.result.total,
        sum(answer.timing for answer in answers),
        sum(answer.correct for answer in answers),
        len(answers),
        stream.failed is not None,
    )


def _asked(stream: ScoredStream) -> str:
    """Return what tells the stream's questions from others'. A video's path does not count: machines differ."""
    task, plan = stream.task, stream.plan
    # `math.inf` is no JSON; where a stream ends is in its turns.
    asked = [
        task.start,
        plan.turns,
        plan.chunk_seconds,
        [asdict(q) for q in task.queries],
        [asdict(a) for a in task.answers],
    ]
    return hashlib.blake2b(dumps(asked).encode(), digest_size=8).hexdigest()
