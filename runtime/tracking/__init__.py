"""What a run reports to: the terminal, the driver's log, MLflow."""
