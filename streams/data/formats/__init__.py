"""One module per row format of a task file."""
