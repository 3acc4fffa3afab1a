"""The one kind of error that the user can repair."""


class InputError(Exception):
    """Bad input: the message names the file, the value and the fix, and the user sees nothing else."""
