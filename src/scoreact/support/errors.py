"""What this package raises on purpose, for callers who want to tell one refusal from another.

Each is also the built-in error that fits, so that `except ValueError` goes on working. Its message is a sentence with the
value and the remedy.
"""

from __future__ import annotations


class ScoreactError(Exception):
    """Any of the refusals below."""


class SettingError(ScoreactError, ValueError):
    """A setting, its value, or a combination of settings that cannot be used."""


class LoadError(ScoreactError, ValueError):
    """Code that the user named (`file.py:name`, `module:name`) and that is not there or fails when it is run."""


class ModelError(ScoreactError, ValueError):
    """A model that breaks its contract, or that cannot do what is asked of it."""


class RewardError(ScoreactError, ValueError):
    """A reward that is not there, or that returned what is no reward."""


class RunError(ScoreactError, ValueError):
    """A run folder, a checkpoint or weights that cannot be read, continued or fitted to the model."""


class FeedbackError(ScoreactError, ValueError):
    """Answers of people, a store or a file of them, that cannot be read or used."""


class RunExists(ScoreactError, FileExistsError):
    """A folder that is in use already: a run never writes over another."""


class Diverged(ScoreactError, RuntimeError):
    """Training cannot go on; the message says what to lower. The best weights so far are kept.

    hopeless: no smaller step would help.
    """

    hopeless = False


class ProcessLost(ScoreactError, RuntimeError):
    """Another process of the same run ended or hangs."""
