"""JSON as the standard has it: no NaN and no infinity, which Python writes and other readers refuse.

A number that is not finite becomes null. Where it must come back, in a checkpoint's state, it is written as
`{"$float": "inf"}` and restored by `loads`.

Invariant: what is written can be read by any JSON reader.
"""

from __future__ import annotations

import json
import math
from typing import Any

_TAG = "$float"


def dumps(value: Any, *, keep: bool = False, **options: Any) -> str:
    """Return `json.dumps` of `value`; numbers that are not finite become null or, with `keep`, what `loads` restores."""
    return json.dumps(_finite(value, keep), allow_nan=False, **options)


def loads(text: str) -> Any:
    """Return `json.loads` of `text`, with the numbers restored that `dumps(..., keep=True)` has written."""
    return json.loads(text, object_hook=lambda found: float(found[_TAG]) if set(found) == {_TAG} else found)


def _finite(value: Any, keep: bool) -> Any:
    if isinstance(value, dict):
        return {_key(key): _finite(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, keep) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: str(value)} if keep else None
    return value


def _key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
