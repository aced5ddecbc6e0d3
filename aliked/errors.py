"""The one exception that a script turns into a sentence and exit status 2."""


class InputError(ValueError):
    """Bad input from the user: one sentence that names the thing, the reason and the cure."""
