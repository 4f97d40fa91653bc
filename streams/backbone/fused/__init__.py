"""The text model with fewer kernels."""
