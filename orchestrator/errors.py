"""What can go wrong beside a bad configuration (`dino_core.config.ConfigError`)."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """A run or sweep could not be completed. The message says which and why; the command line exits with 1."""
