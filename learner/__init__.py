"""Learner: losses, the DeepSpeed engine around the shared scoring function, and its Ray actor. Imports only `streams`."""
