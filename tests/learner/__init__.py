"""Tests of learner/."""
