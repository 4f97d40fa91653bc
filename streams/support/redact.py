"""Masks passwords and tokens in addresses before they are printed or stored.

Pure.

Invariants:
* the address that connects is kept in `TrackingConfig.uri` alone;
* whatever is shown, logged, or written below run_root or into MLflow has passed through one of these functions.
"""

from __future__ import annotations

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
    r"(?:[\w.-]*[._-])?(?:pass|passwd|password|passphrase|pwd|secret|token|api_?key|access_?key|signature|credentials?)"
)
_NAMED = re.compile(rf"((?:^|[\s?&;#'\"+]){_NAME}=)[^\s&;#'\"]+", re.IGNORECASE | re.MULTILINE)
_SECRET_KEY = re.compile(_NAME, re.IGNORECASE)
_QUERY = re.compile(r"(?<==)[^&;#]+")
_PARAMETERS = re.compile(r"(://[^\s?'\"<>]*\?)([^\s'\"<>]+)")
"""An address in a text, and its parameters."""


def redact(text: str) -> str:
    """Return free text (a log line, an error, a command line) with secrets masked.

    Masked are what precedes the @ of an address, the values of an address's parameters, whatever they are called, and the
    values of other parameters that are named like secrets. Ports, hosts, paths and other settings stay.
    """
    if "://" in text:
        for pattern in _USER:
            text = pattern.sub(rf"\g<1>{MASK}@", text)
        text = _PARAMETERS.sub(lambda found: found[1] + _QUERY.sub(MASK, found[2]), text)
    return _NAMED.sub(rf"\g<1>{MASK}", text) if "=" in text else text


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
    """Return a setting's value as it may be stored: masked if its key is named like a secret (a reward term's `api_key`)."""
    if value and _SECRET_KEY.fullmatch(key):
        return MASK
    return public_uri(value) if key == "tracking.uri" else redact(str(value))
