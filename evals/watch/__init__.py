"""job=watch: one film, one model, turn by turn."""
