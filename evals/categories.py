"""Names of categories in results. Categories are words from the rows, so anything may be in them. Pure.

Invariants:
* different categories have different names;
* no name is empty, or equal to that of the mean over all.
"""

from __future__ import annotations

from runtime.tracking.metric_names import apart

ALL = "all"
"""The mean over every category, beside the categories' own."""
UNCATEGORISED = "uncategorised"
"""The category of rows that name none."""


def category_name(category: str) -> str:
    """Return a category's name in tables and in summary.json; `metric_name` turns it into a metric's name."""
    return apart(category, (ALL, UNCATEGORISED), " (category)") or UNCATEGORISED
