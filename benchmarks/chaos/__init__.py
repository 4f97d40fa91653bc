"""A run while its processes are killed and stopped, and what malformed inputs end in."""
