"""Contiguous positions by their definition: the position of each key, and a slow engine that lays every turn out anew.

No code shared with the book-keeping, the pool or the learner's plans: regions from the policy's words, positions by counting,
and keys rotated anew, all of them, by absolute positions.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from rollout.engine.request import StreamRequest
from streams.backbone.backbone import Backbone, VideoTokens
from streams.log.record import GENERATED_TEXT, Kind, StreamLog
from streams.memory import MemoryConfig
from streams.positions.regions import Region
from streams.writing.writer import TurnInput
from tests.support.exactness.backbones import forward_as


def angles_in_float64():
    """Make the model's own rotary module, which computes float32 angles, compute them in fp64 for fp64 proofs."""

    def forward(self, x, position_ids):
        angles = position_ids.expand(3, -1, -1)[..., None].double() * self.inv_freq.double()
        cos, sin = (self.recomposition_frequencies(f(angles).clone()) for f in (torch.cos, torch.sin))
        return cos.to(x.dtype), sin.to(x.dtype)

    return forward_as((Qwen2_5_VLRotaryEmbedding, Qwen3VLTextRotaryEmbedding), forward)


def region_of(log: StreamLog, turns: tuple[TurnInput, ...], memory: MemoryConfig, turn: int) -> dict[int, Region]:
    """Return log index -> region of every token of earlier turns that is live in `turn`."""
    start = int(np.flatnonzero(log.turn == turn)[0])
    spoken = [i for i in range(len(log)) if log.kind[i] in GENERATED_TEXT]
    with_video = [t for t in range(turn + 1) if turns[t].chunk is not None]
    left = with_video[: max(0, len(with_video) - memory.window)]
    found = {}
    for i in np.flatnonzero(log.expiry[:start] > start):
        of = int(log.turn[i])
        if log.kind[i] == Kind.SYSTEM:
            region = Region.SYSTEM
        elif of <= turn - memory.text_window and log.kind[i] == Kind.QUERY:
            region = Region.PINNED
        elif of <= turn - memory.text_window and log.kind[i] in GENERATED_TEXT:
            region = Region.SINK if spoken.index(i) < memory.sink_tokens else Region.TAIL
        elif left and of <= left[-1]:
            region = Region.TEXT
        else:
            region = Region.RETAINED
        found[int(i)] = region
    return found


def layout_of(log: StreamLog, turns: tuple[TurnInput, ...], memory: MemoryConfig) -> list[dict[int, np.ndarray]]:
    """Return, for each turn, log index -> contiguous position int [3] of every live key, the turn's own included."""
    made, pinned = [], {}
    for turn in range(log.num_turns):
        region = region_of(log, turns, memory, turn)
        placed, base = {}, 0
        for r in (Region.SYSTEM, Region.PINNED, Region.SINK, Region.TAIL, Region.TEXT):
            members = [i for i in sorted(region) if region[i] == r]
            if r == Region.PINNED:
                # The only region that tokens may leave from the middle: those that stay keep their distances.
                pinned = {i: at for i, at in pinned.items() if i in members}
                for i in members:
                    pinned.setdefault(i, max(pinned.values(), default=-1) + 1)
                at = {i: pinned[i] - min(pinned.values()) for i in members}
            else:
                at = {i: n for n, i in enumerate(members)}
            placed |= {i: np.full(3, base + n) for i, n in at.items()}
            base += max(at.values(), default=-1) + 1
        retained = [i for i in sorted(region) if region[i] == Region.RETAINED]
        retained += np.flatnonzero(log.turn == turn).tolist()
        origin = int(log.positions[:, retained[0]].min())
        made.append(placed | {i: log.positions[:, i] - origin + base for i in retained})
    return made


class SlowPlan:
    """Keeps un-rotated keys and values of every token; attends for one run of tokens under one layout."""

    def __init__(self, backbone: Backbone, layers: int) -> None:
        self.backbone = backbone
        self.keys = [[] for _ in range(layers)]
        self.values = [[] for _ in range(layers)]
        self.tokens: list[int] = []

    def begin(self, log: StreamLog, layout: dict[int, np.ndarray], span: range) -> None:
        self.tokens += list(span)
        position = {i: layout.get(i, np.zeros(3, int)) for i in self.tokens}
        self.live = torch.tensor([[k in layout and k <= q for k in self.tokens] for q in span])
        key = np.stack([position[i] for i in self.tokens], axis=1)
        self.key = self.angles(key)
        self.query = tuple(t[-len(span) :] for t in self.key)

    def angles(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the angles by the model's own module. Call it with that module's angles in fp64."""
        rotary = self.backbone.model.model.language_model.rotary_emb
        cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.from_numpy(positions).long()[:, None])
        return cos[0], sin[0]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        self.keys[layer].append(k[0])
        self.values[layer].append(v[0])
        keys, values = torch.cat(self.keys[layer], dim=1), torch.cat(self.values[layer], dim=1)
        groups = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(groups, dim=0) for t in (_turned(keys, self.key), values))
        scores = _turned(q[0], self.query) @ keys.transpose(1, 2) * scaling
        return (scores.masked_fill(~self.live, -torch.inf).softmax(-1) @ values).transpose(0, 1)[None]


def _turned(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * angles[0] + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * angles[1]


def slow_logps(
    backbone: Backbone, log: StreamLog, request: StreamRequest, memory: MemoryConfig, cut: int = 0, swap=None
) -> torch.Tensor:
    """Return the log-probs of the sampled tokens, in order, with gradient. `swap` is called before token `cut` is forwarded."""
    plan = SlowPlan(backbone, backbone.num_layers)
    features = torch.cat(request.features)
    video_before = np.concatenate([[0], np.cumsum(log.kind == Kind.VIDEO)])
    found = []
    with angles_in_float64():
        for turn, layout in enumerate(layout_of(log, request.turns, memory)):
            inside = np.flatnonzero(log.turn == turn)
            first, stop = int(inside[0]), int(inside[-1]) + 1
            middle = min(max(cut, first), stop)
            for begin, end in ((first, middle), (middle, stop)):
                if end > begin:
                    if swap is not None and begin == cut:
                        swap()
                    plan.begin(log, layout, range(begin, end))
                    found.append(_forward(backbone, plan, log, features, video_before, begin, end))
    hidden = torch.cat(found)
    sampled = np.flatnonzero(log.sampled)
    logits = backbone.logits(hidden[sampled - 1], log.header.score_temperature)
    return logits.log_softmax(-1)[torch.arange(len(sampled)), torch.from_numpy(log.ids[sampled]).long()]


def _forward(backbone, plan, log, features, video_before, begin, end) -> torch.Tensor:
    ids = torch.from_numpy(log.ids[begin:end].astype(np.int64))[None]
    index = torch.from_numpy(np.flatnonzero(log.kind[begin:end] == Kind.VIDEO))
    video = VideoTokens(index, features[video_before[begin] : video_before[end]]) if len(index) else None
    return backbone.hidden(ids, torch.zeros((3, 1, end - begin), dtype=torch.long), plan, video)[0]
