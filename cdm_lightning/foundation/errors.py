"""Errors that have a sentence for the person at the terminal."""


class InputError(Exception):
    """What a person gave cannot be used: one sentence that names the value and the rule.

    The command line prints the sentence and exits with 2; everything else is a defect and keeps its traceback.
    """


class TrainingFault(InputError):
    """A training cannot go on: one sentence that says what happened to it and when, printed as an InputError's is."""
