"""Reads what an answer's text says, by the kinds of `streams.task`: letters, numbers, yes and no, in many scripts.

Invariants:
* rows are checked by the same rules that reward responses;
* pure; imports only `streams.task`.
"""
