"""A row that ends every process that works on it costs itself, by name, in training and evaluation, and not the run."""

from __future__ import annotations

import json
import re

import pytest

from streams.data.synthetic.questions import SyntheticConfig, generate
from tests.support.commands import launch
from tests.support.small_run import SETTINGS, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_row_that_ends_its_workers_is_named_and_left_out(tmp_path):
    root, data = tmp_path / "run", tmp_path / "own"
    generate(data, SyntheticConfig(train_clips=3, heldout_per_mode=1, max_turns=14))
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    asked = {"queries": [{"time": 1, "text": "q"}], "answers": [{"time": 2, "text": "red"}]}
    brief = [{"id": f"sound{i}", "video": row["video"], "end": 5} | asked for i, row in enumerate(rows)]
    fatal = {"id": "fatal", "video": rows[0]["video"], "end": 8} | asked
    path = data / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*brief[:2], fatal, *brief[2:]]))
    done = launch(
        *SETTINGS,
        f"run_root={root}",
        f"data.train={path}",
        f"data.heldout={path}",
        "data.max_turns=12",
        "job.stages=[rl]",
        "memory.name=custom",
        "memory.target=tests.support.fatal_memory:Fatal",
        "+memory.args={window: 4, last: 5}",
        f"eval.every={STEPS}",
        "tracking.enabled=false",
        limit_s=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    why = r".*it ended the workers that had it alone, 2 times: Fatal Python error: Aborted"
    assert re.search(rf"rl: dropped group \d+/fatal: {why}", said), said
    assert re.search(rf"eval: failed fatal: {why}", said), said
    assert not re.search(r"(dropped group|failed) \S*sound", said), said
    state = json.loads((root / "checkpoints" / "rl" / "final" / "state.json").read_text())
    assert state["step"] == STEPS
