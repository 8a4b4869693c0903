"""MLflow's database in a backup: written, looked at, and restored beside the one in use before it takes its place."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg2

from infra.local.parts import Stack, StackError, postgres_bin

# The restored one before it is in its place, and the one of before as long as both are there.
_NEW, _OLD = "mlflow_restored", "mlflow_before"


def dump(stack: Stack, path: Path) -> None:
    """Write MLflow's database to a file.

    Raises:
        StackError: it does not answer.
    """
    _run("pg_dump", "--format=custom", f"--file={path}", stack.database, environment=stack.environment)


def look_at(path: Path) -> None:
    """See that a file is a dump; whether its tables are whole shows only when it is restored.

    Raises:
        StackError: it is none.
    """
    _run("pg_restore", "--list", str(path))


class Beside:
    """A new database beside the one in use; gone when this is over, if it has not taken its place."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def __enter__(self) -> Beside:
        # What a restore has left that was killed.
        self._drop(_NEW)
        with _talk(self._stack) as cursor:
            cursor.execute(f"CREATE DATABASE {_NEW} TEMPLATE template0")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A server that has gone away meanwhile keeps it until the next restore.
        with contextlib.suppress(psycopg2.Error):
            self._drop(_NEW)

    def fill(self, path: Path) -> None:
        """Restore a dump.

        Raises:
            StackError: it is damaged.
        """
        new = f"--dbname={self._stack.database.replace('/mlflow', f'/{_NEW}')}"
        _run("pg_restore", "--exit-on-error", new, str(path), environment=self._stack.environment)

    def take_the_place(self) -> None:
        """Be MLflow's database, and drop the one of before; who is still connected to that is cut off."""
        self._drop(_OLD)
        with _talk(self._stack) as cursor:
            cursor.execute("SELECT FROM pg_database WHERE datname = 'mlflow'")
            renames = [f"ALTER DATABASE {_NEW} RENAME TO mlflow"]
            if cursor.fetchone() is not None:
                renames = [f"ALTER DATABASE mlflow RENAME TO {_OLD}", *renames]
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'mlflow'")
            # In one transaction: at no moment is there none.
            cursor.execute("; ".join(renames))
        self._drop(_OLD)

    def _drop(self, name: str) -> None:
        with _talk(self._stack) as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextlib.contextmanager
def _talk(stack: Stack) -> Iterator[Any]:
    server = stack.database.replace("/mlflow", "/postgres")
    connection = psycopg2.connect(server, passfile=stack.environment["PGPASSFILE"], connect_timeout=10)
    try:
        connection.autocommit = True
        yield connection.cursor()
    finally:
        connection.close()


def _run(program: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [str(postgres_bin() / program), *arguments]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise StackError(f"{program} failed: {said[0]}")
