"""The architecture page lists the folders and modules that there are, and names no file that is not there."""

from __future__ import annotations

import re

from streams.support.files import PACKAGES
from tests.support.project import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()


def folders() -> dict[str, set[str]]:
    found = {}
    for top in (*PACKAGES, "sightline"):
        for init in (ROOT / top).rglob("__init__.py"):
            modules = {path.name for path in init.parent.glob("*.py")} - {"__init__.py"}
            found[str(init.parent.relative_to(ROOT))] = modules
    return found


def test_the_page_lists_every_folder_with_its_modules():
    listed = {}
    for section in re.split(r"^### ", PAGE.split("\n## Every folder", 1)[1], flags=re.MULTILINE)[1:]:
        name = re.match(r"`(.*?)/`", section)
        assert name is not None
        listed[name[1]] = set(re.findall(r"^\| `(\w+\.py)` \|", section, re.MULTILINE))
    assert listed == folders()


def test_every_file_that_the_pages_name_is_there():
    for page in (PAGE, GLOSSARY, (ROOT / "CONTRIBUTING.md").read_text()):
        named = set(re.findall(r"(?<![\w/.])((?:\w+/)+\w+\.py)\b", page))
        assert len(named) > 5
        assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_the_page_and_the_import_rules_have_the_same_floors():
    rules = (ROOT / "pyproject.toml").read_text()
    floors = re.search(r"layers = \[(.*?)\]", rules, re.DOTALL)
    assert floors is not None
    names = [name for line in re.findall(r'"(.*?)"', floors[1]) for name in re.findall(r"\w+", line)]
    shown = PAGE.split("## The floors", 1)[1].split("## The walk", 1)[0]
    order = [m[0] for m in re.finditer(rf"(?m)(?<![`\w.])(?:{'|'.join(names)})\b(?=[ |])", shown)]
    assert list(dict.fromkeys(order))[: len(names)] == names
