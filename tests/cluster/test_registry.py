"""Champions in a real MLflow on SQLite: promoted against the one compared with, and put back."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RunError, UserError
from cluster.evaluate.gate import KEPT, PROMOTED, ROLLED_BACK, Verdict
from cluster.registry import (
    CHAMPIONS,
    PROMOTION,
    REASON,
    ChampionMovedError,
    Models,
    Standing,
    check_experiment,
    client,
    default_tracking_uri,
    fetch_model,
    on_this_node,
    tracking_uri_of_environment,
)
from cluster.registry.family import Registry as FamilyRegistry
from cluster.registry.models import WEIGHTS, weights_digest

NAME = "demo-small"


def test_a_variable_that_names_no_server_or_database_is_refused_without_what_it_hides(
    monkeypatch: pytest.MonkeyPatch, stillhouse_home: Path
) -> None:
    assert default_tracking_uri() == f"sqlite:///{stillhouse_home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert default_tracking_uri() == tracking_uri_of_environment() == "http://mlflow:5000"
    for folder, shown in (("./mlruns", "'./mlruns'"), ("ftp://ada:secret@host", "'ftp'")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", folder)
        with pytest.raises(UserError, match=rf"^MLFLOW_TRACKING_URI: got {shown}; allowed are http") as refused:
            default_tracking_uri()
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("given", [None, "http://mlflow:5000"])
def test_a_client_leaves_the_user_s_variable_as_it_is(
    given: str | None, monkeypatch: pytest.MonkeyPatch, empty_registry: Path, tmp_path: Path
) -> None:
    """MLflow sets it, and what is started without a URI afterwards would use a registry that nobody named."""
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    shutil.copy(empty_registry, tmp_path / "mlflow.db")
    Models(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert os.environ.get("MLFLOW_TRACKING_URI") == given


def test_a_deleted_experiment_is_refused_in_one_line_and_restored_it_is_used(
    empty_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    # The actor has its process to itself, and changes it.
    monkeypatch.setattr("os.nice", lambda _: 0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert check_experiment(uri, "demo") is None and not (tmp_path / "mlflow.db").exists()
    shutil.copy(empty_registry, tmp_path / "mlflow.db")
    assert check_experiment(uri, "demo") is None
    there: Any = mlflow.MlflowClient(uri)
    number = there.create_experiment("demo", str(tmp_path / "artifacts"))
    there.delete_experiment(number)
    said = rf"^tracking.experiment: 'demo' is deleted in MLflow {uri}; .* restore --experiment-id {number}$"
    with pytest.raises(UserError, match=said):
        check_experiment(uri, "demo")
    actor = FamilyRegistry(uri, "demo", str(tmp_path / "artifacts"))
    with pytest.raises(UserError, match=said):
        actor.start("demo-1", {}, {"students": {}}, {}, {}, "key")
    there.restore_experiment(number)
    assert check_experiment(uri, "demo") is None


def test_an_mlflow_that_is_away_delays_a_run_and_refuses_none() -> None:
    notice = check_experiment("http://ada:secret@127.0.0.1:9", "demo")
    assert notice is not None and "MLflow http://127.0.0.1:9 does not answer" in notice and "secret" not in notice


def test_an_mlflow_that_accepts_and_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CHECK_S", 0.2)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        notice = check_experiment(f"http://127.0.0.1:{silent.getsockname()[1]}", "demo")
    assert notice is not None and "has not answered for 0.2 s; a run waits for it" in notice
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_database_that_is_none_is_named_in_one_line(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (tmp_path / "mlflow.db").write_text("this is text\n" * 100)
    for ask in (lambda: check_experiment(uri, "demo"), lambda: fetch_model("models:/demo/1", uri)):
        with pytest.raises(RunError, match=rf"^MLflow {uri} refuses: .*file is not a database$"):
            ask()


class Registry:
    """A registry with one model of some versions, each with a run of its own; the last is the challenger."""

    def __init__(self, folder: Path, empty: Path) -> None:
        import mlflow

        shutil.copy(empty, folder / "mlflow.db")
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client: Any = mlflow.MlflowClient(self.uri)
        self.models = Models(self.uri)
        self.client.create_registered_model(NAME)
        self.experiment = self.client.create_experiment("demo", str(folder / "artifacts"))

    def register(self, model: Path | None = None) -> int:
        """One more version, as a nightly family leaves it; with ``model`` it has files."""
        run = self.client.create_run(self.experiment).info.run_id
        source = str(model or self.folder / "nothing")
        version = int(self.client.create_model_version(NAME, source, run).version)
        self.client.set_registered_model_alias(NAME, "challenger", str(version))
        return version

    def aliases(self) -> dict[str, int]:
        """Asked for one by one, as whoever loads a model does."""
        from mlflow.exceptions import MlflowException

        found = {}
        for alias in ("champion", "challenger"):
            try:
                found[alias] = int(self.client.get_model_version_by_alias(NAME, alias).version)
            except MlflowException:
                continue
        return found

    def line(self) -> str | None:
        """The tag with the line of champions."""
        return self.client.get_registered_model(NAME).tags.get(CHAMPIONS)  # type: ignore[no-any-return]

    def promoted(self, count: int) -> None:
        """Register some versions and promote each."""
        for version in range(1, count + 1):
            assert self.register() == version
            self.models.promote(NAME, version, "better", version - 1 or None)


@pytest.fixture
def registry(tmp_path: Path, empty_registry: Path) -> Registry:
    return Registry(tmp_path, empty_registry)


def test_the_first_version_becomes_champion_and_is_no_challenger_any_more(registry: Registry) -> None:
    version = registry.register()
    assert registry.models.standing(NAME) == Standing(None, version, ())
    registry.models.promote(NAME, version, "there was no champion", None)
    assert registry.aliases() == {"champion": version}
    assert registry.models.standing(NAME) == Standing(version, None, (version,))


def test_a_verdict_is_on_the_version_and_on_its_run(registry: Registry) -> None:
    first, second = registry.register(), registry.register()
    assert registry.models.verdict(NAME, first) is None
    registry.models.promote(NAME, first, "better", None)
    registry.models.keep(NAME, second, "worse")
    for version, outcome, reason in ((first, PROMOTED, "better"), (second, KEPT, "worse")):
        assert registry.models.verdict(NAME, version) == Verdict(outcome, reason)
        found = registry.client.get_model_version(NAME, str(version))
        assert registry.client.get_run(found.run_id).data.tags.items() >= {PROMOTION: outcome, REASON: reason}.items()
    # One that was kept stays what it was.
    assert registry.aliases() == {"champion": first, "challenger": second}


def test_another_champion_than_the_one_compared_with_stops_a_promotion_and_nothing_changes(registry: Registry) -> None:
    registry.promoted(2)
    third = registry.register()
    for expected in (None, 1):
        with pytest.raises(ChampionMovedError, match=r"the champion is v2 now, not (none|v1) as when v3 was compared"):
            registry.models.promote(NAME, third, "better", expected)
    assert registry.aliases() == {"champion": 2, "challenger": third}
    assert registry.line() == "1,2"
    assert registry.models.verdict(NAME, third) is None


def test_a_promotion_that_is_done_again_does_no_more(registry: Registry) -> None:
    registry.promoted(1)
    registry.register()
    for _ in range(3):
        registry.models.promote(NAME, 2, "better", 1)
    assert (registry.aliases(), registry.line()) == ({"champion": 2}, "1,2")


def test_a_promotion_that_broke_off_after_any_step_is_finished_by_the_next_try(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promoted(1)
    steps = ("set_registered_model_alias", "delete_registered_model_alias", "set_tag")
    for broken, step in enumerate(steps, start=2):
        before = broken - 1
        assert registry.register() == broken

        def fail(*_: object, step: str = step) -> None:
            raise OSError(f"{step} broke off")

        with monkeypatch.context() as patch:
            patch.setattr(registry.models._client, step, fail)
            with pytest.raises(OSError, match=step):
                registry.models.promote(NAME, broken, "better", before)
        assert registry.models.verdict(NAME, broken) is None
        registry.models.promote(NAME, broken, "better", before)
        assert registry.aliases() == {"champion": broken}
        assert registry.line() == ",".join(map(str, range(1, broken + 1)))


def test_rolling_back_goes_along_the_line_and_ends_at_its_first(registry: Registry) -> None:
    registry.promoted(3)
    assert registry.models.rollback(NAME) == (3, 2)
    assert (registry.aliases(), registry.line()) == ({"champion": 2}, "1,2")
    found = registry.models.verdict(NAME, 3)
    assert found is not None and (found.outcome, found.promoted) == (ROLLED_BACK, False)
    assert registry.models.rollback(NAME) == (2, 1)
    with pytest.raises(UserError, match=r"no champion before v1"):
        registry.models.rollback(NAME)
    assert (registry.aliases(), registry.line()) == ({"champion": 1}, "1")
    # A line that was gone back goes on from there.
    registry.models.promote(NAME, 3, "after all", 1)
    assert registry.line() == "1,3"
    assert registry.models.verdict(NAME, 3) == Verdict(PROMOTED, "after all")


def test_a_rollback_that_broke_off_goes_one_step_and_not_two(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promoted(3)

    def fail(*_: object) -> None:
        raise OSError("broke off")

    with monkeypatch.context() as patch:
        patch.setattr(registry.models._client, "set_registered_model_alias", fail)
        with pytest.raises(OSError, match="broke off"):
            registry.models.rollback(NAME)
    assert registry.models.rollback(NAME) == (3, 2)
    assert registry.line() == "1,2"


def test_rolling_back_passes_over_versions_that_were_deleted(registry: Registry) -> None:
    registry.promoted(3)
    registry.client.delete_model_version(NAME, "2")
    assert registry.models.rollback(NAME) == (3, 1)


def test_a_champion_that_somebody_set_past_us_is_rolled_back_to_ours(registry: Registry) -> None:
    registry.promoted(2)
    third = registry.register()
    registry.client.set_registered_model_alias(NAME, "champion", str(third))
    assert registry.models.rollback(NAME) == (third, 2)
    # And one set back past us counts as where the line stands.
    registry.client.set_registered_model_alias(NAME, "champion", "1")
    registry.models.promote(NAME, third, "better", 1)
    assert registry.line() == f"1,{third}"


def test_what_is_not_there_is_a_mistake_in_one_line(registry: Registry) -> None:
    registry.register()
    with pytest.raises(UserError, match=r"no champion, so there is nothing to roll back"):
        registry.models.rollback(NAME)
    with pytest.raises(UserError, match=r"demo-small has no version 7"):
        registry.models.promote(NAME, 7, "by hand", None)
    for work in (lambda: registry.models.rollback("other"), lambda: registry.models.promote("other", 1, "", None)):
        with pytest.raises(UserError, match=r"no registered model 'other'.*FAMILY-STUDENT"):
            work()
    assert registry.line() is None


def test_a_version_whose_run_was_deleted_for_good_can_be_promoted(registry: Registry) -> None:
    version = int(registry.client.create_model_version(NAME, str(registry.folder), "0" * 32).version)
    registry.models.promote(NAME, version, "by hand", None)
    assert registry.models.verdict(NAME, version) == Verdict(PROMOTED, "by hand")


def test_versions_whose_runs_are_deleted_in_mlflow_are_promoted_kept_and_rolled_back(registry: Registry) -> None:
    experiment = registry.client.create_experiment("tidied")
    for _ in range(2):
        run_id = registry.client.create_run(experiment).info.run_id
        registry.client.create_model_version(NAME, str(registry.folder), run_id)
        registry.client.delete_run(run_id)
    registry.models.promote(NAME, 1, "by hand", None)
    registry.models.promote(NAME, 2, "by hand", 1)
    assert registry.models.rollback(NAME) == (2, 1)
    registry.models.keep(NAME, 2, "why not")
    assert registry.models.verdict(NAME, 2) == Verdict(KEPT, "why not")
    assert registry.models.verdict(NAME, 1) == Verdict(PROMOTED, "by hand")


def test_a_registry_that_does_not_answer_is_named_in_one_line(registry: Registry, monkeypatch: Any) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("connection refused\nand much more")

    hasty = Models(registry.uri, patience_s=0.0)
    monkeypatch.setattr(hasty._client, "get_registered_model", refuse)
    with pytest.raises(RunError, match=rf"^MLflow {registry.uri} does not answer: connection refused$"):
        hasty.standing(NAME)


def test_a_model_is_fetched_into_a_folder_and_one_whose_files_are_gone_says_so(
    registry: Registry, tiny_teacher: Path, tmp_path: Path
) -> None:
    kept = shutil.copytree(tiny_teacher, tmp_path / "kept")
    version = registry.register(kept)
    put = tmp_path / "put"
    put.mkdir()
    found = fetch_model(f"models:/{NAME}/{version}", registry.uri, put)
    assert found.is_relative_to(put) and (found / "model.safetensors").is_file()
    shutil.rmtree(kept)
    (again := tmp_path / "again").mkdir()
    with pytest.raises(RunError, match="its files are gone"):
        fetch_model(f"models:/{NAME}/{version}", registry.uri, again)


def test_a_uri_is_resolved_to_the_version_it_means_now(registry: Registry) -> None:
    registry.promoted(2)
    registry.register()
    resolved = {uri: registry.models.resolve(f"models:/{NAME}{uri}") for uri in ("@champion", "@challenger", "/1")}
    assert resolved == {"@champion": (NAME, 2), "@challenger": (NAME, 3), "/1": (NAME, 1)}
    for uri in (f"models:/{NAME}@nobody", f"models:/{NAME}/9", "models:/none@champion", "models:/none/1"):
        with pytest.raises(UserError, match=f"{uri}: not in the registry"):
            registry.models.resolve(uri)


def test_an_alias_is_pointed_and_champion_keeps_its_line(registry: Registry) -> None:
    registry.promoted(2)
    registry.register()
    registry.models.point(NAME, "fastest", 1, "it is")
    registry.models.point(NAME, "champion", 3, "faster")
    assert registry.models.resolve(f"models:/{NAME}@fastest") == (NAME, 1)
    assert registry.aliases()["champion"] == 3 and registry.line() == "1,2,3"
    assert registry.models.rollback(NAME) == (3, 2)


def test_weights_are_held_against_the_hash_of_their_registration(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    (folder / "b.safetensors").write_bytes(b"two")
    version = registry.register(folder)
    uri = f"models:/{NAME}/{version}"
    registry.models.check_weights(uri, folder)  # none was taken: nothing to hold them against
    registry.client.set_model_version_tag(NAME, str(version), WEIGHTS, weights_digest(folder))
    registry.models.check_weights(uri, folder)
    for name, content in (("a.safetensors", b"onE"), ("b.safetensors", b""), ("c.safetensors", b"more")):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        with pytest.raises(RunError, match="its weights are not those that were registered"):
            registry.models.check_weights(uri, folder)
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    registry.models.check_weights(uri, folder)


def test_a_folder_that_another_node_found_has_to_be_here_too(tiny_teacher: Path, tmp_path: Path) -> None:
    assert on_this_node(str(tiny_teacher)) == tiny_teacher
    with pytest.raises(RunError, match=r"there is not on the node .*: all nodes have to see .* HF_HOME"):
        on_this_node(tmp_path / "there")
