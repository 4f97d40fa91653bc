"""RL: the asynchronous loop and what it keeps: buffer, advantages, weights, checkpoints, tracking, cluster."""
