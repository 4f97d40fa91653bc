"""The tokens of a turn."""
