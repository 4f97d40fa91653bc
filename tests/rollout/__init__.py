"""Tests of rollout/."""
