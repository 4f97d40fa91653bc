"""Evaluation: held-out streams, greedy, on the rollout workers."""
