"""`make down` where the supervisor was killed: its parts live on without it, and are ended all the same."""

import shutil

import psutil
import pytest

from infra.local.parts import StackError
from infra.local.stack import down
from infra.local.watch import supervisor_of
from tests.infra.small_stack import small_stack

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="not installed: apt-get install prometheus"),
]


def test_what_a_killed_supervisor_has_left_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with small_stack("postgres", "s3") as stack:
        process = psutil.Process(supervisor_of(stack).supervisor.getPID())
        parts = process.children(recursive=True)
        process.kill()
        process.wait()
        assert supervisor_of(stack) is None
        with pytest.raises(StackError, match="make down"):
            stack.choose_ports(free=False)
        assert down(stack) == 0
        said = capsys.readouterr()
        assert "has died" in said.err and "is killed" not in said.err
        assert len(parts) > 2 and not any(part.is_running() for part in parts)
        stack.choose_ports(free=False)
        down(stack)
        assert capsys.readouterr().out == "nothing runs\n"
