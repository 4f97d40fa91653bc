"""The engine as it was before its decode loop moved to the device: one forward and one token per stream and step.

It is kept for two reasons, and for no other:
* the engine must write the logs that this one writes, token for token (tests/rollout/test_equivalence.py);
* `benchmarks.rollout` measures the host's time per token before and after in one run.

Slow and simple: a step gathers what every stream forwards next into one packed row, gathers the live keys anew per layer,
and draws on the host. Frozen: it follows changes of the interfaces that it stands on (backbone, policies, layouts, requests and
feeds) and nothing else. Pool, slots, admission, attention, draw and writer are copies, so that a defect in the engine's own
cannot be in both.
"""

from tests.support.one_step.engine import OneStepEngine

__all__ = ["OneStepEngine"]
