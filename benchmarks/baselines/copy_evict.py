"""`copy_evict`: streams as ThinkStream's published engine (arXiv 2603.12938) runs them, written afresh from its description.

Specification:
* one prompt at a time: the G streams of its group are the rows of one batch, and nothing else runs beside them;
* dense caches with a column for every live token (benchmarks.baselines.decoder);
* every generation is on its own: each of the G rows has its chunk encoded by the tower and its turn prefilled. With
  `share_vision` a chunk is encoded once per prompt;
* memory is `rcsm`: before a turn's prefill the video of chunks that leave the window is evicted by copying what stays;
* a turn is prefilled in one forward, then decoded token by token until the last row's turn has ended; rows that are done idle.
  Tokens that are known in every row, forced ones, go together;
* on CUDA decode steps are CUDA graphs.

Not as published, so that its tokens are those of the engine and its speed that of the approach: END is forwarded before the
eviction of the next turn, graphs and buffers are made once and not in every training step, forced tokens share a forward,
nothing is converted between text and ids.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.baselines.decoder import DenseDecoder, Stopwatch
from streams.backbone.backbone import Backbone
from streams.layout.turn_state import TurnState
from streams.log.record import Kind
from streams.writing.writer import TurnInput

TEXT = -1
"""In `_Row.shown`: the column is text, or its row's padding."""


@dataclass
class Generated:
    """What one prompt's group wrote. ids: [row][turn] -> ids, forced ones included.

    Attributes:
        turn_seconds: of each turn, vision included.
        seconds: CPU seconds by part ("linear", "attention", "tower", "cache copies"), with the whole under "all"; measured on a
            CPU with one thread only.
        sampled, forwarded: tokens drawn, and columns times rows forwarded.
        copied, live: bytes of keys and values that eviction copied, and the most that were live.
    """

    ids: list[list[list[int]]]
    turn_seconds: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    sampled: int = 0
    forwarded: int = 0
    copied: int = 0
    live: int = 0
    chunks_encoded: int = 0

    @property
    def host_share(self) -> float | None:
        """Share of the time outside linear layers, attention, tower and cache copies; None where it is not measured."""
        if not self.seconds:
            return None
        return 1 - sum(s for part, s in self.seconds.items() if part != "all") / self.seconds["all"]


class CopyEvict:
    """Runs groups of streams, one prompt after the other. See the module docstring."""

    def __init__(self, backbone: Backbone, window: int, patch_seconds: float, *, share_vision: bool = False) -> None:
        self._backbone, self._window, self._patch_seconds = backbone, window, patch_seconds
        self._share_vision = share_vision

    @torch.no_grad()
    def run(
        self, turns: Sequence[TurnInput], frames: np.ndarray, rows: int, *, temperature: float, seed: int = 0
    ) -> Generated:
        """One prompt. frames: uint8 [chunks, frames, h, w, 3]; temperature 0 takes the largest logit."""
        cuda = self._backbone.device.type == "cuda"
        watch = Stopwatch(not cuda and torch.get_num_threads() == 1)
        group = _Group(self._backbone, turns, rows, self._window, self._patch_seconds, watch)
        group.sampler = _Sampler(temperature, seed, self._backbone.device)
        began = time.thread_time()
        chunk = 0
        for turn in turns:
            turn_began = time.perf_counter()
            features = None
            if turn.chunk is not None:
                features = watch("tower", self._encode, frames[chunk : chunk + 1], rows)
                chunk += 1
            group.turn(turn, features)
            if cuda:
                torch.cuda.synchronize()
            group.made.turn_seconds.append(time.perf_counter() - turn_began)
        made = group.made
        if watch.seconds:
            made.seconds = {**watch.seconds, "all": time.thread_time() - began}
        made.chunks_encoded = chunk * (1 if self._share_vision else rows)
        made.copied = group.decoder.copied
        return made

    def _encode(self, frames: np.ndarray, rows: int) -> torch.Tensor:
        """Features [1 or rows, tokens, H] of one chunk."""
        times = 1 if self._share_vision else rows
        return torch.cat(self._backbone.encode_video([frames] * times))


class _Sampler:
    """Draws one id per row of logits [rows, V]."""

    def __init__(self, temperature: float, seed: int, device: torch.device) -> None:
        self._temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> list[int]:
        if self._temperature == 0:
            return logits.argmax(-1).tolist()
        # By the inverse CDF: torch.multinomial draws a number per id of the vocabulary.
        edges = torch.softmax(logits / self._temperature, -1).cumsum(-1)
        draws = torch.rand((len(logits), 1), device=logits.device, generator=self._generator)
        return torch.searchsorted(edges, draws * edges[:, -1:], right=True)[:, 0].tolist()


