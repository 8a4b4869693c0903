"""Whose family it is."""

from __future__ import annotations

import getpass
import os

# Set for a submitted job, whose driver runs as the cluster's own user.
VARIABLE = "STILLHOUSE_USER"


def user() -> str:
    """Name of whoever submitted the job, or runs the family here."""
    if given := os.environ.get(VARIABLE):
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # In a container whose user has no name.
        return f"user {os.getuid()}"
