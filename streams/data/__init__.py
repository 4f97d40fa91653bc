"""Rows in files: reading, checking and writing StreamTasks."""
