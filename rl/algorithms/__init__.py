"""RL algorithms, one file each: from the rewards of a group to advantages per token, and a loss. `table` lists them."""
