"""What every run stands on."""
