"""A laptop: the base install in an environment of its own, away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.integration.heads import ROOT

PACKAGES = ("cluster", "jobs", "serving")


class Laptop:
    """A virtual environment with `pip install stillhouse` and no more, and a home that knows no cluster."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "venv" / "bin" / "python"
        self.home = folder / "home"
        self.home.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        # Of a copy, for pip leaves what it builds beside the sources.
        source = folder / "source"
        for package in PACKAGES:
            shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(ROOT / file, source / file)
        install = ["-m", "pip", "install", "--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([str(self.python), *install, str(source)], check=True, timeout=500)

    def _environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "STILLHOUSE_"))}
        return {**kept, "HOME": str(self.home), "COLUMNS": "160", **more}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [str(self.python), "-u", "-m", "jobs", *arguments]
        env = self._environment(**environment)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=env, cwd=self.home, text=True, **pipes)  # type: ignore[call-overload]

    def type(self, *arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "jobs", *arguments]
        env = self._environment(**environment)
        return subprocess.run(
            command, env=env, cwd=self.home, capture_output=True, text=True, timeout=timeout, check=False
        )
