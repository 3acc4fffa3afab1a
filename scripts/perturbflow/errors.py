"""The one kind of error that is the user's to mend."""


class InputError(Exception):
    """Bad input: the message names the file, the value and the fix, and is all that the user sees."""
