"""Where layout, memory and positions meet: from a task and its clip to a log."""
