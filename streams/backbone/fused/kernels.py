"""RMSNorm, rotation and gated unit as one Triton kernel each, with their gradients.

Invariants:
* results are rounded where the modules of transformers round theirs, so that they differ from them by the order of a sum and
  by the exponential only;
* what a row gets depends on that row alone;
* nothing is read back to the host, and no input is written, so a launch can be captured and a backward repeated;
* sums are formed in float32, for float64 in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

NORM_VALUES = 2048
"""Values of the rows that one program normalises at once, at most (one row may have more): a decode step has few rows."""
NORM_PARTS = 512
"""Programs that sum the gradient of a norm's weight, each over rows of its own: about four a multiprocessor."""
GATE_VALUES = 1024
"""Values of a gated unit per program."""

# The number of rows is compiled for in general only (`do_not_specialize`): a batch that grows must not compile anew.


@triton.jit
def _norm_rows(x, row, rows, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Rows of x: which places they have and which of them exist, values divided by their root mean square, and that divisor."""
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    at = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    scale = tl.rsqrt(tl.sum(values * values, 1) / COLUMNS + eps)
    return at, inside, values * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x,
    weight,
    out,
    rows,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at, inside, normed, _ = _norm_rows(x, row, rows, EPS, COLUMNS, BLOCK, WIDE)
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(WIDE)
    narrow = out.dtype.element_ty
    tl.store(out + at, (normed.to(narrow).to(WIDE) * factor[None, :]).to(narrow), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    grad,
    x,
    weight,
    grad_x,
    grad_weight,
    rows,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    TRAINS: tl.constexpr,
):
    """Write the gradient of x, and of the weight what the rows of this program add to it."""
    part = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(WIDE)
    narrow = grad_x.dtype.element_ty
    total = tl.zeros([BLOCK], WIDE)
    for first in range(part * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        at, inside, normed, scale = _norm_rows(x, row, rows, EPS, COLUMNS, BLOCK, WIDE)
        given = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
        inner = given * factor[None, :]
        along = tl.sum(inner * normed, 1) / COLUMNS
        tl.store(grad_x + at, (scale[:, None] * (inner - normed * along[:, None])).to(narrow), mask=inside)
        if TRAINS:
            total += tl.sum(given * normed.to(narrow).to(WIDE), 0)
    if TRAINS:
        tl.store(grad_weight + part * COLUMNS + column, total, mask=column < COLUMNS)


@triton.jit
def _rotate_heads(
    x,
    out,
    row,
    cos_low,
    cos_high,
    sin_low,
    sin_high,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    WIDE: tl.constexpr,
):
    head = tl.arange(0, BLOCK_HEADS)
    place = tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS)[:, None] & (place < HALF)[None, :]
    at = (row * HEADS + head)[:, None] * (2 * HALF) + place[None, :]
    low = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    high = tl.load(x + at + HALF, mask=inside, other=0.0).to(WIDE)
    narrow = out.dtype.element_ty
    turned = (low * cos_low).to(narrow).to(WIDE) - (high * sin_low).to(narrow).to(WIDE)
    tl.store(out + at, turned.to(narrow), mask=inside)
    turned = (high * cos_high).to(narrow).to(WIDE) + (low * sin_high).to(narrow).to(WIDE)
    tl.store(out + at + HALF, turned.to(narrow), mask=inside)


@triton.jit
def _rotate(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    WIDE: tl.constexpr,
    BACK: tl.constexpr,
):
    """One token: its heads of q and k, turned; BACK: by the transposed rotation, which takes gradients back."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_HALF)
    inside = place < HALF
    at = row * (2 * HALF) + place
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(WIDE)[None, :]
    cos_high = tl.load(cos + at + HALF, mask=inside, other=0.0).to(WIDE)[None, :]
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(WIDE)[None, :]
    sin_high = tl.load(sin + at + HALF, mask=inside, other=0.0).to(WIDE)[None, :]
    if BACK:
        sin_low, sin_high = -sin_high, -sin_low
    _rotate_heads(q, q_out, row, cos_low, cos_high, sin_low, sin_high, Q_HEADS, HALF, BLOCK_Q, BLOCK_HALF, WIDE)
    _rotate_heads(k, k_out, row, cos_low, cos_high, sin_low, sin_high, K_HEADS, HALF, BLOCK_K, BLOCK_HALF, WIDE)


@triton.jit
def _gate(gate, up, out, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    opened = tl.load(gate + at, mask=inside, other=0.0).to(WIDE)
    narrow = out.dtype.element_ty
    opened = (opened / (1.0 + tl.exp(-opened))).to(narrow).to(WIDE)
    tl.store(out + at, (opened * tl.load(up + at, mask=inside, other=0.0).to(WIDE)).to(narrow), mask=inside)


@triton.jit
def _gate_backward(grad, gate, up, grad_gate, grad_up, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    given = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
    closed = tl.load(gate + at, mask=inside, other=0.0).to(WIDE)
    share = 1.0 / (1.0 + tl.exp(-closed))
    narrow = grad_up.dtype.element_ty
    tl.store(grad_up + at, (given * (closed * share).to(narrow).to(WIDE)).to(narrow), mask=inside)
    slope = share * (1.0 + closed * (1.0 - share))
    through = given * tl.load(up + at, mask=inside, other=0.0).to(WIDE) * slope
    tl.store(grad_gate + at, through.to(narrow), mask=inside)


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def norm_sizes(columns: int) -> dict[str, int]:
    """Return the sizes that the kernels of a norm over `columns` values are compiled with."""
    block = triton.next_power_of_2(columns)
    rows = max(NORM_VALUES // block, 1)
    # Sixteen values a thread: the backward holds five of each in registers.
    return {"COLUMNS": columns, "BLOCK": block, "ROWS": rows, "num_warps": min(max(block * rows // 512, 4), 16)}


def rotate_sizes(q_heads: int, k_heads: int, dim: int) -> dict[str, int]:
    """Return the sizes that the rotation is compiled with."""
    q, k, half = (triton.next_power_of_2(size) for size in (q_heads, k_heads, dim // 2))
    heads = {"Q_HEADS": q_heads, "K_HEADS": k_heads, "HALF": dim // 2}
    return heads | {"BLOCK_Q": q, "BLOCK_K": k, "BLOCK_HALF": half}


@torch.library.custom_op(
    "sightline::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps) -> Tensor"
)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    sizes, rows = norm_sizes(x.shape[-1]), x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    if rows:
        _norm[(triton.cdiv(rows, sizes["ROWS"]),)](x, weight, out, rows, EPS=eps, WIDE=_wide(x.dtype), **sizes)
    return out


@_rms_norm.register_fake
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    x, weight = ctx.saved_tensors
    sizes, rows, wide = norm_sizes(x.shape[-1]), x.numel() // x.shape[-1], _wide(x.dtype)
    grad_x, trains = torch.empty_like(x), ctx.needs_input_grad[1]
    parts = min(triton.cdiv(rows, sizes["ROWS"]), NORM_PARTS)
    # Summed here and not by atomic additions, whose order would be another one every time.
    number = torch.float64 if x.dtype == torch.float64 else torch.float32
    added = torch.empty((parts if trains else 0, x.shape[-1]), dtype=number, device=x.device)
    if rows:
        _norm_backward[(parts,)](
            grad.contiguous(), x, weight, grad_x, added, rows, EPS=ctx.eps, WIDE=wide, TRAINS=trains, **sizes
        )
    return grad_x, added.sum(0).to(weight.dtype) if trains else None, None


_rms_norm.register_autograd(_rms_norm_backward, setup_context=_keep_norm)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x [..., C] divided by the root of its mean square + eps, rounded, times weight [C]; all of one dtype."""
    assert x.dtype == weight.dtype
    return _rms_norm(x.contiguous(), weight, eps)


def _turned(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    if rows := cos.numel() // cos.shape[-1]:
        sizes = rotate_sizes(q.shape[-2], k.shape[-2], q.shape[-1])
        _rotate[(rows,)](q, k, cos, sin, q_out, k_out, WIDE=_wide(q.dtype), BACK=back, **sizes)
    return q_out, k_out


@torch.library.custom_op(
    "sightline::rotate", mutates_args=(), schema="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)"
)
def _rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _turned(q, k, cos, sin, back=False)


@_rotate_both.register_fake
def _(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _keep_tables(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _rotate_backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_turned(grad_q.contiguous(), grad_k.contiguous(), *ctx.saved_tensors, back=True), None, None


_rotate_both.register_autograd(_rotate_backward, setup_context=_keep_tables)


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn q [B, L, H, D] and k [B, L, H_kv, D] by tables [B, L, D] of their dtype; the halves of a head are its pairs."""
    assert q.dtype == k.dtype == cos.dtype == sin.dtype
    assert q.shape[:2] == k.shape[:2] == cos.shape[:2] == sin.shape[:2]
    return _rotate_both(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous())


@torch.library.custom_op("sightline::silu_times", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def _silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(gate)
    if size := gate.numel():
        grid = (triton.cdiv(size, GATE_VALUES),)
        _gate[grid](gate, up, out, size, BLOCK=GATE_VALUES, WIDE=_wide(gate.dtype))
    return out


@_silu_times.register_fake
def _(gate: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(gate)


def _keep_gate(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _silu_times_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if size := gate.numel():
        grid, wide = (triton.cdiv(size, GATE_VALUES),), _wide(gate.dtype)
        _gate_backward[grid](grad.contiguous(), gate, up, grad_gate, grad_up, size, BLOCK=GATE_VALUES, WIDE=wide)
    return grad_gate, grad_up


_silu_times.register_autograd(_silu_times_backward, setup_context=_keep_gate)


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return SiLU(gate), rounded, times up; of one shape and dtype."""
    assert gate.shape == up.shape
    assert gate.dtype == up.dtype
    return _silu_times(gate.contiguous(), up.contiguous())
