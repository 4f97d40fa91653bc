"""Configuration: Hydra groups (YAML beside this file) and the typed schema that validates them."""
