"""Tests of conf/."""
