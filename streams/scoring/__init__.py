"""Scoring: log-probs of a log's tokens under the log's own mask.

Used by learner, worker monitor, evaluation and tests. Imports neither DeepSpeed nor an optimiser.
"""
