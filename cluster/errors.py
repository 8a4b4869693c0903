"""The errors a person is meant to read.

Every error says what was given, what is allowed and what to do, in one line. The command line turns a
:class:`StillhouseError` into that line and its exit code; anything else is a defect and gets a traceback in the
log.
"""


class StillhouseError(Exception):
    """Base of the errors that are shown as one line. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UserError(StillhouseError):
    """Something the user gave cannot be used: a spec, a path, an option. Nothing has been started."""

    exit_code = 2


class NoPlaceError(StillhouseError):
    """The cluster is full, and the run would not wait or could not. Nothing has been started."""

    exit_code = 1


class RunError(StillhouseError):
    """A run that had started could not go on. What it had committed is kept."""

    exit_code = 1


class LabelError(RunError):
    """A label block that must not be learnt from: damaged, of another format, or of another teacher or batch."""


def first_line(error: BaseException) -> str:
    """The cause in one line: Ray wraps the worker's traceback around it."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else 'no message'}"
