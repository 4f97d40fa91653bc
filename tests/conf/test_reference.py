"""docs/config.md: generated, complete, and true to what the configuration accepts."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from conf.reference import composed, meanings, option, sections, settings
from conf.schema import register_schema
from tests.support import configs
from tests.support.project import ROOT

CONF = ROOT / "conf"
DOCUMENT = ROOT / "docs" / "config.md"
OPTIONS = sorted(CONF.glob("*/*.yaml"))


def flat(values: dict, prefix: str = "") -> dict:
    """Leaves by dotted key; a mapping without content is a leaf."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def test_the_document_is_what_the_command_prints_and_torch_is_not_loaded_for_it():
    code = (
        "import runpy, sys; runpy.run_module('conf.reference', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == DOCUMENT.read_text(), "run: python -m conf.reference > docs/config.md"


def test_every_field_of_the_schema_has_a_row_with_its_meaning():
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \|.*\| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE))
    assert list(rows) == [setting.key for setting in settings()]
    for setting in settings():
        assert rows[setting.key].replace("\\|", "|") == meanings(setting.owner)[setting.field.name]
    for _, owner in sections():
        assert list(meanings(owner)) == [field.name for field in dataclasses.fields(owner)]


def test_no_key_of_a_composed_configuration_is_missing():
    """Every key of the default command line and of every preset is a setting or a name inside a mapping."""
    known = {setting.key for setting in settings()}
    for preset in sorted((CONF / "experiment").glob("*.yaml")):
        for key in flat(composed(f"experiment={preset.stem}")):
            assert any(f"{key}.".startswith(f"{setting}.") for setting in known), key


@dataclass(frozen=True)
class Silent:
    """A section of which one field has no meaning."""

    first: int = 1
    """The first."""
    second: int = 2
    third: int = 3
    """The third."""


def test_a_field_without_a_string_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"Silent\.second"):
        meanings(Silent)


def refused() -> dict[str, str]:
    """Key -> the values that it accepts, as it says itself when it is given another."""
    found = {}
    config = configs.composed()
    for setting in settings():
        section: Any = config
        for part in setting.key.split(".")[:-1]:
            section = getattr(section, part)
        if setting.kind not in (str, int):
            continue
        try:
            dataclasses.replace(section, **{setting.field.name: "no such value" if setting.kind is str else 99})
        except ValueError as error:
            if " is not one of " in str(error):
                found[setting.key] = str(error).rpartition(" is not one of ")[2]
    return found


def test_the_meaning_of_a_key_names_every_value_that_it_accepts():
    accepted = refused()
    assert len(accepted) >= 17, sorted(accepted)
    texts = {setting.key: meanings(setting.owner)[setting.field.name] for setting in settings()}
    for key, values in accepted.items():
        for value in values.split(", "):
            assert f"`{value}`" in texts[key], (key, value)


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_the_words_listed_for_an_option_set_what_the_option_sets(file):
    """Composed on the command line, they give the configuration that the option gives."""
    _, words = option(file)
    group, name = file.parent.name, file.stem
    plain = [f"++{word}" if "." in word.partition("=")[0] else word for word in words if "$" not in word]
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base = ["experiment=none"] if group != "experiment" else []
        given = flat(OmegaConf.to_container(compose("config", overrides=[*base, f"{group}={name}"])))
        listed = flat(OmegaConf.to_container(compose("config", overrides=["experiment=none", *plain])))
    text = DOCUMENT.read_text()
    for word in words:
        key = word.partition("=")[0]
        if "." in key and "$" not in word:
            assert given[key] == listed[key], word
            assert f"`{word}`" in text or f" {word}" in text
