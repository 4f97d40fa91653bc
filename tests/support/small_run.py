"""Settings of a whole small run, cold start and RL, on rows of one's own."""

from __future__ import annotations

SEED = 3
STEPS, GROUPS, GROUP_SIZE, IN_FLIGHT, MAX_LAG = 4, 2, 2, 4, 1
SETTINGS = (
    f"seed={SEED}",
    "data=jsonl",
    "data.video.min_pixels=784",
    "data.video.max_pixels=3136",
    "memory.window=4",
    "layout.system_prompt='Watch, think, speak up.'",
    "layout.think_budget=6",
    "layout.max_new_tokens=10",
    "learner.freeze=tower",
    "learner.freeze_names=['model.visual.merger.ln_q.*']",
    "sft.learner.freeze=none",
    "model.tiny.hidden=64",
    "model.tiny.layers=2",
    "model.tiny.mlp=128",
    "sft.steps=3",
    "sft.batch=4",
    "sft.learner.warmup_steps=1",
    f"algorithm.steps={STEPS}",
    f"algorithm.groups_per_step={GROUPS}",
    f"algorithm.group_size={GROUP_SIZE}",
    f"algorithm.groups_in_flight={IN_FLIGHT}",
    f"weights.max_lag={MAX_LAG}",
    "rollout.workers=2",
    "monitor.every=2",
    "checkpoint.every=2",
)
