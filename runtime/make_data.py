"""Stage `data`: the quickstart's clips, unless the data are the user's own."""

from __future__ import annotations

import time
from typing import Any

from runtime.run import Run, Stage
from streams.data.synthetic.questions import generate


def run(run: Run) -> dict[str, Any]:
    """Generate the clips and their two task files."""
    data = run.config.data
    if data.train:
        run.progress.say(f"data: using {data.train} and {data.heldout}")
        return {}
    began = time.monotonic()
    made = generate(run.root / "data", data.synthetic)
    run.progress.say(f"data: {made.train_jsonl} and {made.heldout_jsonl} in {time.monotonic() - began:.1f} s")
    return {"train": str(made.train_jsonl), "heldout": str(made.heldout_jsonl)}


DATA = Stage(run, actors=False)
