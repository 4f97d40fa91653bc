"""The transcripts' page: one HTML file that needs nothing else, made from records of format 1.

    sightline page OUT.html A.jsonl [B.jsonl ...]      # also across runs, e.g. two seeds
    python -m evals.transcripts.page ...               # the same, in a checkout

Invariants:
* the file stays under its byte budget and names what it leaves out;
* data are inert: they are in one JSON block without `<` and are shown as text only;
* a content policy with the hashes of the page's own script and style forbids any other, and the network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.transcripts.frames import read_strips
from streams.support.files import encoded, write_atomic
from streams.support.strict_json import dumps
from streams.video.config import VideoConfig

FORMAT = 1
ASSETS = Path(__file__).resolve().parent / "assets"
SCRIPTS = ("data", "list", "stream", "timeline", "turn", "start")
"""The page's script, in order; the parts share one scope."""
DATA_SHARE = 0.75
"""Largest share of the page's budget for text and counts; frames get the rest."""
LABELS = {
    "sft": "after SFT",
    "rl": "after RL",
    "empty_thoughts": "without thoughts",
    "recent_frames": "recent frames only",
}
EXPECTED = ("query", "text", "kind", "time", "query_turn", "due_turn", "window")
GOT = ("outcome", "response_turn", "response", "correct", "timing", "value", "components")
REDUNDANT = ("turn", "start", "end")
EMPTY = ("response", "")
"""Left in: a response without text is no silence."""

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def write_page(
    path: Path, records: Records, video: VideoConfig, budget_mb: float, totals: Mapping[str, tuple[int, int, float]]
) -> tuple[str, ...]:
    """Write the page of `records` (result -> streams, the first result in front); returns what it left out, in words.

    totals: result -> (questions, streams, mean reward) of the whole evaluation, where known.
    """
    budget = int(budget_mb * 2**20)
    streams = _by_task(records)
    notes = []
    shell = len(encoded(_page("", {})))
    kept = _fitting(streams, int(DATA_SHARE * (budget - shell)))
    if len(kept) < len(streams):
        notes.append(
            f"{len(streams) - len(kept)} of {len(streams)} streams do not fit into eval.transcript_mb={budget_mb:g}"
        )
    first = {task: next(iter(stream["runs"].values())) for task, stream in kept.items()}
    data: dict[str, Any] = {
        "format": FORMAT,
        "results": [
            {"name": name, "label": LABELS.get(name, name)}
            | dict(zip(("questions", "streams", "reward"), totals.get(name, (None,) * 3), strict=True))
            for name in records
        ],
        "streams": [_shown(stream) for stream in kept.values()],
        "notes": notes,
    }
    spare = budget - shell - len(encoded(_json(data))) - 4096
    strips = read_strips(first, video, max(0, spare))
    for shown in data["streams"]:
        strip = strips[shown["task"]]
        shown["frames"], shown["frames_note"] = strip.frames, strip.note
    missing = sum(bool(strip.note) for strip in strips.values())
    if missing:
        notes.append(f"{missing} of {len(strips)} streams have fewer, smaller or no frames (each says why)")
    write_atomic(path, _page(path.stem, data))
    return tuple(notes)


def _by_task(records: Records) -> dict[str, dict[str, Any]]:
    """Return task -> its runs (result -> record), in the order of the first result that has it."""
    streams: dict[str, dict[str, Any]] = {}
    for name, lines in records.items():
        for line in lines:
            if line["format"] != FORMAT:
                raise ValueError(f"{name}: transcript format {line['format']} of {line['task']} is not {FORMAT}")
            stream = streams.setdefault(line["task"], {"runs": {}})
            for other in stream["runs"].values():
                if (other["chunk_seconds"], other["start"]) != (line["chunk_seconds"], line["start"]):
                    raise ValueError(f"{name}: {line['task']} has other chunks than in the results before it")
            stream["runs"][name] = line
    return streams


def _fitting(streams: dict[str, dict[str, Any]], budget: int) -> dict[str, dict[str, Any]]:
    """Return the first streams whose text and counts fit."""
    kept: dict[str, dict[str, Any]] = {}
    for task, stream in streams.items():
        budget -= len(encoded(_json(_shown(stream))))
        if budget < 0 and kept:
            break
        kept[task] = stream
    return kept


def _shown(stream: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page's script reads of one stream: what its runs share, then each run."""
    line = next(iter(stream["runs"].values()))
    shared = {key: line[key] for key in ("task", "category", "video", "start", "end", "chunk_seconds", "queries")}
    return shared | {
        "answers": [{key: answer[key] for key in EXPECTED} for answer in line["answers"]],
        "runs": {name: _run(run) for name, run in stream["runs"].items()},
    }


def _run(line: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("id", "reward", "components", "failed", "reward_failed", "policy", "versions")
    return {key: line[key] for key in kept} | {
        "answers": [{key: answer[key] for key in GOT} for answer in line["answers"]],
        # A turn's number, and counts that are null or zero, are left out: a long stream has many turns.
        "turns": [
            {k: v for k, v in turn.items() if k not in REDUNDANT and (v not in (None, "", [], {}) or (k, v) == EMPTY)}
            for turn in line["turns"]
        ],
    }


def _page(title: str, data: Mapping[str, Any]) -> str:
    parts = "\n".join((ASSETS / f"transcript_{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}}})();\n'
    style = (ASSETS / "transcript.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    filled = {"title": _escaped(title), "policy": policy, "style": style, "script": script, "data": _json(data)}
    # One pass: nothing inside a part is taken for another placeholder.
    return re.sub(
        r"\{\{(\w+)\}\}", lambda match: filled[match[1]], (ASSETS / "transcript.html").read_text(encoding="utf-8")
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _escaped(text: str) -> str:
    for plain, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, entity)
    return text


def _json(data: Any) -> str:
    """Write JSON that cannot end its script block, whatever its strings hold."""
    text = dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or not arguments[0].endswith(".html"):
        print(__doc__)
        return 2
    records: dict[str, list[dict[str, Any]]] = {}
    for name in arguments[1:]:
        path = Path(name).resolve()
        # Two runs' results have the same name; the first folders that differ tell them apart.
        label = path.stem if path.stem not in records else f"{path.stem} ({path.parent.parent.name})"
        records[label] = [json.loads(line) for line in path.read_text().splitlines()]
    streams = [line for lines in records.values() for line in lines]
    if not streams:
        raise ValueError(f"no stream in {', '.join(arguments[1:])}")
    shown = [turn["video"] for line in streams for turn in line["turns"] if turn["video"]]
    video = VideoConfig(
        chunk_seconds=streams[0]["chunk_seconds"],
        frames_per_chunk=len(shown[0]["frame_times"]) if shown else 2,
        max_pixels=28 * 28 * 64,
    )
    for note in write_page(Path(arguments[0]), records, video, 8.0, {}):
        print(note)
    print(arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
