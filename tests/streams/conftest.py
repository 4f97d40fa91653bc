"""Loud backbones in fp64, and whole checkpoints to be damaged; modules with needs of their own define theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from streams.backbone.tiny import build_tiny
from tests.support.streams import MODEL_TYPES, loud_backbone, norms_in_input_dtype
from tests.support.weights import SPECS


@pytest.fixture(scope="module", params=MODEL_TYPES)
def fp64(request, tmp_path_factory):
    with norms_in_input_dtype():
        yield loud_backbone(tmp_path_factory.mktemp("fp64"), torch.float64, request.param)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return {name: build_tiny(root / name.replace(" ", "_"), spec) for name, spec in SPECS.items()}


@pytest.fixture
def folder_of(checkpoints, tmp_path):
    """A copy of one of the checkpoints, to be damaged."""
    return lambda name="qwen2_5_vl": Path(shutil.copytree(checkpoints[name], tmp_path / name.replace(" ", "_")))
