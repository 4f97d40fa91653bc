"""M-RoPE outside of the model, for streams whose keys move: the attention plan rotates keys and queries.

For these rows the model is given position 0, which leaves queries and keys unrotated but still applies
`attention_scaling`. These tables therefore must not apply it again.

Invariants:
* angles are computed in float64 from the checkpoint's own frequencies and cast at the end, so that equal distances give
  equal angles however long a stream is;
* each of the three position ids (temporal, height, width) turns the same frequencies as in the model.
"""

from __future__ import annotations

from typing import Any

import torch

Tables = tuple[torch.Tensor, torch.Tensor]
"""cos and sin [..., D]."""


class Rotary:
    """The rotation tables of one text model.

    Args:
        inv_freq: float [D / 2], as the text model has them.
        parameters: the model's rope parameters (`mrope_section`, `rope_type`).
        interleaved: True if the three axes alternate over the frequencies (Qwen3-VL), False if each has a range of its
            own (Qwen2.5-VL).
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
            axis = torch.tensor([of for of, count in enumerate(sections) for _ in range(count)])
        # Where it is used: a copy per call would wait for the host, and a CUDA graph cannot hold it.
        self._axis = axis.to(inv_freq.device)

    def tables(self, positions: torch.Tensor, dtype: torch.dtype) -> Tables:
        """Return cos and sin [..., D] in that dtype for positions int [3, ...]."""
        device = positions.device
        by_axis = positions.movedim(0, -1).to(torch.float64)
        angles = by_axis[..., self._axis.to(device)] * self._inv_freq.to(device)
        whole = torch.cat((angles, angles), dim=-1)
        return whole.cos().to(dtype), whole.sin().to(dtype)


def rotated(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate x [..., D]; the tables broadcast against it."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
