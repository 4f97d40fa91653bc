"""SFT: the cold start, on the same logs, layouts, masks and learner as RL."""
