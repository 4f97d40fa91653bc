"""Rewards computed by scorers: which one computes which streams, and what happens to a stream that ends one."""
