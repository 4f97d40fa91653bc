"""Losses: their settings (`config`, without torch), what the engine asks of each (`base`), and one file per loss."""
