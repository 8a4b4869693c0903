"""The files of models, as a directory that every node sees."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cluster.errors import RunError, UserError
from cluster.registry.client import client_of, is_unmade, one_try, patiently, shown
from cluster.registry.models import WEIGHTS, Models, weights_digest
from cluster.specfile import home

log = logging.getLogger(__name__)

# Tags of a version by which its run's folder is found.
FAMILY_TAG, RUN_TAG = "stillhouse.family", "stillhouse.run"


def fetch_model(uri: str, tracking_uri: str, put: Path | None = None, patience_s: float = 0.0) -> Path:
    """Local Hugging Face directory of a registered model.

    Args:
        uri: ``models:/name@alias`` or ``models:/name/version``.
        put: an empty folder for its files. Without it, what MLflow has in this file system stays there, and anything
            else is fetched once per version to below the Stillhouse home, where every node of a cluster finds it.
        patience_s: how long MLflow may be away.

    Raises:
        UserError: no such model, version or alias.
        RunError: the registry knows it, but it holds no transformers model, or its files are gone; or the registry
            cannot be used.
    """
    if is_unmade(tracking_uri):
        raise UserError(f"{uri}: not in the registry {shown(tracking_uri)}, which holds nothing yet")
    with one_try(tracking_uri):
        client = client_of(tracking_uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    def fetch() -> Path:
        if put is None:
            return _fetched_once(client, uri, tracking_uri)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(put)))

    try:
        folder = patiently(fetch, patience_s)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{uri}: not in the registry {shown(tracking_uri)}: {reason}") from None
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    if not any(folder.iterdir()):
        raise RunError(f"{uri}: registered, but its files are gone")
    raise RunError(f"{uri}: registered, but it is not a transformers model")


def on_this_node(folder: str | Path) -> Path:
    """A model's folder that another node has found, looked for here.

    Raises:
        RunError: it is not here; says what nodes have to share.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunError(
            f"{path} is not on the node {socket.gethostname()}: all nodes have to see the Stillhouse home, HF_HOME and "
            f"local models under the same paths"
        )
    return path


def local_folder(uri: str) -> Path | None:
    """The folder that an artifact URI names in this file system; None for one that lies elsewhere."""
    parts = urlsplit(uri)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def share_weights(folder: Path, registered: Path, digest: str) -> None:
    """Make a model's weights hard links to those that MLflow copied, so that they are stored once.

    Both are never written to again. Each name can be removed without the other. Does nothing where the copy differs,
    or where the file system does not allow it.

    Args:
        folder: the model in its run's folder.
        digest: of its weights, see :func:`~cluster.registry.models.weights_digest`.
    """
    copies = {file: registered / file.name for file in folder.glob("*.safetensors")}
    try:
        if all(copy.samefile(file) for file, copy in copies.items()):
            return
        if weights_digest(registered) != digest:
            log.warning("%s is stored twice: the weights in %s are not the same", folder, registered)
            return
        for file, copy in copies.items():
            aside = file.with_name(f".{file.name}.part")
            aside.unlink(missing_ok=True)
            os.link(copy, aside)
            aside.replace(file)
    except OSError as error:
        log.info("%s is stored twice: %s", folder, error)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _in_run_folder(name: str, tags: Mapping[str, str]) -> Path | None:
    """A version's files in the folder of the run that made it, where this machine sees it and its weights agree."""
    family, run, digest = tags.get(FAMILY_TAG, ""), tags.get(RUN_TAG, ""), tags.get(WEIGHTS)
    student = name.removeprefix(f"{family}-")
    parts = (family, run, student)
    if digest is None or any(not part or Path(part).name != part for part in parts):
        return None
    kept = (home() / "runs" / family / run / "students" / student).glob("checkpoint_*/model")
    return next((folder for folder in kept if weights_digest(folder) == digest), None)


def _fetched_once(client: Any, uri: str, tracking_uri: str) -> Path:
    """Where a version's files lie for good. An alias may move meanwhile, so it is the version that is fetched."""
    import mlflow

    name, version = Models(tracking_uri, patience_s=0.0).resolve(uri)
    exact = f"models:/{name}/{version}"
    source = client.get_model_version_download_uri(name, str(version))
    if local_folder(source) is not None:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=exact))
    # Another registry may have a model of this name, and so may this one when it was deleted and made anew.
    digest = hashlib.sha256(f"{tracking_uri} {source}".encode()).hexdigest()[:12]
    place = home() / "models" / f"{name}-{version}-{digest}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=place.parent) as half:
        files = Path(half) / "files"
        if (kept := _in_run_folder(name, client.get_model_version(name, str(version)).tags)) is not None:
            shutil.copytree(kept, files, copy_function=_link_or_copy)
        else:
            files.mkdir()
            mlflow.artifacts.download_artifacts(artifact_uri=exact, dst_path=str(files))
        if not any(files.iterdir()):
            raise RunError(f"{uri}: registered, but its files are gone")
        try:
            files.rename(place)
        except OSError:
            if not place.is_dir():  # nobody else has fetched it meanwhile
                raise
    return place
