"""From a task and its clip to a log: where layout, memory policy and positions meet."""
