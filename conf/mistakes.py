"""Explains a command line that Hydra cannot compose, in one line that names value, key and remedy.

Pure: takes the error and the words that were typed, returns a sentence. Hydra itself prints a page about its search path, or
"expecting <EOF>" without the word at fault.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException

from conf.paths import GROUPS, group_options
from conf.reference import settings


def explain(error: Exception, words: Sequence[str]) -> str:
    """Return the explanation of `error`. words: the command line as it was typed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if (GROUPS / group).is_dir() and group:
            known = group_options(group, words)
            return f"{group}={option}: there is no such option{_close(option, known)}; {group} is one of {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read ({_first_line(error)}); write KEY=VALUE, and quotes inside quotes around "
            "a value with spaces, commas, brackets or equals signs: 'KEY=\"a, b\"'"
        )
    wrong = re.match(r"Could not override '([^']*)'", str(error))
    if isinstance(error, ConfigCompositionException) and wrong:
        return _no_such_key(wrong[1], words)
    if str(error).startswith("Config group override must be a string"):
        groups = [word for word in words if (GROUPS / word.partition("=")[0]).is_dir() and "=" in word]
        return f"{' '.join(groups)}: a group takes the name of an option ({_joined(error)})"
    return _joined(error)


def _no_such_key(key: str, words: Sequence[str]) -> str:
    typed = next((word for word in words if word.lstrip("+~").partition("=")[0] == key), key)
    kinds = {setting.key: setting.kind for setting in settings()}
    every = tuple(kinds)
    # Only a configuration of the user's own (--config-name) can lack these.
    if (GROUPS / key).is_dir() and "." not in key and not typed.partition("=")[2].startswith("{"):
        return (
            f"{typed}: this configuration chooses no option of {key}; with a plus in front it is laid over it: +{typed}"
        )
    if _section(key, every):  # a mapping given for a whole section: the wrong name is inside it
        return f"{typed}: names a key that {key} does not have; it has {_section(key, every)}"
    if key in ("video", "query", "at", "seconds"):
        return f"{typed}: there is no such key; {key}= goes with job=watch"
    open_ = [known for known, kind in kinds.items() if typing.get_origin(kind) is dict]
    own = next((known for known in open_ if f"{key}.".startswith(f"{known}.")), "")
    if own:  # a mapping whose names are the user's: Hydra adds to it only when told so
        return f"{typed}: {own} has no such name yet; with a plus in front it is added: +{typed}"
    if key in every:
        return (
            f"{typed}: this configuration does not have the key; write `defaults: [config, _self_]` into it to extend "
            f"Sightline's own, or add the key: +{typed}"
        )
    section, _, name = key.rpartition(".")
    namesakes = [known for known in every if known.rpartition(".")[2] == name]
    hint = f" (did you mean {' or '.join(namesakes)}?)" if namesakes else _close(key, every)
    inside = _section(section, every) if section else ""
    return f"{typed}: there is no such key{hint}" + (f"; {section} has {inside}" if inside else "")


def _section(section: str, every: Sequence[str]) -> str:
    """Return the names in a section; '' if there is no such section."""
    below = [key.removeprefix(f"{section}.") for key in every if key.startswith(f"{section}.")]
    return ", ".join(dict.fromkeys(key.partition(".")[0] for key in below))


def _close(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The parser's "Error parsing override 'job'" repeats the word.
    return next((line for line in lines if not line.startswith("Error parsing override")), str(error))


def _joined(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
