"""RL algorithms: from the rewards of a group to advantages per token, and a loss; one file each, by name in `table`."""
