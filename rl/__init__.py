"""RL: the asynchronous loop, and what it keeps: buffer, dispatch, versions of weights, algorithms."""
