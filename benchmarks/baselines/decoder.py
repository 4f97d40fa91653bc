"""A dense-cache decoder over a backbone's own weights: the text model written out, without transformers around it.

Specification:
* G rows share one set of dense caches, [layers, 2, G, KV heads, columns, head dimension]; a column is one place in time, and a
  row that has no token there is masked there;
* a forward appends n columns to all rows, writes their keys and values, and attends over all columns so far;
* keys are kept rotated, at the positions that they were given once;
* eviction gathers the columns that stay into a second buffer, and the two change places: every live key and value is copied;
* on CUDA a step of one column runs as a CUDA graph, one for each buffer and each multiple of GRAPH_COLUMNS.

Invariant: the arithmetic is that of transformers' module, token by token (Qwen2.5-VL only); the batching is its own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from streams.backbone.backbone import Backbone

GRAPH_COLUMNS = 256


class Stopwatch:
    """Seconds of this thread's CPU time by part, of calls that do not overlap: what else the machine does is not in it.

    Idle where it would not be the truth: on CUDA a call only starts work, and with several threads others do a part.
    """

    def __init__(self, running: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = running

    def __call__(self, part: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if not self._running:
            return function(*given, **named)
        began = time.thread_time()
        made = function(*given, **named)
        self.seconds[part] += time.thread_time() - began
        return made


class DenseDecoder:
    """The text model of one backbone for `rows` rows and up to `columns` live columns. See the module docstring.

    Attributes:
        length: columns in use.
        copied: bytes of keys and values that evictions have copied.
    """

    def __init__(self, backbone: Backbone, rows: int, columns: int, watch: Stopwatch) -> None:
        """Raises ValueError for a backbone whose text model has another arithmetic."""
        if backbone.name != "qwen2_5_vl":
            raise ValueError(f"the dense decoder computes qwen2_5_vl, this checkpoint is {backbone.name}")
        self._backbone, self._watch = backbone, watch
        model = backbone.model.model.language_model
        self._layers, self._norm = list(model.layers), model.norm
        self._kv_heads, self._head_dim = backbone.kv_shape
        self._heads = int(model.config.num_attention_heads)
        self._banned = torch.tensor(backbone.layout.banned, dtype=torch.long, device=backbone.device)
        shape = (len(self._layers), 2, rows, self._kv_heads, columns, self._head_dim)
        self._buffers = [torch.zeros(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(2)]
        self._front = 0
        self.rows, self.columns, self.length, self.copied = rows, columns, 0, 0
        self._graphs: dict[tuple[int, int], _StepGraph] = {}

    @property
    def live_bytes(self) -> int:
        """Bytes of the keys and values in use."""
        return self._buffers[0][..., : self.length, :].numel() * self._backbone.dtype.itemsize

    def evict(self, keep: torch.Tensor) -> None:
        """Keep these columns, int64 [m] of all rows or [rows, m] row by row, in this order."""
        self._watch("cache copies", self._gather, keep)
        self.length = keep.shape[-1]
        self.copied += self.live_bytes
        self._front = 1 - self._front

    def _gather(self, keep: torch.Tensor) -> None:
        source, target = (self._buffers[i][..., : self.columns, :] for i in (self._front, 1 - self._front))
        for layer in range(len(self._layers)):
            kept = target[layer, ..., : keep.shape[-1], :]
            if keep.ndim == 1:
                torch.index_select(source[layer], -2, keep, out=kept)
            else:
                index = keep[None, :, None, :, None].expand(2, -1, self._kv_heads, -1, self._head_dim)
                torch.gather(source[layer], -2, index, out=kept)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        video: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Append ids int64 [rows, n] at positions int64 [3, rows, n]; return the last column's logits, fp32 [rows, V].

        valid: bool [rows, columns so far + n], where each row has a token; None if everywhere.
        video: the first of the new columns that show a chunk, and their features [rows or 1, tokens, H].
        """
        x = self._backbone.embed(ids)
        if video is not None:
            first, features = video
            x[:, first : first + features.shape[1]] = features
        tables = self._backbone.rotary.tables(positions, x.dtype)
        if x.is_cuda and ids.shape[1] == 1:
            x = self._step(x, tables, valid)
        else:
            x = self._eager(x, tables, self._mask(ids.shape[1], valid, x))
        self.length += ids.shape[1]
        return self._logits(x[:, -1])

    def _eager(self, x: torch.Tensor, tables: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        start, stop = self.length, self.length + x.shape[1]
        buffer = self._buffers[self._front]

        def write(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
            buffer[layer, 0, :, :, start:stop] = k
            buffer[layer, 1, :, :, start:stop] = v

        return self._run(x, tables, mask, write, buffer[..., :stop, :])

    def _step(self, x: torch.Tensor, tables: tuple[torch.Tensor, ...], valid: torch.Tensor | None) -> torch.Tensor:
        limit = min(self.columns, -(-(self.length + 1) // GRAPH_COLUMNS) * GRAPH_COLUMNS)
        key = (self._front, limit)
        if key not in self._graphs:
            self._graphs[key] = _StepGraph(self, self._buffers[self._front][..., :limit, :], x, tables)
        return self._graphs[key].replay(x, tables, self.length, valid)

    def _mask(self, n: int, valid: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        """What to add to the scores, [1 or rows, 1, query heads per KV head * n, columns]; None if nothing."""
        total = self.length + n
        if valid is None and n == 1:
            return None
        seen = torch.ones((n, total), dtype=torch.bool, device=x.device).tril(self.length)[None]
        if valid is not None:
            seen = seen & valid[:, None, :]
        added = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, float("-inf"))
        return added.repeat(1, self._heads // self._kv_heads, 1)[:, None]

    def _run(
        self,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None,
        write: Callable[[int, torch.Tensor, torch.Tensor], None],
        kv: torch.Tensor,
    ) -> torch.Tensor:
        """All layers: x [rows, n, H] -> [rows, n, H] before the last norm, over the columns of kv."""
        rows, n, _ = x.shape
        watch = self._watch
        cos, sin = (table[:, :, None] for table in tables)
        # What rotates the second half into the first is minus sine there: one product less than a concatenation.
        half = self._head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        linear = lambda module, y: watch("linear", F.linear, y, module.weight, module.bias)  # noqa: E731
        for index, layer in enumerate(self._layers):
            attention, mlp = layer.self_attn, layer.mlp
            y = _norm(x, layer.input_layernorm)
            q = linear(attention.q_proj, y).view(rows, n, self._heads, self._head_dim)
            k = linear(attention.k_proj, y).view(rows, n, self._kv_heads, self._head_dim)
            v = linear(attention.v_proj, y).view(rows, n, self._kv_heads, self._head_dim)
            q, k = (torch.addcmul(t * cos, t.roll(half, -1), sin) for t in (q, k))
            watch("cache copies", write, index, k.transpose(1, 2), v.transpose(1, 2))
            mixed = watch("attention", self._attend, q, kv[index], mask)
            x = watch("linear", _added, x, attention.o_proj, mixed)
            y = _norm(x, layer.post_attention_layernorm)
            gated = F.silu(linear(mlp.gate_proj, y), inplace=True).mul_(linear(mlp.up_proj, y))
            x = watch("linear", _added, x, mlp.down_proj, gated)
        return x

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q [rows, n, heads, D] over kv [2, rows, KV heads, columns, D] -> [rows, n, heads * D]."""
        rows, n, heads, dim = q.shape
        # Query heads of one KV head become extra queries: no key is repeated.
        q = q.view(rows, n, self._kv_heads, -1, dim).permute(0, 2, 3, 1, 4).reshape(rows, self._kv_heads, -1, dim)
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=mask)
        return mixed.view(rows, self._kv_heads, -1, n, dim).permute(0, 3, 1, 2, 4).reshape(rows, n, heads * dim)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        head = self._backbone.model.lm_head
        logits = self._watch("linear", F.linear, _norm(x, self._norm), head.weight, head.bias)
        return logits.float().index_fill_(-1, self._banned, float("-inf"))


def _added(x: torch.Tensor, module: Any, y: torch.Tensor) -> torch.Tensor:
    """Return x + module(y), the sum within the matrix product; both are [..., width], and the module has no bias."""
    return torch.addmm(x.flatten(0, -2), y.flatten(0, -2), module.weight.t()).view(x.shape)


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """RMSNorm of x [..., H]; on a CPU by the vector norm, in half the passes of torch's own."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    size = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(size).add_(module.variance_epsilon).rsqrt_()
    return (x * scale.to(x.dtype)).mul_(module.weight)


class _StepGraph:
    """One step of one column as a CUDA graph over one buffer: what changes from step to step lies in static tensors."""

    def __init__(
        self, decoder: DenseDecoder, kv: torch.Tensor, x: torch.Tensor, tables: tuple[torch.Tensor, ...]
    ) -> None:
        self._x, self._tables = x.clone(), tuple(table.clone() for table in tables)
        self._column = torch.zeros(1, dtype=torch.long, device=x.device)
        self._mask = x.new_full((x.shape[0], 1, 1, kv.shape[-2]), float("-inf"))

        def write(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
            kv[layer, 0].index_copy_(2, self._column, k)
            kv[layer, 1].index_copy_(2, self._column, v)

        def run() -> torch.Tensor:
            return decoder._run(self._x, self._tables, self._mask, write, kv)

        # The capture runs nothing, but what warms it up does: into a column that the first replay writes again.
        self._column.fill_(decoder.length)
        self._mask[..., : decoder.length + 1] = 0
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = run()

    def replay(
        self, x: torch.Tensor, tables: tuple[torch.Tensor, ...], column: int, valid: torch.Tensor | None
    ) -> torch.Tensor:
        self._x.copy_(x)
        for static, table in zip(self._tables, tables, strict=True):
            static.copy_(table)
        self._column.fill_(column)
        self._mask.fill_(float("-inf"))
        if valid is None:
            self._mask[..., : column + 1] = 0
        else:
            self._mask[:, 0, 0, : column + 1].masked_fill_(valid, 0)
        self._graph.replay()
        return self._out
