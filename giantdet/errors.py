"""The exceptions that giantdet raises for users, each with the exit code of the command that it ends.

`cli.py` prints such an exception as a single line and returns its `exit_code`. Any other exception is a bug:
it is printed with its traceback, and Python exits with code 1. For callers from Python, input errors are also
`ValueError`s, and the others are `RuntimeError`s.
"""

from __future__ import annotations


class GiantdetError(Exception):
    """Base of all errors that are printed as one line, which states the cause and what to do."""

    exit_code = 1


class InputError(GiantdetError, ValueError):
    """Input that cannot be used: a file, a value, a combination of settings."""

    exit_code = 2


class ConfigError(InputError):
    """A mistake in a run's JSON or in an override; the message names the key."""


class DataError(InputError):
    """A data set, or one of its files, that cannot be used; the message names it."""


class DivergedError(GiantdetError, RuntimeError):
    """Losses, gradients or weights are no longer finite."""

    exit_code = 3


class LostContactError(GiantdetError, RuntimeError):
    """Another rank, its host or the network failed, or did not respond within `train.timeout_minutes`."""

    exit_code = 4


class StoppedError(GiantdetError, RuntimeError):
    """The run was stopped on request; it has saved a checkpoint."""

    exit_code = 5
