"""Learner: losses, the DeepSpeed engine around the shared scoring function, and its Ray actors.

It imports only `streams`.
"""
