"""M-RoPE outside of the model, for streams whose keys move: keys and queries are rotated by the plan, not by transformers.

The model itself rotates such rows by position 0, that is not at all but for its `attention_scaling`, which
it applies there; so these tables carry no scaling. Invariants: angles are computed in float64 from the checkpoint's own
frequencies and cast at the end, so that equal distances give equal angles however far a stream has gone; a row of position
ids (temporal, height, width) turns the same frequencies as in the model.
"""

from __future__ import annotations

from typing import Any

import torch

Tables = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [..., D]."""


class Rotary:
    """inv_freq [D / 2] and parameters (`mrope_section`, `rope_type`) as the text model has them. interleaved: whether the
    three axes take turns among the frequencies (Qwen3-VL), or each has its own range of them (Qwen2.5-VL).
    """

    def __init__(self, inv_freq: torch.Tensor, parameters: dict[str, Any], *, interleaved: bool) -> None:
        kind = parameters.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"text_config.rope_parameters.rope_type={kind!r}: its frequencies change with the length of the input, so "
                "keys cannot be rotated anew; use memory.positions=native"
            )
        sections = [int(n) for n in parameters["mrope_section"]]
        if sum(sections) != len(inv_freq):
            raise ValueError(f"mrope_section={sections} does not add up to {len(inv_freq)}, half the head dimension")
        self._inv_freq = inv_freq.detach().float().double()
        if interleaved:
            axis = torch.zeros(len(inv_freq), dtype=torch.long)
            for of in (1, 2):
                axis[of : 3 * sections[of] : 3] = of
        else:
            axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
        self._axis = axis

    def tables(self, positions: torch.Tensor, dtype: torch.dtype) -> Tables:
        """Of positions int [3, ...] -> [..., D] in that dtype."""
        device = positions.device
        by_axis = positions.movedim(0, -1).to(torch.float64)
        angles = by_axis[..., self._axis.to(device)] * self._inv_freq.to(device)
        whole = torch.cat((angles, angles), dim=-1)
        return whole.cos().to(dtype), whole.sin().to(dtype)


def rotated(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """x [..., D] rotated; the tables broadcast against it."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
