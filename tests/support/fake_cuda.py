"""CUDA tensors without CUDA and without memory, and what watches a step that runs on them.

torch's FakeTensorMode computes shapes, dtypes, devices and storages of what a step makes, through the same calls as on a GPU.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from streams.backbone.backbone import Backbone
from streams.backbone.tiny import build_config, build_tokenizer
from streams.backbone.tiny_spec import TinySpec
from streams.backbone.vocabulary import add_missing_tokens
from streams.checkpoint.folder import ImageSpec
from streams.layout.layout import Layout, LayoutConfig

DEVICE = torch.device("cuda:0")
CUDA, META, DEVICE_TYPES = 1, 14, 21
"""Of c10/core/DeviceType.h."""


def fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors are fake, so that they can be on DEVICE."""
    _guard()
    return FakeTensorMode()


def _guard() -> None:
    """Give a torch that was built without CUDA a device guard for it, the one of meta tensors, which guards nothing.

    FakeTensorMode does so where torch was built with CUDA and finds none; without a guard Python's indexing refuses the device.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[CUDA]:
        guards[CUDA] = guards[META]


def fake_backbone(spec: TinySpec, fused_kernels: str = "off") -> Backbone:
    """Return a bfloat16 backbone of that shape on DEVICE. Only in a `fake_mode`."""
    tokenizer = build_tokenizer(spec.model_type)
    add_missing_tokens(tokenizer)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(build_config(spec, tokenizer), dtype=torch.bfloat16)
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                # A tied head stays the embedding.
                if tensor not in made:
                    made[tensor] = _on_device(tensor)
                held[name] = made[tensor]
    model.eval()
    layout = Layout(tokenizer, LayoutConfig(), spec.vocab_rows, spec.family.timestamps)
    image = ImageSpec.load({}, model.config.vision_config, spec.family)
    return Backbone(model, tokenizer, layout, image, Path("fake"), {}, fused_kernels=fused_kernels)


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
    return torch.nn.Parameter(fake) if isinstance(tensor, torch.nn.Parameter) else fake


class NotCapturable(AssertionError):
    """A CUDA graph cannot hold what was called."""


class Watch(TorchDispatchMode):
    """Raises NotCapturable where the host would wait for the device, or its memory would be read while a graph runs.

    Attributes:
        calls: how often each operator ran, by its name without the overload.
        launches: calls that compute something: neither views of a tensor nor memory for one.
    """

    REPLACES = ("aten::set_", "aten::set_data", "aten::resize_", "aten::resize_as_")

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.name()).split(".")[0]
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise NotCapturable(f"{func}: the host reads a value")
        if name in self.REPLACES:
            raise NotCapturable(f"{func}: a tensor gets another storage")
        # An index is a shape of its own only if it is a mask.
        masks = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))
        indexing = name in ("aten::index", "aten::index_put", "aten::index_put_")
        if (indexing and masks) or (not indexing and torch.Tag.dynamic_output_shape in func.tags):
            raise NotCapturable(f"{func}: a shape depends on values")
        made = func(*args, **kwargs)
        # A number on the host may be an argument of a kernel, which a graph keeps.
        number = torch.Tag.pointwise in func.tags
        devices = {t.device.type for t in _tensors((args, kwargs, made)) if t.dim() or not number}
        if devices - {"cuda"}:
            raise NotCapturable(f"{func}: tensors on {', '.join(sorted(devices))}")
        if not name.startswith("prim::"):  # what a fake tensor says of itself
            self.calls[name] += 1
            seen = [returned.alias_info for returned in func._schema.returns]
            views = any(alias is not None and not alias.is_write for alias in seen) or name == "aten::_unsafe_view"
            self.launches += not (views or name.startswith("aten::empty"))
        return made


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return which tensor and which storage each name has now; both live as long as the tensors do."""
    return {name: (id(tensor), tensor.untyped_storage()._cdata) for name, tensor in tensors.items()}
