"""Registered models: which version is champion, who takes its place, and where its files are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import RunError, UserError
from cluster.evaluate.gate import KEPT, PROMOTED, ROLLED_BACK, Verdict
from cluster.registry.client import (
    CHALLENGER,
    CHAMPION,
    MISSING,
    PATIENCE_S,
    AwayError,
    client_of,
    is_away,
    is_unmade,
    patiently,
    shown,
)

R = TypeVar("R")

# Tags: of a registered model its champions, the latest last; of a version and its run what became of it, and why.
CHAMPIONS, PROMOTION, REASON = "stillhouse.champions", "stillhouse.promotion", "stillhouse.promotion_reason"
# Of a version: SHA-256 over its weights, as they were when they were registered.
WEIGHTS = "stillhouse.weights_sha256"


class ChampionMovedError(RunError):
    """The champion is not the one that the new version was compared with."""


@dataclass(frozen=True)
class Standing:
    """Which versions of a registered model are what.

    Attributes:
        line: its champions, the latest last; empty before the first promotion.
    """

    champion: int | None
    challenger: int | None
    line: tuple[int, ...]


class Models:
    """Promotes versions of registered models, and takes that back.

    Args:
        patience_s: how long MLflow may be away; then an AwayError is raised.
    """

    def __init__(self, tracking_uri: str, patience_s: float = PATIENCE_S) -> None:
        self._where, self._patience_s = shown(tracking_uri), patience_s
        # MLflow connects to a database here already.
        self._client: Any = self._do(client_of, tracking_uri)

    def _do(self, work: Callable[..., R], *arguments: str) -> R:
        try:
            return patiently(partial(work, *arguments), self._patience_s)
        except Exception as error:
            if not is_away(error):
                raise
            raise AwayError(f"MLflow {self._where} does not answer: {str(error).splitlines()[0]}") from error

    def _if_there(self, work: Callable[..., R], *arguments: str) -> R | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._do(work, *arguments)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            return None

    def standing(self, name: str) -> Standing | None:
        """How a registered model stands; None where there is no such model."""
        # Not searched for: a search leaves out the aliases on SQLite.
        model = self._if_there(self._client.get_registered_model, name)
        if model is None:
            return None
        champion, challenger = (model.aliases.get(alias) for alias in (CHAMPION, CHALLENGER))
        line = tuple(int(version) for version in model.tags.get(CHAMPIONS, "").split(",") if version)
        return Standing(int(champion) if champion else None, int(challenger) if challenger else None, line)

    def known(self, name: str) -> Standing:
        """How a registered model stands that a user has named.

        Raises:
            UserError: there is no such model.
        """
        standing = self.standing(name)
        if standing is None:
            raise UserError(f"there is no registered model {name!r} in {self._where}; its name is FAMILY-STUDENT")
        return standing

    def resolve(self, uri: str) -> tuple[str, int]:
        """The registered model and the version that ``models:/name@alias`` or ``models:/name/version`` means now.

        Raises:
            UserError: there is no such model, alias or version.
        """
        name, at, alias = uri.removeprefix("models:/").partition("@")
        if at:
            model = self._if_there(self._client.get_registered_model, name)
            number = model.aliases.get(alias) if model else None
        else:
            name, _, number = name.rpartition("/")
        if number is None or self._if_there(self._client.get_model_version, name, str(number)) is None:
            raise UserError(f"{uri}: not in the registry {self._where}")
        return name, int(number)

    def check_weights(self, uri: str, folder: Path) -> None:
        """Hold a version's files against the hash that was taken when it was registered, if one was.

        Raises:
            UserError: there is no such version.
            RunError: they are others now.
        """
        name, version = self.resolve(uri)
        noted = self._do(self._client.get_model_version, name, str(version)).tags.get(WEIGHTS)
        if noted is not None and noted != weights_digest(folder):
            raise RunError(f"{uri}: its weights are not those that were registered (SHA-256 differs); register it anew")

    def point(self, name: str, alias: str, version: int, why: str) -> None:
        """Point any alias at a version; ``champion`` as :meth:`promote` does it, whatever it pointed at."""
        if alias == CHAMPION:
            self.promote(name, version, why, self.known(name).champion)
        else:
            self._do(self._client.set_registered_model_alias, name, alias, str(version))

    def verdict(self, name: str, version: int) -> Verdict | None:
        """What has become of a version, as :meth:`promote`, :meth:`keep` and :meth:`rollback` have left it."""
        tags = self._do(self._client.get_model_version, name, str(version)).tags
        return Verdict(tags[PROMOTION], tags.get(REASON, "")) if PROMOTION in tags else None

    def promote(self, name: str, version: int, why: str, expected: int | None) -> None:
        """Point ``champion`` at a version, which is no ``challenger`` any more. Once more does no more.

        Each step leaves what the next try needs, and the version's tag is the last. MLflow has no exchange in one step:
        somebody else who promotes in the same milliseconds is not noticed.

        Args:
            expected: the champion that the version was compared with; None where there was none.

        Raises:
            UserError: there is no such model or version.
            ChampionMovedError: another version is champion than ``expected``; nothing is changed.
        """
        now = self.known(name)
        if self._if_there(self._client.get_model_version, name, str(version)) is None:
            raise UserError(f"{name} has no version {version} in {self._where}")
        if now.champion not in (expected, version):
            there, then = (f"v{each}" if each else "none" for each in (now.champion, expected))
            raise ChampionMovedError(
                f"the champion is {there} now, not {then} as when v{version} was compared; promote it by hand if it is "
                f"better"
            )
        if now.champion != version:
            self._set_line(name, (*_up_to(now.line, expected), version))
            self._do(self._client.set_registered_model_alias, name, CHAMPION, str(version))
        if now.challenger == version:
            self._do(self._client.delete_registered_model_alias, name, CHALLENGER)
        self._record(name, version, Verdict(PROMOTED, why))

    def keep(self, name: str, version: int, why: str) -> None:
        """Record why a version stays what it is."""
        self._record(name, version, Verdict(KEPT, why))

    def rollback(self, name: str) -> tuple[int, int]:
        """Point ``champion`` at the version that was it before.

        Returns:
            The versions that it pointed at and points at now.

        Raises:
            UserError: no such model, no champion, or none before it that is still there.
        """
        now = self.known(name)
        if now.champion is None:
            raise UserError(f"{name} has no champion, so there is nothing to roll back; see `stillhouse promote`")
        earlier = _up_to(now.line, now.champion)[:-1]
        while earlier and not self._may_return(name, earlier[-1], now.champion):
            earlier = earlier[:-1]
        if not earlier:
            raise UserError(f"{name} had no champion before v{now.champion}, so there is nothing to roll back to")
        # The line first: a try that breaks off here is not taken for one that has done its work.
        self._set_line(name, earlier)
        self._do(self._client.set_registered_model_alias, name, CHAMPION, str(earlier[-1]))
        self._record(name, now.champion, Verdict(ROLLED_BACK, f"v{earlier[-1]} was put back in its place by hand"))
        return now.champion, earlier[-1]

    def _may_return(self, name: str, version: int, champion: int) -> bool:
        there = self._if_there(self._client.get_model_version, name, str(version)) is not None
        return there and version != champion

    def _set_line(self, name: str, line: Iterable[int]) -> None:
        self._do(self._client.set_registered_model_tag, name, CHAMPIONS, ",".join(map(str, line)))

    def _record(self, name: str, version: int, verdict: Verdict) -> None:
        run_id = self._do(self._client.get_model_version, name, str(version)).run_id
        tags = {REASON: verdict.reason, PROMOTION: verdict.outcome}
        run = self._if_there(self._client.get_run, run_id) if run_id else None
        # MLflow refuses tags on one that is deleted and can be restored.
        if run is not None and run.info.lifecycle_stage == "active":
            for key, value in tags.items():
                self._do(self._client.set_tag, run_id, key, value)
        for key, value in tags.items():
            self._do(self._client.set_model_version_tag, name, str(version), key, value)


def _up_to(line: tuple[int, ...], champion: int | None) -> tuple[int, ...]:
    """A line of champions that ends with this one: what was written behind it is of a try that broke off, or undone.

    One that is not in it was made champion past us, and comes at its end.
    """
    if champion is None:
        return line
    if champion not in line:
        return (*line, champion)
    return line[: len(line) - line[::-1].index(champion)]


def weights_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, over the names and the bytes of a folder's safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def champion_of(name: str, tracking_uri: str) -> int | None:
    """The version of a registered model that is its champion; none where there is no such model or no champion yet.

    Raises:
        RunError: the registry cannot be reached, or refuses to say.
    """
    if is_unmade(tracking_uri):
        return None
    try:
        version = client_of(tracking_uri).get_registered_model(name).aliases.get(CHAMPION)
    except ImportError:
        raise
    except Exception as error:  # every database's driver raises its own
        if getattr(error, "error_code", None) == MISSING:
            return None
        where = shown(tracking_uri)
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(tracking_uri, where)
        raise RunError(f"the registry {where} does not say which {name} is the champion: {reason}") from error
    return None if version is None else int(version)
