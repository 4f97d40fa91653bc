"""The repository's folder, for tests that start its commands or read its documents."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
