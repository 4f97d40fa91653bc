"""JSON as the standard has it: no NaN and no infinity, which Python writes and other readers refuse.

Invariant: whatever numbers a value holds, what is written can be read by any JSON reader. A number that is
not finite becomes null, "there is no such number"; where it must come back, in a checkpoint's state, it is written as
`{"$float": "inf"}` and read by `loads`.
"""

from __future__ import annotations

import json
import math
from typing import Any

_TAG = "$float"


def dumps(value: Any, *, keep: bool = False, **options: Any) -> str:
    """`json.dumps` of `value`, where numbers that are not finite become null, or (keep) what `loads` reads back."""
    return json.dumps(_finite(value, keep), allow_nan=False, **options)


def loads(text: str) -> Any:
    """`json.loads`, with the numbers back that `dumps(..., keep=True)` has written."""
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
