"""Positions of tokens: native M-RoPE ids, and contiguous regions."""
