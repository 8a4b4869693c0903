"""An endpoint's administration from the command line: what is refused before anybody is asked, and keys."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.errors import RunError, UserError
from jobs.cli.main import app
from jobs.endpoints import Administration, read_experiment, weights_of


def stillhouse(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_weights_are_read() -> None:
    assert weights_of(["a=1", "b=2.5", "c=d=0"]) == {"a": 1.0, "b": 2.5, "c=d": 0.0}
    for text in ("a", "a=", "=1", "a=b", ""):
        with pytest.raises(UserError, match="is no ARM=NUMBER"):
            weights_of([text])


@pytest.mark.parametrize("step", ["a=1", "x:a=1", "5:", "5:a"])
def test_a_step_of_a_ramp_that_is_none(step: str) -> None:
    with pytest.raises(UserError):
        raise stillhouse("ramp", "http://127.0.0.1:9", "--step", step).exception


@pytest.mark.parametrize(("text", "says"), [("- a", "YAML mapping"), ("a: [", "not valid YAML")])
def test_an_experiment_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_experiment(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_experiment(tmp_path / "none.yaml")


def test_nobody_there_and_no_address() -> None:
    with pytest.raises(UserError, match="is not an HTTP URL"):
        Administration("127.0.0.1:8000")
    with pytest.raises(RunError, match=r"does not answer .*is the endpoint up"):
        Administration("http://127.0.0.1:9").ask("GET", "traffic")


def test_keys_are_made_shown_once_and_removed(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    secret = stillhouse("keys", "add", file, "app", "--requests-per-minute", "60", "--arm", "small").output.strip()
    assert secret.startswith("sk-still-") and len(secret) > 40
    stillhouse("keys", "add", file, "boss", "--admin")
    shown = stillhouse("keys", "ls", file).output
    assert "app" in shown and "60" in shown and "small" in shown and "boss" in shown and secret not in shown
    assert "has a key named 'app'" in str(stillhouse("keys", "add", file, "app").exception)
    stillhouse("keys", "rm", file, "app")
    left = stillhouse("keys", "ls", file)
    assert (left.exit_code, "boss" in left.output, "app" in left.output) == (0, True, False)
    assert isinstance(stillhouse("keys", "ls", str(tmp_path / "none")).exception, UserError)
