"""The stack's folder below /tmp, whose name any user of the machine can work out: only our own is used."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.parts import ROOT, Stack, StackError


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path / "stack")
    yield stack
    if stack.short.is_symlink():
        stack.short.unlink()
    elif stack.short.exists():
        stack.short.rmdir()


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


@pytest.mark.parametrize("open_to", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_refused(stack: Stack, open_to: int) -> None:
    stack.short.mkdir()
    stack.short.chmod(open_to)
    with pytest.raises(StackError, match="removed, or set STILLHOUSE_HOME"):
        stack.check_short()
    assert mode(stack.short) == open_to


def test_a_link_is_refused_though_it_leads_to_a_folder_of_ours(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    stack.short.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StackError):
        stack.check_short()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_what_somebody_else_made_is_refused_though_it_is_closed(stack: Stack) -> None:
    stack.short.mkdir(mode=0o700)
    os.chown(stack.short, 65534, 65534)
    with pytest.raises(StackError):
        stack.check_short()


def test_one_of_an_older_version_is_closed_to_others(stack: Stack) -> None:
    stack.check_short()  # none is there
    stack.short.mkdir()
    stack.short.chmod(0o711)
    stack.check_short()
    assert mode(stack.short) == 0o700


def test_a_start_finds_nothing_in_it_that_was_there_before(stack: Stack) -> None:
    """Prometheus takes Ray's nodes from a file below a folder that Ray opens to everybody."""
    stack.short.mkdir()
    stack.short.chmod(0o711)
    (stack.short / "ray").mkdir()
    (stack.short / "ray/prom_metrics_service_discovery.json").write_text("[]")
    stack._make_short()
    assert mode(stack.short) == 0o700
    assert list(stack.short.iterdir()) == [stack.temporary]
    stack.temporary.rmdir()


@pytest.mark.parametrize("what", ["up", "down", "status", "backup", "restore"])
def test_every_command_says_so_in_one_line(stack: Stack, what: str, tmp_path: Path) -> None:
    stack.short.mkdir()
    stack.short.chmod(0o777)
    words = [what, str(tmp_path / "backup")] if what in ("backup", "restore") else [what]
    env = {**os.environ, "STILLHOUSE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "infra.local.stack", *words]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and str(stack.short) in done.stderr
    assert not (tmp_path / "stack").exists()
