"""Transcripts of evaluated streams: their records, and the page that shows them."""
