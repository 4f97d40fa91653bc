"""Strict reading of one JSON line: every value is fetched by type, every message names its field.

Shared by the formats of `streams.data.dataset`.

Invariants:
* nothing is guessed: unknown and repeated fields, wrong types, NaN and infinity raise ValueError;
* a message names the field; the caller adds file and line.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from streams.support.paths import expand_home

MAX_TEXT_BYTES = 2**16
"""Bytes of one text of a row, and of its questions together: some 16,000 tokens, which a turn could not hold anyway."""
MAX_LINE_BYTES = 2**24
"""Bytes of a row. A demonstration of two hours with a thought a second takes a tenth of it."""


def parse_line(line: str, ignore: Collection[str] = ()) -> Any:
    """Return the JSON value of one line, without the fields named in `ignore`, at any depth.

    Raises ValueError for a line that is not strict JSON in UTF-8, or longer than a row may be.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"the row has {len(line):,} characters, more than {MAX_LINE_BYTES:,}: it holds more than one stream"
        )
    if "\ufffd" in line:
        raise ValueError("the line holds bytes that are not UTF-8")
    try:
        # Some editors open a file with a byte order mark.
        value = json.loads(line.removeprefix("\ufeff"), parse_constant=_no_constant, object_pairs_hook=_unique_keys)
        return _without(value, frozenset(ignore)) if ignore else value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # Python's own advice is for programmers
            raise ValueError("a number has too many digits") from None
        raise
    except RecursionError:
        raise ValueError("not a task: JSON nested too deeply") from None


class Fields:
    """A JSON object whose values are fetched by type. where: the object's place in the row, '' for the row itself.

    A method raises ValueError, with the field's name and value, if a field without a default is missing or has another
    type.
    """

    def __init__(self, value: Any, where: str, allowed: set[str]) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the row'} must be an object, not {shown(value)}")
        unknown = sorted(value.keys() - allowed)
        if unknown:
            raise ValueError(
                f"unknown field {self._name(unknown[0])} (known: {', '.join(sorted(allowed))}; if it has no meaning here, "
                "name it in data.ignore_fields)"
            )
        self._values: Mapping[str, Any] = value

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _get(self, key: str, default: Any) -> Any:
        if key in self._values:
            return self._values[key]
        if default is None:
            raise ValueError(f"{self._name(key)} is missing")
        return default

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self._name(key)} must be a number, not {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{self._name(key)} must be a finite number, it overflows")
        return number

    def seconds(self, key: str, default: float | None = None) -> float:
        """Return a finite number, also from a string that spells one, as in the timestamps of some files."""
        value = self._get(key, default)
        if not isinstance(value, str):
            return self.number(key, default)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{self._name(key)} must be a number of seconds, not {shown(value)}")
        return number

    def integer(self, key: str, default: int) -> int:
        """Return a whole number, written as one: 3.0 is refused."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self._name(key)} must be a whole number, not {shown(value)}")
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean, False if the field is missing."""
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self._name(key)} must be true or false, not {shown(value)}")
        return value

    def text(self, key: str, default: str | None = None, *, empty: bool = False) -> str:
        """Return a string that can be encoded. empty: whether it may be blank."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{self._name(key)} must be a string, not {shown(value)}")
        if not empty and not value.strip():
            raise ValueError(f"{self._name(key)} is empty")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{self._name(key)} contains half of a surrogate pair: {shown(value)}") from None
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"{self._name(key)} has {size:,} bytes, a text of a row may have {MAX_TEXT_BYTES:,}")
        return value

    def path(self, key: str) -> str:
        """Return a text that is a path, with a leading `~` expanded to the home folder."""
        text = self.text(key)
        if "\0" in text:
            raise ValueError(f"{self._name(key)}={shown(text)} contains a NUL, which no path may")
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise ValueError(
                f"{self._name(key)}={shown(text)} cannot be a file here: Python encodes file names in "
                f"{sys.getfilesystemencoding()} (set LC_ALL=C.UTF-8, or PYTHONUTF8=1)"
            ) from None
        try:
            return expand_home(text)
        except ValueError as error:
            raise ValueError(f"{self._name(key)}={error}") from None

    def items(self, key: str, allowed: set[str], *, optional: bool = False) -> Iterator[Fields]:
        """Yield the objects of a list. allowed: the fields that they may have. optional: a missing list is empty."""
        value = self._get(key, [] if optional else None)
        if not isinstance(value, list):
            raise ValueError(f"{self._name(key)} must be a list, not {shown(value)}")
        for i, item in enumerate(value):
            yield Fields(item, f"{self._name(key)}[{i}]", allowed)

    def has(self, key: str) -> bool:
        """Return whether the object has the field."""
        return key in self._values


def shown(value: Any) -> str:
    """Return a value as JSON for a message, cut to 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that a task can contain")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice} appears twice in one object")
    return found
