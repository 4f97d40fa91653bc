"""Engines on pages without a GPU: as with FlashInfer, but for the kernel."""

from __future__ import annotations

import pytest

from streams.backbone.kernel_choice import Choice
from tests.support.gather_attention import GatherBackend


def use_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines keep keys in pages, and gather them (`tests.support.gather_attention`)."""
    monkeypatch.setattr(
        "rollout.engine.engine.choose_rollout_attention", lambda *_: Choice("flashinfer", "for the test")
    )
    monkeypatch.setattr("rollout.engine.engine.make_backend", lambda name, pool, groups: GatherBackend(pool, groups))
