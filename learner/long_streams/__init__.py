"""What makes long rows fit: activation checkpointing."""
