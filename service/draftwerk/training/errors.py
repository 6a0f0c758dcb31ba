"""The one error that training can end in."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot start or go on. ``str()`` is one line: what is wrong, with its value, and what would work."""
