"""RL: the asynchronous loop and its parts: buffer, dispatch, versions of weights, evaluations, algorithms."""
