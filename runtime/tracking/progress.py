"""Progress on the terminal: one line per event."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from streams.support.terminal import visible

PLAIN_LINES = 40
"""Largest number of lines that one stage prints where there is no terminal."""


class Progress:
    """One line per event: rewritten in place on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        # A path is shown as it is: neither `[x]` nor `:x:` in it means anything.
        self.console = Console(highlight=False, markup=False, emoji=False)
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._open = False

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._close_line()
        self.console.print(f"[{time.monotonic() - self._began:6.1f}s] {visible(text)}", soft_wrap=True)

    def step(self, stage: str, done: int, total: int, values: dict[str, float | None]) -> None:
        """Show the progress of a stage."""
        shown = "  ".join(f"{k} {v:.3g}" for k, v in values.items() if v is not None)
        text = f"[{time.monotonic() - self._began:6.1f}s] {stage} {done}/{total}  {shown}"
        if not self._live:
            if done == 1 or done == total or done % max(1, total // PLAIN_LINES) == 0:
                self.console.print(text, soft_wrap=True)
            return
        sys.stdout.write("\r\x1b[2K" + text[: self.console.width - 1])
        sys.stdout.flush()
        self._open = True
        if done == total:
            self._close_line()

    def _close_line(self) -> None:
        if self._open:
            sys.stdout.write("\n")
            self._open = False
