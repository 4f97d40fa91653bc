"""The tokens of a turn: what is prefilled, what is generated, and how long either can be."""
