"""The files under examples/ are the guides' code, and a run composes with them as examples/README.md says.

What the code does is shown where the guides' own examples are executed: tests/docs/test_guides.py and
tests/streams/test_custom_memory.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.guides import blocks
from tests.support.project import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("file", "guide", "language"),
    [
        ("own_reward/my_rewards.py", "rewards.md", "python"),
        ("own_reward/reward/mine.yaml", "rewards.md", "yaml"),
        ("own_memory/my_memory.py", "memory.md", "python"),
        ("own_memory/memory/answers.yaml", "memory.md", "yaml"),
        ("own_data/make_rows.py", "data.md", "python"),
    ],
)
def test_an_example_is_the_guides_code(file, guide, language):
    text = (EXAMPLES / file).read_text()
    (shown,) = blocks(guide, language)
    head, code = text[: len(text) - len(shown)], text[len(text) - len(shown) :]
    assert code == shown
    assert not head or (head.startswith('"""') and head.endswith('"""\n\n')), "no more than a docstring above it"


@pytest.mark.parametrize(
    ("folder", "choice", "expected"),
    [("own_reward", "reward=mine", "target: my_rewards:Brief"), ("own_memory", "memory=answers", "turns: 8")],
)
def test_a_run_composes_with_an_example(folder, choice, expected):
    done = subprocess.run(
        [sys.executable, "launch.py", "--config-dir", f"examples/{folder}", choice, "--cfg", "job"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES / folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert f"`{folder}/`" in (EXAMPLES / "README.md").read_text()


def test_the_data_example_writes_rows_that_load(tmp_path):
    from streams.data.dataset import load_tasks

    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "questions.csv").write_text("file,asked,question,due,answer\na.mp4,1,What?,4.5,red\n")
    subprocess.run(
        [sys.executable, str(EXAMPLES / "own_data" / "make_rows.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    (task,) = load_tasks(tmp_path / "videos" / "train.jsonl", on_bad="raise").tasks
    assert (task.video, task.answers[0].text) == (str(tmp_path / "videos" / "a.mp4"), "red")
