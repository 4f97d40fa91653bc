"""The Triton decode kernel: what it computes, in Triton's interpreter, and that it compiles for a GPU that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.project import ROOT

pytest.importorskip("triton")
# Processes of their own, and an interpreter.
pytestmark = pytest.mark.slow

BARS = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def lines(module: str, **environment: str) -> list[str]:
    """What the module prints in a process of its own, in which Triton interprets or does not."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    ran = subprocess.run([sys.executable, "-m", module], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_every_row_gets_the_softmax_over_its_own_slots_whatever_the_batch():
    cases = [json.loads(line) for line in lines("tests.support.triton_cases", TRITON_INTERPRET="1")]
    assert len(cases) == 20
    for case in cases:
        assert case["error"] <= BARS[case["dtype"]], case
        assert case["error_with_a_key_less"] > 2 * BARS[case["dtype"]], case
        assert case["alone_is_equal"], case
        assert case["out_dtype"], case


def test_the_kernels_compile_for_an_h100_and_fit_its_shared_memory(tmp_path):
    assert len(lines("tests.support.triton_compile", TRITON_CACHE_DIR=str(tmp_path))) == 6
