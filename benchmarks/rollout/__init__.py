"""The rollout engine beside two baselines, in one run on the same clips, weights and seeds; see `__main__`."""