class _Group:
    """The rows of one prompt and their caches."""

    def __init__(
        self,
        backbone: Backbone,
        turns: Sequence[TurnInput],
        rows: int,
        window: int,
        patch_seconds: float,
        watch: Stopwatch,
    ) -> None:
        self._layout, self._device, self._window = backbone.layout, backbone.device, window
        self.decoder = DenseDecoder(backbone, rows, self._bound(turns), watch)
        self._cursors = [backbone.cursor(patch_seconds) for _ in range(rows)]
        # Column by column: the turn whose chunk it shows or TEXT, and which rows have a token there.
        self._shown = np.full((rows, self.decoder.columns), TEXT, np.int64)
        self._valid = np.zeros((rows, self.decoder.columns), bool)
        self._turn = -1
        self._states: list[TurnState] = []
        self.sampler: _Sampler
        self.made = Generated([[] for _ in range(rows)])

    def _bound(self, turns: Sequence[TurnInput]) -> int:
        """Columns that can be live at once: all text, and the video of the window."""
        text, video = len(self._layout.system_ids), 0
        for turn in turns:
            for part in self._layout.prefill(turn.chunk, None if turn.query is None else list(turn.query.ids)):
                size = len(part.ids)
                text, video = (text, max(video, size)) if part.kind == Kind.VIDEO else (text + size, video)
            text += self._layout.config.max_new_tokens
        return text + min(len(turns), self._window) * video

    def turn(self, turn: TurnInput, features: torch.Tensor | None) -> None:
        """Evict, prefill and decode one turn of every row."""
        self._turn += 1
        if features is not None:
            self._evict()
        logits = self._prefill(turn, features)
        rows = range(self.decoder.rows)
        self._states = [TurnState(self._layout.tokens, self._layout.config) for _ in rows]
        for row in rows:
            self.made.ids[row].append([])
        pending: list[list[int]] = [[] for _ in rows]
        while True:
            self._choose(logits, pending)
            left = [len(tokens) for tokens in pending if tokens]
            if not left:
                break
            logits = self._decode([tokens[: min(left)] for tokens in pending])
            for tokens in pending:
                del tokens[: min(left)]
        self.made.live = max(self.made.live, self.decoder.live_bytes)

    def _choose(self, logits: torch.Tensor, pending: list[list[int]]) -> None:
        """Give every row that runs and has nothing to forward its next token, and the forced ones behind it."""
        waiting = [row for row, state in enumerate(self._states) if not pending[row] and not state.over]
        drawn: list[int] | None = None
        for row in waiting:
            state = self._states[row]
            while not state.over:
                token = state.forced()
                if token is None:
                    if pending[row]:
                        break
                    drawn = self.sampler(logits) if drawn is None else drawn
                    token = drawn[row]
                    self.made.sampled += 1
                pending[row].append(token)
                state.advance([token])
            self.made.ids[row][-1] += pending[row]

    def _evict(self) -> None:
        """Copy what stays once the video of the oldest chunk leaves the window."""
        length = self.decoder.length
        shown, valid = self._shown[:, :length], self._valid[:, :length]
        stays = valid & ((shown == TEXT) | (shown > self._turn - self._window))
        if stays.sum() == valid.sum():
            return
        counts = stays.sum(1)
        # Stable: columns that stay come first, in their order; shorter rows are filled up with columns that do not count.
        keep = np.argsort(~stays, axis=1, kind="stable")[:, : counts.max()]
        self._shown[:, : keep.shape[1]] = np.take_along_axis(shown, keep, 1)
        self._valid[:, : keep.shape[1]] = np.arange(keep.shape[1]) < counts[:, None]
        same = (stays == stays[0]).all()
        self.decoder.evict(torch.from_numpy(keep[0] if same else keep).to(self._device))

    def _prefill(self, turn: TurnInput, features: torch.Tensor | None) -> torch.Tensor:
        parts = self._layout.prefill(turn.chunk, None if turn.query is None else list(turn.query.ids))
        ids = [] if self._turn else [np.asarray(self._layout.system_ids)]
        positions = [[] if self._turn else [cursor.text(len(ids[0]))] for cursor in self._cursors]
        video = None
        for part in parts:
            at = sum(len(piece) for piece in ids)
            if part.kind == Kind.VIDEO and features is not None:
                video = (at, features)
                start = self.decoder.length + at
                self._shown[:, start : start + len(part.ids)] = self._turn
            ids.append(part.ids)
            for row, cursor in zip(positions, self._cursors, strict=True):
                row.append(cursor.text(len(part.ids)) if part.grid is None else cursor.video(part.grid, part.keep))
        row_ids = np.concatenate(ids).astype(np.int64)
        places = np.stack([np.concatenate(row, axis=1) for row in positions], axis=1)
        return self._forward(np.tile(row_ids, (len(positions), 1)), places, np.ones(len(positions), bool), video)

    def _decode(self, tokens: list[list[int]]) -> torch.Tensor:
        """Forward tokens of the rows that have some, all as many; the others' columns are padding."""
        width = max(len(row) for row in tokens)
        runs = np.array([bool(row) for row in tokens])
        ids = np.array([row or [0] * width for row in tokens], np.int64)
        nowhere = np.zeros((3, width), np.int32)
        places = [c.text(width) if run else nowhere for c, run in zip(self._cursors, runs, strict=True)]
        return self._forward(ids, np.stack(places, axis=1), runs, None)

    def _forward(
        self, ids: np.ndarray, places: np.ndarray, runs: np.ndarray, video: tuple[int, torch.Tensor] | None
    ) -> torch.Tensor:
        start, stop = self.decoder.length, self.decoder.length + ids.shape[1]
        self._valid[:, start:stop] = runs[:, None]
        if video is None:
            self._shown[:, start:stop] = TEXT
        whole = bool(self._valid[:, :stop].all())
        valid = None if whole else torch.from_numpy(self._valid[:, :stop].copy()).to(self._device)
        self.made.forwarded += ids.size
        return self.decoder.forward(
            torch.from_numpy(ids).to(self._device),
            torch.from_numpy(places.astype(np.int64)).to(self._device),
            valid,
            video,
        )
