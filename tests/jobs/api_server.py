"""As much of Kubernetes' API as the real ``kubectl create`` asks for; objects are kept, and a name is taken once."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

KINDS = {"/api/v1": ("v1", "configmaps", "ConfigMap"), "/apis/ray.io/v1": ("ray.io/v1", "rayjobs", "RayJob")}


def _checked_here(kind: str) -> dict[str, Any]:
    """What tells kubectl that objects of a kind are checked by the server, so that it need not do so itself."""
    return {
        "patch": {
            "parameters": [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun")],
            "x-kubernetes-group-version-kind": {"group": "", "kind": kind, "version": "v1"},
        }
    }


class ApiServer:
    """What it was asked to create, and whether it knows KubeRay's kinds."""

    def __init__(self, kuberay: bool = True) -> None:
        self.kinds = KINDS if kuberay else {"/api/v1": KINDS["/api/v1"]}
        self.objects: list[dict[str, Any]] = []
        self.dry_runs = 0

    def get(self, path: str) -> dict[str, Any] | None:
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            version = {"groupVersion": "ray.io/v1", "version": "v1"}
            groups = [{"name": "ray.io", "versions": [version], "preferredVersion": version}]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups if len(self.kinds) > 1 else []}
        if path in self.kinds:
            group_version, name, kind = self.kinds[path]
            resource = {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": ["create"]}
            return {"kind": "APIResourceList", "groupVersion": group_version, "resources": [resource]}
        if path == "/openapi/v3":
            return {"paths": {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1"}}}
        if path == "/openapi/v3/api/v1":
            # For kinds that come by an operator kubectl looks at what holds for namespaces.
            paths = {f"/{kind}": _checked_here(kind) for kind in ("Namespace", "ConfigMap")}
            return {"openapi": "3.0.0", "info": {"title": "", "version": ""}, "paths": paths}
        if path == "/apis/apiextensions.k8s.io/v1/customresourcedefinitions":
            names = {"group": "ray.io", "names": {"kind": "RayJob"}}
            return {
                "kind": "CustomResourceDefinitionList",
                "apiVersion": "apiextensions.k8s.io/v1",
                "items": [{"spec": names}],
            }
        return None

    def create(self, wanted: dict[str, Any], dry_run: bool) -> tuple[int, dict[str, Any]]:
        key = (wanted["kind"], wanted["metadata"]["name"])
        if any((each["kind"], each["metadata"]["name"]) == key for each in self.objects):
            message = f"{key[0]} {key[1]!r} already exists"
            return 409, {"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "message": message}
        if dry_run:
            self.dry_runs += 1
        else:
            self.objects.append(wanted)
        return 201, wanted


@contextlib.contextmanager
def api_server(folder: Path, kuberay: bool = True) -> Iterator[tuple[ApiServer, Path]]:
    """A server on loopback, and a file for ``KUBECONFIG`` that names it."""
    server = ApiServer(kuberay)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            found = server.get(urlsplit(self.path).path)
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            self._answer(200 if found else 404, found or missing)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            url = urlsplit(self.path)
            assert url.path.split("/")[-2] == body["metadata"]["namespace"]
            self._answer(*server.create(body, "dryRun" in parse_qs(url.query)))

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    config = folder / "kubeconfig"
    cluster = {"server": f"http://127.0.0.1:{httpd.server_port}"}
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "here", "cluster": cluster}],
                "users": [{"name": "me", "user": {}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
                "current-context": "here",
            }
        )
    )
    try:
        yield server, config
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
