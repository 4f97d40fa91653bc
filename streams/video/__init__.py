"""Pixels: from a film file to patches, under a deadline."""
