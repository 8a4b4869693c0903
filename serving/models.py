"""The models of an endpoint's arms: found, fetched and checked before anything of it starts, or ends."""

from __future__ import annotations

from pathlib import Path

from serving.arms import Arm, locate, pinned
from serving.spec import EndpointSpec

Models = dict[str, Path | None]
"""Of every arm, where its model is; None for one of the echo engine."""


def find_models(spec: EndpointSpec, tracking_uri: str | None) -> tuple[EndpointSpec, Models]:
    """The spec with a version in place of every alias, so that it stays what it is, and where the models are.

    Args:
        tracking_uri: where the registry is; needed when a source is a ``models:/`` URI.

    Raises:
        UserError: an arm has no such model, version or directory, or it lacks a part.
        RunError: the registry knows a version whose files are gone.
    """
    sources = {name: pinned(arm.source, tracking_uri) for name, arm in spec.arms.items()}
    models = {name: locate(Arm(name, source), tracking_uri, spec.arms[name].engine) for name, source in sources.items()}
    arms = {name: arm.model_copy(update={"source": sources[name]}) for name, arm in spec.arms.items()}
    return spec.model_copy(update={"arms": arms}), models
