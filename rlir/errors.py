"""Errors that are the user's to fix: one clear line, exit code 2, nothing lost."""


class InputError(ValueError):
    """Input that cannot be used. The message says what must hold and what was found."""


class TrainingError(RuntimeError):
    """Training that cannot go on, after its state was saved. The message names step and clip."""
