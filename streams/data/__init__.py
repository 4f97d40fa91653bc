"""Task files: reading, checking and writing rows as StreamTasks."""
