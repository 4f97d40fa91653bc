"""What the rollout engine is compared with: other ways to run the same streams on the same weights."""
