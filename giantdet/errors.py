"""The exceptions that a user of giantdet may meet, each with the exit code of the command that it ends.

`cli.py` prints one of these as a single line and returns its `exit_code`. Any other exception is a bug: it
keeps its traceback, and Python exits with code 1. The input errors are also `ValueError`s and the others
`RuntimeError`s, for callers from Python.
"""

from __future__ import annotations


class GiantdetError(Exception):
    """Base of all errors that are printed as one line, which names the cause and what to do."""

    exit_code = 1


class InputError(GiantdetError, ValueError):
    """Input that cannot be used: a file, a value, a combination of settings."""

    exit_code = 2


class ConfigError(InputError):
    """A mistake in a run's JSON or in an override; the message names the key."""


class DataError(InputError):
    """A data set, or a file of it, that cannot be used; the message names it."""


class DivergedError(GiantdetError, RuntimeError):
    """Losses, gradients or weights are no longer finite."""

    exit_code = 3


class LostContactError(GiantdetError, RuntimeError):
    """Another rank, its host or the network between has gone, or is later than `train.timeout_minutes`."""

    exit_code = 4


class StoppedError(GiantdetError, RuntimeError):
    """The run was asked to stop, and has saved a checkpoint."""

    exit_code = 5
