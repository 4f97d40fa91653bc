"""How the categories of rows, which are anybody's words, are called in results.

Pure, and quick to import. Invariant: one name each, none of them empty or the name of the mean over all.
"""

from __future__ import annotations

from runtime.tracking.metric_names import apart

ALL = "all"
"""The mean over every category, beside the categories' own."""
UNCATEGORISED = "uncategorised"
"""The category of rows that name none."""


def category_name(category: str) -> str:
    """The name of a row's category in tables and in summary.json; `metric_name` makes metrics of it."""
    return apart(category, (ALL, UNCATEGORISED), " (category)") or UNCATEGORISED
