"""An endpoint by declaration: a Serve application that has one running as its configuration says.

For who deploys by Serve's configuration file or REST API, as KubeRay's RayService does. The application is one small
process beside the doors, the keeper; the endpoint itself is the same as that of ``stillhouse serve``, and its arms can
be rolled and its traffic changed as there. The endpoint's spec is the keeper's ``user_config``:

.. code-block:: yaml

    proxy_location: Disabled
    applications:
      - name: endpoint
        import_path: serving.declared:application
        route_prefix: null
        deployments:
          - name: keeper
            user_config: { endpoint: { arms: { ... } }, tracking_uri: ... }
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError
from ray import serve

from cluster.errors import UserError
from cluster.registry import tracking_uri_of_environment
from cluster.spec.base import Section
from serving.deploy import ON_THE_HEAD, Endpoint, claim, clear, deploy, running
from serving.keys import KeyRing
from serving.models import find_models
from serving.spec import EndpointSpec, checked


class Declared(Section):
    """The keeper's ``user_config``."""

    endpoint: dict[str, Any]
    """As in the file of ``stillhouse serve``, with absolute paths, a port, and a folder for ``state``."""
    tracking_uri: str | None = None
    """Where the registry is, for ``models:/`` sources; none means what ``MLFLOW_TRACKING_URI`` sets on the cluster."""


class Keeper:
    """Has the endpoint running while its application does. The application is RUNNING once the endpoint answers.

    A keeper that takes another's place finds the endpoint and leaves it alone if it is as declared. One that is told of
    another spec checks it first, with its models and its address, then ends the endpoint and starts it anew.
    """

    def __init__(self) -> None:
        self._endpoint: Endpoint | None = None
        self._declared: EndpointSpec | None = None
        """As whoever declares it has written it; a keeper that has found the endpoint does not know."""

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serve calls this with the ``user_config``, once the keeper is made and again when it has changed.

        Raises:
            UserError: it cannot be used, or an arm has no such model. An endpoint that runs goes on.
            RunError: a model's files are gone, and an endpoint that runs goes on; or the new endpoint, whose models are
                there, did not start, and nothing of it is left.
        """
        declared, tracking_uri = _read(config)
        await asyncio.to_thread(self._have, declared, tracking_uri)

    def _have(self, declared: EndpointSpec, tracking_uri: str | None) -> None:
        # Ours from now on, also where the spec cannot be used: it goes when the application does.
        before = self._endpoint = self._endpoint or running(declared)
        if before is not None and self._declared in (None, declared) and _is_as(before.spec, declared):
            self._declared = declared
            return
        # All that can be seen to be wrong is seen while the one before still answers.
        spec, models = find_models(declared, tracking_uri)
        if before is not None:
            claim(spec.host, 0 if spec.port == before.spec.port else spec.port)
            before.shutdown()
        self._endpoint = None
        clear(spec)
        self._endpoint = deploy(spec, tracking_uri, grows=True, models=models)
        self._declared = declared

    async def close(self) -> None:
        """End the endpoint, if its application is to go and not only this process."""
        if self._endpoint is not None and await asyncio.to_thread(_is_to_go):
            await asyncio.to_thread(self._endpoint.shutdown)

    def __del__(self) -> Any:
        """Serve calls this when it ends a replica, and awaits what it returns."""
        return self.close() if getattr(self, "_endpoint", None) is not None else None


def _read(config: dict[str, Any]) -> tuple[EndpointSpec, str | None]:
    try:
        declared = Declared.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise UserError(f"user_config.{where}: {first['msg']}; allowed: endpoint, tracking_uri.") from error
    spec = checked(**declared.endpoint)
    if spec.port == 0:
        raise UserError("port is 0; a declared endpoint needs one that others know.")
    if spec.state is None:
        raise UserError("state is missing; give a folder that is there after a restart.")
    for name, path in (("keys", spec.keys), ("state", spec.state)):
        if path is not None and not path.is_absolute():
            raise UserError(f"{name} is {str(path)!r}; give an absolute path, for there is no file to be relative to.")
    KeyRing(spec.keys)
    return spec, declared.tracking_uri or tracking_uri_of_environment()


def _is_as(here: EndpointSpec, declared: EndpointSpec) -> bool:
    """Whether an endpoint is the declared one. An alias stands for the version that it was started with."""
    arms = {
        name: arm.model_copy(update={"source": here.arms[name].source})
        if name in here.arms and _is_version_of(here.arms[name].source, arm.source)
        else arm
        for name, arm in declared.arms.items()
    }
    return declared.model_copy(update={"arms": arms}) == here


def _is_version_of(source: str, alias: str) -> bool:
    model, at, _ = alias.partition("@")
    return bool(at) and source.rpartition("/")[0] == model


def _is_to_go() -> bool:
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    return application is None or application.status == "DELETING"


application = (
    serve.deployment(Keeper).options(**ON_THE_HEAD | {"name": "keeper", "graceful_shutdown_timeout_s": 600}).bind()
)
"""What ``import_path`` names."""
