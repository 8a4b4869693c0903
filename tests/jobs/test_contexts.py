"""Clusters by name: which one a command means, and what a file that is no good costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.contexts import LOCAL_ADDRESS, add_context, config_path, context_for, remove_context, rows, use_context

LAB, CLOUD = "http://lab:8265", "https://cloud.example.org/ray"


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "settings" / "config.yaml"
    monkeypatch.setenv("STILLHOUSE_CONFIG", str(path))
    return path


def test_without_any_context_this_machine_is_meant(config: Path) -> None:
    assert context_for(None, None).address == LOCAL_ADDRESS
    assert rows() == []
    assert not config.exists()


def test_the_first_is_used_until_another_is_chosen_and_options_go_before_it() -> None:
    add_context("lab", address=LAB, tracking_uri="http://mlflow:5000")
    add_context("cloud", address=f"{CLOUD}/")
    assert context_for(None, None).address == LAB
    use_context("cloud")
    assert context_for(None, None).address == CLOUD
    assert context_for("lab", None).tracking_uri == "http://mlflow:5000"
    # An address is a cluster of its own, with nothing of the context in use.
    assert context_for(None, "http://other:1").model_dump(exclude_none=True) == {"address": "http://other:1"}
    assert [(row["name"], row["current"]) for row in rows()] == [("lab", False), ("cloud", True)]


def test_a_context_that_is_forgotten_is_used_no_more() -> None:
    add_context("lab", address=LAB)
    remove_context("lab")
    assert context_for(None, None).address == LOCAL_ADDRESS
    with pytest.raises(UserError, match=r"no context 'lab'; there are: none yet"):
        use_context("lab")


def test_a_name_that_is_not_there_is_answered_with_those_that_are() -> None:
    add_context("lab", address=LAB)
    with pytest.raises(UserError, match=r"no context 'lob'; there are: lab"):
        context_for("lob", None)
    with pytest.raises(UserError, match="give one of them"):
        context_for("lab", LAB)


@pytest.mark.parametrize("address", ["lab:8265", "ray://lab:10001", ""])
def test_an_address_that_is_no_url_is_refused_and_nothing_is_kept(config: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"--address: got .*such as http"):
        add_context("lab", address=address)
    with pytest.raises(UserError, match=r"--address: got .*such as http"):
        context_for(None, address)
    assert not config.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("contexts: [", "cannot be read"),
        ("contexts: {lab: {adress: http://lab:8265}}", "contexts.lab.address"),
        ("- lab", "valid dictionary"),
    ],
)
def test_a_file_that_is_no_good_is_named(config: Path, text: str, says: str) -> None:
    config.parent.mkdir()
    config.write_text(text)
    with pytest.raises(UserError) as refused:
        context_for(None, None)
    assert str(config_path()) in str(refused.value)
    assert says in str(refused.value)
    assert config.read_text() == text
