"""What a door answers: OpenAI's API, health, metrics, and the administration of the traffic."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import Scope

from cluster import tracing
from serving.api.errors import ApiError, try_again
from serving.api.openapi import openapi
from serving.api.replies import model_card, model_list
from serving.api.requests import ChatRequest, CompletionRequest, Request, parse, parse_json
from serving.ingress.arms import Arms
from serving.ingress.http import (
    ClientGone,
    Receive,
    Send,
    read_body,
    send_error,
    send_json,
    send_text,
    while_connected,
)
from serving.ingress.relay import ARM_HEADER, Relay, Ticket
from serving.ingress.shadow import Shadow
from serving.keys import Key, KeyRing
from serving.spec import EndpointSpec

SESSION_HEADER = "x-session-id"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_KINDS: dict[str, type[Request]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}

# What may be asked of the control, and how. A POST to /admin/arms/{arm} is the one path with a name in it.
_ADMIN = {
    ("GET", "/admin/traffic"): "traffic",
    ("PUT", "/admin/traffic"): "set_traffic",
    ("POST", "/admin/ramp"): "ramp",
    ("POST", "/admin/experiment"): "ab_start",
    ("GET", "/admin/experiment"): "ab_status",
    ("DELETE", "/admin/experiment"): "ab_stop",
    ("GET", "/admin/experiment/report"): "ab_report",
}
_ROLL = "/admin/arms/"
# What KubeRay asks Serve's proxy; where it is off, the door answers in its place, in the proxy's word.
_KUBERAY = "/-/healthz"
# The second is what vLLM's servers call it, and what tools made for them ask first.
_HEALTH = ("/healthz", "/health")

logger = logging.getLogger("ray.serve")
AskControl = Callable[[str, Any], Awaitable[tuple[int, Any]]]


async def _traced(answer: Awaitable[None], parent: str, model: str) -> None:
    with tracing.trace("request", parent, model=model):
        await answer


class App:
    """The ASGI application of a door.

    ``model`` equal to the endpoint's name means "split by weight"; an arm's name, or the header ``x-stillhouse-arm``,
    asks for that arm. Every answer that an arm had a part in names it in that header, errors and streams too.
    """

    def __init__(
        self, spec: EndpointSpec, keys: KeyRing, arms: Arms, relay: Relay, shadow: Shadow, ask_control: AskControl
    ) -> None:
        self._spec, self._keys, self._arms, self._relay, self._shadow = spec, keys, arms, relay, shadow
        self._ask_control = ask_control
        self._created = int(time.time())
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        begun = time.perf_counter()
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close"})
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            await self._route(scope["method"], scope["path"], headers, receive, send, begun)
        except ApiError as error:
            await send_error(send, error)
        except ClientGone:
            return
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            # Where the answer has begun, uvicorn closes the connection over this.
            await send_error(send, ApiError(500, "The server failed; its log says why.", code="server_failed"))

    async def _route(
        self, method: str, path: str, headers: Headers, receive: Receive, send: Send, begun: float
    ) -> None:
        if path in _KINDS:
            self._check_method(method, "POST", path)
            with self._room():
                await self._complete(_KINDS[path], headers, receive, send, begun)
        elif path.startswith("/admin/"):
            await self._administer(method, path, headers, receive, send)
        else:
            self._check_method(method, "GET", path)
            await self._tell(path, headers, send)

    @staticmethod
    def _check_method(method: str, allowed: str, path: str) -> None:
        if method != allowed:
            raise ApiError(405, f"{method} {path}: not allowed; use {allowed}.", headers={"Allow": allowed})

    # ---- completions ----

    @contextmanager
    def _room(self) -> Iterator[None]:
        """One of the requests that this door has room for. Who only asks how it is does not need it."""
        most = self._spec.limits.requests
        if self._under_way >= most:
            raise try_again(503, f"This server has {most} requests under way, all it takes; try again.", "overloaded")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _complete(
        self, kind: type[Request], headers: Headers, receive: Receive, send: Send, begun: float
    ) -> None:
        key = self._admit(headers)
        if key is None:
            self._check_json(headers)
        limits = self._spec.limits
        raw = await read_body(receive, headers.get("content-length"), limits.body_bytes, limits.body_timeout_s)
        request = parse(kind, raw)
        arm = self._asked_for(request, headers, key)
        name = key.name if key else ""
        plan = self._arms.plan
        ticket = Ticket(
            request,
            arm,
            self._unit(request, headers, name),
            name,
            sampled=arm is None and plan.sample > 0 and random.random() < plan.sample,
            begun=begun,
            experiment=plan.experiment,
        )
        if arm is None and plan.shadow:
            self._shadow.copy(request, name)
        if self._spec.log_requests:
            logger.warning("request of %r: %s", name, raw.decode("utf-8", "replace"))
        answer = self._relay.answer(ticket, send)
        if tracing.on():
            answer = _traced(answer, headers.get("traceparent", ""), request.model)
        await while_connected(receive, answer)
        if self._spec.log_requests:
            logger.warning("answer to %r: %s", name, ["".join(choice.text) for choice in ticket.choices])

    def _asked_for(self, request: Request, headers: Headers, key: Key | None) -> str | None:
        """The arm that is asked for by name; None for the split."""
        self._check_model(request.model)
        named = None if request.model == self._spec.name else request.model
        if forced := headers.get(ARM_HEADER):
            if forced not in self._arms.names:
                raise ApiError(400, f"{ARM_HEADER}: {self._unknown(forced)}", param=ARM_HEADER, code="arm_not_found")
            named = forced
        if named and key and not key.may_ask(named):
            raise ApiError(
                403, f"This key may not ask for arm {named!r}; ask for {self._spec.name!r}.", code="arm_denied"
            )
        return named

    def _unit(self, request: Request, headers: Headers, key: str) -> str:
        """What the draw goes by: who asks, if that is known, so that the same one comes to the same arm."""
        known = {"session": headers.get(SESSION_HEADER), "user": request.caller, "key": key}
        for kind in self._spec.sticky:
            if value := known[kind]:
                return f"{kind}:{value}"
        return secrets.token_hex(16)

    def _check_model(self, model: str) -> None:
        if model != self._spec.name and model not in self._arms.names:
            raise ApiError(404, self._unknown(model), param="model", code="model_not_found")

    def _unknown(self, model: str) -> str:
        known = ", ".join([self._spec.name, *self._arms.names])
        return f"The model {model[:80]!r} does not exist; there are: {known}."

    # ---- who may come in ----

    def _admit(self, headers: Headers, count: bool = True) -> Key | None:
        """The key of a request; None where no keys are asked for."""
        if self._keys.is_open:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                401,
                "No valid API key: send one as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if count and (wait_s := self._keys.wait_s(key)):
            message = f"Key {key.name!r} has made its {key.requests_per_minute} requests of this minute."
            raise try_again(429, message, "rate_limit_exceeded", wait_s)
        return key

    def _admit_admin(self, headers: Headers) -> None:
        key = self._admit(headers, count=False)
        if key is not None and not key.admin:
            raise ApiError(403, f"Key {key.name!r} may not do this; it takes an admin key.", code="admin_only")

    def _check_host(self, headers: Headers) -> None:
        """Without keys, only this machine's own programs are meant: no page that a browser here has open elsewhere."""
        if not self._keys.is_open:
            return
        host = headers.get("host", "").strip()
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name not in _LOOPBACK and name != self._spec.host:
            raise ApiError(421, f"This server does not answer as {host[:80]!r}.", code="wrong_host")

    @staticmethod
    def _check_json(headers: Headers) -> None:
        """Some web page's form or script can send anything but this without asking first, and our host name with it."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            message = "Send the body as `Content-Type: application/json`."
            raise ApiError(415, message, code="wrong_content_type")

    # ---- the rest ----

    async def _tell(self, path: str, headers: Headers, send: Send) -> None:
        if path in _HEALTH:
            return await send_json(send, 200, {"status": "ok", "endpoint": self._spec.name}, {})
        if path in ("/readyz", _KUBERAY):
            return await self._readyz(path, send)
        if path == "/openapi.json":
            return await send_json(send, 200, openapi(self._spec.name), {})
        if path == "/metrics":
            self._admit_admin(headers)
            status, text = await self._ask_control("metrics", None)
            return await send_text(send, status, "text/plain; version=0.0.4; charset=utf-8", text)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            self._admit(headers)
            names = [self._spec.name, *self._arms.names]
            if path == "/v1/models":
                return await send_json(send, 200, model_list(names, self._created), {})
            name = unquote(path.removeprefix("/v1/models/"))
            self._check_model(name)
            return await send_json(send, 200, model_card(name, self._created), {})
        raise ApiError(404, f"There is nothing at {path[:80]!r}.")

    async def _readyz(self, path: str, send: Send) -> None:
        """Whether the split has an arm that can answer."""
        ready = self._arms.draw("", ()) is not None
        status = 200 if ready else 503
        if path == _KUBERAY:
            return await send_text(send, status, "text/plain; charset=utf-8", "success" if ready else "no arm answers")
        await send_json(send, status, {"ready": ready}, {})

    async def _administer(self, method: str, path: str, headers: Headers, receive: Receive, send: Send) -> None:
        self._admit_admin(headers)
        body: Any = None
        if method in ("PUT", "POST"):
            self._check_json(headers)
            limits = self._spec.limits
            raw = await read_body(receive, headers.get("content-length"), limits.body_bytes, limits.body_timeout_s)
            body = parse_json(raw)
        action = _ADMIN.get((method, path))
        if action is None and method == "POST" and path.startswith(_ROLL):
            action, body = "roll", {**body, "arm": unquote(path.removeprefix(_ROLL))}
        if action is None:
            raise ApiError(404, f"There is nothing at {method} {path[:80]}.")
        status, answer = await self._ask_control(action, body)
        if isinstance(answer, str) and status == 200:
            return await send_text(send, status, "text/html; charset=utf-8", answer)
        if status != 200:
            raise ApiError(status, answer)
        await send_json(send, 200, answer, {})
