"""The error that a user can act on."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, the value, and what to do.

    Commands print the message alone and exit with status 1. Any other exception is a defect of
    this project and keeps its traceback.
    """
