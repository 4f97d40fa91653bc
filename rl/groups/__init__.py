"""Groups between admission and training: their places, their workers, and those that outlive the run in a checkpoint."""
