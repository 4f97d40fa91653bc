"""Tests of sft/."""
