"""The documented list of metrics is the list that is logged."""

from __future__ import annotations

import re

import pytest

from tests.support.project import ROOT

pytestmark = pytest.mark.smoke

LOGGED = re.compile(r'"((?:reward|age|rollout|buffer|busy|swap|mismatch|step)/[a-z_0-9]+)"')


def test_every_metric_name_in_the_code_is_in_the_documented_list():
    text = (ROOT / "docs" / "metrics.md").read_text()
    names = {
        name
        for file in ("rl/metrics.py", "rl/loop.py", "evals/job.py")
        for name in LOGGED.findall((ROOT / file).read_text())
    }
    assert len(names) > 15
    assert not {name for name in names if f"`{name}`" not in text}


def test_every_documented_train_metric_is_made_by_the_learner():
    text = (ROOT / "docs" / "metrics.md").read_text()
    source = "".join(path.read_text() for path in sorted((ROOT / "learner").rglob("*.py")))
    documented = re.findall(r"`train/([a-z_0-9]+)`", text)
    assert len(documented) > 10
    assert not [name for name in documented if f'"{name}"' not in source]
