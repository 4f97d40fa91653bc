"""Rollout: our own streaming engine and the worker that runs it.

The engine runs many streams at once on a token-granular KV pool; the worker decodes and encodes video, feeds the
engine and takes new weights between two of its steps. Imports only `streams`.
"""
