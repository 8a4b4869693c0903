"""The errors a person is meant to read.

Every error says what was given, what is allowed and what to do, in one line. The command line turns a
:class:`StillhouseError` into that line and its exit code; anything else is a defect and gets a traceback in the
log.
"""

from __future__ import annotations

import re


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
    """A run that had started could not continue. What it had committed is kept."""

    exit_code = 1


class LabelError(RunError):
    """A label block that must not be learnt from: damaged, of another format, or of another teacher or batch."""


def first_line(error: BaseException, to_save_memory: str = "") -> str:
    """The cause of an error in one line, without what Ray and Ray Train wrap around it.

    Args:
        to_save_memory: what to change where memory is, or may be, the cause; a clause.
    """
    cause = _unwrapped(error)
    text = str(cause)
    if death := death_of(text, to_save_memory):
        return death
    if isinstance(cause, StillhouseError):
        return text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    # torch has a type of its own for GPUs only; on CPU its RuntimeError tells by its text.
    if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and _NO_MEMORY.search(last)):
        # PyTorch's advice on its allocator follows.
        last = "; ".join(part for part in (last.partition(" If reserved but unallocated")[0], to_save_memory) if part)
    return f"{type(cause).__name__}: {last}"


def death_of(text: str, to_save_memory: str = "") -> str:
    """What Ray's text on the death of a process comes to: which process, on which node, and what it used there.

    Empty where the text is of something else.
    """
    if found := _KILLED_BY_RAY.search(text):
        return "; ".join(part for part in (_killed_by_ray(text, found), to_save_memory) if part)
    found = _EXITED.search(text)
    if found is None and _TASK_EXITED not in text:
        return ""
    process = f"process {found['pid']} on node {found['ip']}" if found else "its process"
    change = f"; if it was, {to_save_memory}" if to_save_memory else ""
    return (
        f"{process} ended without a Python error: it exited, crashed, or was killed, such as by the kernel because the "
        f"node had no memory left (dmesg on that node shows it){change}"
    )


# Texts of Ray 2.60 and of torch.
_KILLED_BY_RAY = re.compile(
    r"Memory on the node \(IP: (?P<ip>[^,]+), ID: \w+\) was (?P<used>\S+) used / (?P<all>\S+) limit"
)
_SELECTED = re.compile(
    r"Selected to kill: .*?name=(?P<name>[^,]*), .*?pid=(?P<pid>\d+), actual memory used=(?P<own>\w[\w.]*)"
)
_TOP_USER = re.compile(r"^\d+\t(?P<gb>[\d.]+)\t(?P<command>.+)$", re.MULTILINE)
_EXITED = re.compile(r"\tpid: (?P<pid>\d+)\n(?:.*\n)*?\tip: (?P<ip>\S+)\n(?:.*\n)*?.*Worker exit type: SYSTEM_ERROR")
_TASK_EXITED = "The worker died unexpectedly while executing this task"
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


def _killed_by_ray(text: str, found: re.Match[str]) -> str:
    killed = [f"{each['name']} (process {each['pid']}, {each['own']})" for each in _SELECTED.finditer(text)]
    largest = [f"{each['command'].strip()[:40]} {each['gb']}GB" for each in _TOP_USER.finditer(text)][:3]
    return (
        f"Ray killed {' and '.join(killed) or 'it'} because node {found['ip']} ran out of memory: {found['used']} of "
        f"{found['all']} in use" + (f", most of it by {', '.join(largest)}" if largest else "")
    )


def _unwrapped(error: BaseException) -> BaseException:
    """What lies below a chain of Ray's and Ray Train's errors."""
    for name in ("cause", "controller_failure", "health_check_failure"):
        if isinstance(inner := getattr(error, name, None), BaseException):
            return _unwrapped(inner)
    return error
