"""What every run stands on, whatever its stages: session, files under run_root, plans, tracking."""
