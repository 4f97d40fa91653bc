"""The contract between rollout and learner: what was done to a stream, token by token."""
