"""Masks passwords and tokens before they are printed or stored: in addresses, in settings, and those of the environment.

Pure, but for a look at the environment.

Invariants:
* the address that connects is kept in `TrackingConfig.uri` alone;
* whatever is shown, logged, or written below run_root or into MLflow has passed through one of these functions;
* the value of an environment variable that is named like a secret is masked wherever it appears.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import unquote, unquote_plus

MASK = "***"

_USER = (
    # A database's user:password@, whose password may hold a slash (SQLAlchemy reads it so): up to the last @.
    re.compile(r"((?<!http)(?<!https)(?<!sqlite)(?<!file)://)\S*@"),
    # That of any other authority, which ends at the first slash; the last @ in it counts, as for a browser.
    re.compile(r"(://)[^\s/?#]*@"),
    # A slash in such a password all the same: no port follows the colon, and an @ comes later.
    re.compile(r"(://)[^\s/?#@:]*:(?!\d{1,5}(?:\W|$))\S*@"),
)
_NAME = (
    r"(?:[\w.-]*[._-])?"
    r"(?:pass|passwd|password|passphrase|pwd|secret|token|api_?key|access_?key(?:_?id)?|signature|credentials?)"
)
_NAMED = re.compile(rf"((?:^|[\s?&;#'\"+]){_NAME}=)[^\s&;#'\"]+", re.IGNORECASE | re.MULTILINE)
_ENTRY = re.compile(rf"""((?:^\s*|[{{,]\s*)["']?{_NAME}["']?\s*:\s*)[^\s,}}]+""", re.IGNORECASE | re.MULTILINE)
"""An entry of a mapping: in YAML at the beginning of a line, in JSON, a dictionary, or Hydra's grammar within braces."""
_SECRET_KEY = re.compile(_NAME, re.IGNORECASE)
_NO_SECRETS = ("PWD",)
"""Environment variables that are only named like one."""
_SHORTEST = 8
"""Characters that a value of the environment has at least to be masked: words of a text are shorter."""
_QUERY = re.compile(r"(?<==)[^&;#]+")
_PARAMETERS = re.compile(r"(://[^\s?'\"<>]*\?)([^\s'\"<>]+)")
"""An address in a text, and its parameters."""


def redact(text: str) -> str:
    """Return free text (a log line, an error, a command line) with secrets masked.

    Masked are what precedes the @ of an address, the values of an address's parameters, whatever they are called, the
    values of other parameters and entries that are named like secrets, and the values of environment variables that are.
    Ports, hosts, paths and other settings stay.
    """
    if "://" in text:
        for pattern in _USER:
            text = pattern.sub(rf"\g<1>{MASK}@", text)
        text = _PARAMETERS.sub(lambda found: found[1] + _QUERY.sub(MASK, found[2]), text)
    if "=" in text:
        text = _NAMED.sub(rf"\g<1>{MASK}", text)
    if ":" in text:
        text = _ENTRY.sub(rf"\g<1>{MASK}", text)
    for value in _of_environment():
        text = text.replace(value, MASK)
    return text


def _of_environment() -> list[str]:
    """Return the secrets of the environment, those first that may hold another one."""
    named = (value for name, value in os.environ.items() if _SECRET_KEY.fullmatch(name) and name not in _NO_SECRETS)
    return sorted((value for value in named if len(value) >= _SHORTEST), key=len, reverse=True)


def public_uri(uri: str) -> str:
    """Return an address as it may be shown: without user, password, and the values of its parameters.

    Two addresses that differ in these alone are taken for the same store.
    """
    address, mark, query = redact(uri).partition("?")
    return address + mark + _QUERY.sub(MASK, query)


def public_words(text: str, uri: str) -> str:
    """Return free text about an address, such as a library's error that shows parts of it, with secrets masked."""
    text = redact(text)
    for value in _QUERY.findall(uri.partition("?")[2]):
        for shown in {value, unquote(value), unquote_plus(value)}:
            text = text.replace(f"={shown}", f"={MASK}")
    return text


def public_setting(key: str, value: Any) -> str:
    """Return a setting's value, as text, as it may be stored."""
    return str(stored_setting(key, value))


def stored_setting(key: str, value: Any) -> Any:
    """Return a setting's value as it may be stored: masked if its key is named like a secret (a reward term's `api_key`)."""
    if value and _SECRET_KEY.fullmatch(key):
        return MASK
    if key == "tracking.uri":
        return public_uri(value)
    return value if value is None or isinstance(value, bool | int | float) else _stored(value)


def _stored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: stored_setting(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(stored_setting("", item) for item in value)
    return redact(value) if isinstance(value, str) else value
