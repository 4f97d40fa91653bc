"""The examples that the guides under docs/ show."""

from __future__ import annotations

import re

from tests.support.project import ROOT

DOCS = ROOT / "docs"


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / guide).read_text(), re.DOTALL | re.MULTILINE)
