"""Errors that name what was wrong, what was expected and what to do."""

from __future__ import annotations


class UsageError(ValueError):
    """Unusable arguments or input. The command line prints it as one line and exits with 2."""


class FailedError(RuntimeError):
    """Something that should have worked did not. The command line prints it as one line and exits with 1."""
