"""What a run tells: the terminal, the driver's log, MLflow."""
