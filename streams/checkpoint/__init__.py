"""A checkpoint's folder, read before anything is loaded: torch-free, the driver plans and refuses with it."""
