"""The one kind of error that a command line shows as a single line, without a traceback."""


class UserError(Exception):
    """A mistake that the person at the keyboard can put right.

    The message is one line: what is wrong, with the value in it, and what to do about it.
    The experiments print it as ``error: <message>`` and exit with status 2.
    """


def first_line(error: Exception) -> str:
    """What another library's exception says, as far as it fits a line of ours."""
    return (str(error) or type(error).__name__).splitlines()[0]
