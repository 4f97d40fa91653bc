"""Fused kernels on a GPU: what they compute, and that the model's choice there is to have them."""

from __future__ import annotations

import pytest
import torch

from streams.backbone.fused.modules import settle_fused_kernels

pytest.importorskip("triton")
from tests.support.fused_cases import OPERATIONS, operation

pytestmark = pytest.mark.cuda

BARS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference from the modules of transformers, relative to the largest value: two roundings in half precision."""


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_kernel_and_its_gradients_are_those_of_the_modules(name, dtype):
    found = operation(name, dtype, "cuda")
    assert max(found["forward"], found["backward"]) <= BARS[dtype], found
    assert found["shapes"], found
    assert found["repeats"], found
    assert found["inputs_kept"], found
    assert found["one_row_alone"], found


def test_auto_takes_them_in_half_precision():
    assert str(settle_fused_kernels("auto", "cuda", "bfloat16")) == "triton (auto)"
    assert settle_fused_kernels("auto", "cuda", "float32").name == "off"
