"""The fused kernels beside what transformers computes, in Triton's interpreter; prints a line of JSON per case.

    TRITON_INTERPRET=1 python -m tests.support.fused_cases

A process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, apply_rotary_pos_emb

from benchmarks.fused import fused_rows
from learner.long_streams.activation_checkpointing import checkpoint_activations
from streams.backbone.backbone import Backbone
from streams.backbone.fused import kernels as fused_kernels
from streams.backbone.fused.modules import fuse
from streams.backbone.tiny_spec import TinySpec
from tests.support.causal import Causal
from tests.support.exactness.backbones import SPECS, loud_backbone, norms_in_input_dtype

TYPES = (torch.float64, torch.float32, torch.float16)
TOKENS = 7


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    module = Qwen2_5_VLRMSNorm(x.shape[-1]).to(x.device, x.dtype)
    return torch.func.functional_call(module, {"weight": weight}, x)


def turned(*given: torch.Tensor) -> torch.Tensor:
    return torch.cat(apply_rotary_pos_emb(*given, unsqueeze_dim=2), dim=2)


def turned_fused(*given: torch.Tensor) -> torch.Tensor:
    return torch.cat(fused_kernels.rotate(*given), dim=2)


def normed_fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fused_kernels.rms_norm(x, weight, 1e-6)


OPERATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[tuple[int, ...]], int]] = {
    # Fused, plain, shapes of what they are given, how many of these have a gradient. Odd sizes, and more rows than programs.
    "norm": (normed_fused, normed, [(2, TOKENS, 37), (37,)], 2),
    "norm of heads": (normed_fused, normed, [(1, TOKENS, 6, 80), (80,)], 2),
    "norm of few": (normed_fused, normed, [(1, 1, 3), (3,)], 2),
    "rotation": (turned_fused, turned, [(2, TOKENS, 6, 14), (2, TOKENS, 3, 14), (2, TOKENS, 14), (2, TOKENS, 14)], 2),
    "gate": (fused_kernels.silu_times, lambda gate, up: F.silu(gate) * up, [(2, TOKENS, 137)] * 2, 2),
}


def apart(found: Any, wanted: Any) -> float:
    """The largest difference of two rows of tensors, relative to the largest value of each."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def operation(name: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    fused, plain, shapes, trained = OPERATIONS[name]
    generator = torch.Generator().manual_seed(len(name))
    given = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    given = [t.to(device, dtype).requires_grad_(i < trained) for i, t in enumerate(given)]
    before = [t.detach().clone() for t in given]
    found, wanted = fused(*given), plain(*given)
    upstream = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    grads = torch.autograd.grad(found, given[:trained], upstream, retain_graph=True)
    again = torch.autograd.grad(found, given[:trained], upstream)
    # A weight that is frozen, or an input of the first layer: one gradient is asked for, and it is the same.
    alone = [torch.autograd.grad(fused(*only(given, i)), given[i], upstream)[0] for i in range(trained)]
    return {
        "case": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": found.shape == wanted.shape and found.dtype == wanted.dtype,
        "equal": bool(torch.equal(found, wanted)),
        "forward": apart([found], [wanted]),
        "backward": apart(grads, torch.autograd.grad(wanted, given[:trained], upstream)),
        "repeats": all(map(torch.equal, grads, again)) and all(map(torch.equal, grads, alone)),
        "inputs_kept": all(map(torch.equal, given, before)),
        "one_row_alone": bool(torch.equal(fused(*first_row(given)), found[:1, :1])),
    }


def only(given: list[torch.Tensor], trained: int) -> list[torch.Tensor]:
    return [t if i == trained else t.detach() for i, t in enumerate(given)]


def first_row(given: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach()[:1, :1] if t.dim() > 1 else t.detach() for t in given]


def gradients(backbone: Backbone) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of two rows of random tokens at positions of video, and what they give every parameter that they reach."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(backbone.tokenizer), (2, TOKENS), generator=generator)
    positions = torch.randint(50, (3, 2, TOKENS), generator=generator)
    logits = backbone.model.lm_head(backbone.hidden(ids, positions, Causal()))
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    backbone.model.zero_grad(set_to_none=True)
    (logits.log_softmax(-1) * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}


def model(model_type: str, folder: Path) -> dict[str, Any]:
    """The whole text model, in float64, where a difference is an error and no rounding."""
    spec = replace(SPECS[model_type], layers=2, deepstack=())
    plain = loud_backbone(folder / model_type, torch.float64, spec)
    fused = copy.deepcopy(plain)
    fuse(fused.model.model.language_model, "triton")
    names = list(plain.model.state_dict())
    (wanted, wanted_grads), (found, grads) = gradients(plain), gradients(fused)
    checkpoint_activations(fused)
    fused.model.train()
    again, grads_again = gradients(fused)
    return {
        "case": model_type,
        "names": list(fused.model.state_dict()) == names and list(grads) == list(wanted_grads),
        "parameters": len(grads),
        "norms_of_heads": sum("q_norm" in name for name in grads),
        "forward": apart([found], [wanted]),
        "backward": apart(grads.values(), wanted_grads.values()),
        "checkpointed": bool(torch.equal(again, found)) and all(torch.equal(grads_again[n], grads[n]) for n in grads),
        # The modules' classes are as they were: a model beside it computes as before.
        "others_kept": bool(torch.equal(gradients(plain)[0], wanted)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Several programs for each sum, and pieces that end within a program.
    fused_kernels.NORM_VALUES, fused_kernels.NORM_PARTS, fused_kernels.GATE_VALUES = 256, 3, 512
    with norms_in_input_dtype():
        for name in OPERATIONS:
            print(json.dumps(operation(name, torch.float64)), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for model_type in SPECS:
                print(json.dumps(model(model_type, Path(folder))), flush=True)
    for dtype in TYPES[1:]:
        for name in OPERATIONS:
            print(json.dumps(operation(name, dtype)), flush=True)
    for row in fused_rows("cpu", torch.float32, 1, TinySpec(layers=1), (2,)):
        print(json.dumps({"case": "benchmark"} | row), flush=True)
