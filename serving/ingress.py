"""The one door: OpenAI's API over HTTP, each request handed to one arm by name or by weight."""

import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serving.api import (
    DONE,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Reply,
    Request,
    model_card,
    model_list,
    parse,
    sse,
)
from serving.arms import check_weights, pick
from serving.engine import Accepted, Delta, FinishReason, Refused

ARM_HEADER = "x-stillhouse-arm"

logger = logging.getLogger("ray.serve")
app = FastAPI(title="Stillhouse", docs_url=None, redoc_url=None, openapi_url=None)


@app.exception_handler(ApiError)
async def _api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


@app.exception_handler(HTTPException)
async def _http_error(request: HttpRequest, error: HTTPException) -> JSONResponse:
    """Unknown paths and methods, in the same shape as every other error."""
    return await _api_error(
        request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    )


async def _follow(arm: str, answer: Any) -> AsyncIterator[Any]:
    """The items of an arm's answer; the arm is told when nobody wants them any more."""
    finished = False
    try:
        async for item in answer:
            yield item
        finished = True
    except BackPressureError as error:
        finished = True
        raise ApiError(
            503, f"Arm {arm!r} has a full queue; try again.", code="overloaded", headers={"Retry-After": "1"}
        ) from error
    except (RayError, RayServeException) as error:
        finished = True
        logger.error("arm %s failed: %s", arm, error)
        raise ApiError(500, f"Arm {arm!r} failed while answering; its log says why.", code="arm_failed") from error
    finally:
        if not finished:
            answer.cancel()


async def _whole(reply: Reply, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
    pieces: list[str] = []
    tokens, reason = 0, None
    async for delta in deltas:
        pieces.append(delta.text)
        tokens, reason = delta.completion_tokens, delta.finish_reason
    return reply.whole("".join(pieces), reason, tokens)


async def _events(reply: Reply, deltas: AsyncIterator[Delta]) -> AsyncIterator[str]:
    """The stream's events. A stream that breaks off ends with an error event and without ``[DONE]``."""
    if opening := reply.opening():
        yield sse(opening)
    tokens: int = 0
    reason: FinishReason | None = None
    try:
        async for delta in deltas:
            tokens, reason = delta.completion_tokens, delta.finish_reason
            if delta.text:
                yield sse(reply.piece(delta.text))
    except ApiError as error:
        yield sse(error.body())
        return
    if reason:
        yield sse(reply.closing(reason))
    if counts := reply.counts(tokens):
        yield sse(counts)
    yield DONE


# Last in the file: serve.ingress copies the app, with all that its routes refer to, as it is at this line.
@serve.deployment
@serve.ingress(app)
class Ingress:
    """Chooses an arm per request and relays its answer.

    ``model`` equal to the endpoint's name means "split by weight"; an arm's name forces that arm. Every answer that
    an arm had a part in names it in the ``x-stillhouse-arm`` header, errors and streams too.
    """

    def __init__(self, endpoint: str, arms: dict[str, DeploymentHandle]) -> None:
        self._endpoint = endpoint
        self._arms = {name: handle.options(stream=True) for name, handle in arms.items()}
        self._weights: Mapping[str, float] = {}
        self._created = int(time.time())

    def reconfigure(self, config: dict[str, dict[str, float]]) -> None:
        """Serve calls this with ``user_config``, {"weights": {arm: weight}}, at the start and at each change."""
        weights = config["weights"]
        check_weights(weights)
        self._weights = weights

    @app.get("/healthz")
    async def healthz(self) -> dict[str, Any]:
        """Whether the door is open, and the weights in force."""
        return {"status": "ok", "endpoint": self._endpoint, "weights": self._weights}

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The endpoint's name first, then the arms'."""
        return model_list([self._endpoint, *self._arms], self._created)

    @app.get("/v1/models/{name}")
    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        self._check_model(name)
        return model_card(name, self._created)

    @app.post("/v1/completions")
    async def completions(self, http: HttpRequest) -> Response:
        """Continue a text."""
        request = parse(CompletionRequest, await http.body())
        arm = self._choose(request.model)
        return await self._relay(request, arm, self._arms[arm].complete.remote(request.prompt, request.sampling()))

    @app.post("/v1/chat/completions")
    async def chat_completions(self, http: HttpRequest) -> Response:
        """Answer a chat."""
        request = parse(ChatRequest, await http.body())
        arm = self._choose(request.model)
        messages = [message.for_template() for message in request.messages]
        return await self._relay(request, arm, self._arms[arm].chat.remote(messages, request.sampling()))

    def _choose(self, model: str) -> str:
        self._check_model(model)
        return pick(self._weights, random.random()) if model == self._endpoint else model

    def _check_model(self, model: str) -> None:
        if model != self._endpoint and model not in self._arms:
            known = ", ".join([self._endpoint, *self._arms])
            raise ApiError(
                404,
                f"The model {model!r} does not exist; there are: {known}.",
                param="model",
                code="model_not_found",
            )

    async def _relay(self, request: Request, arm: str, answer: Any) -> Response:
        headers = {ARM_HEADER: arm}
        try:
            items = _follow(arm, answer)
            # The first item decides the status, so it comes before the response starts, streaming or not.
            first = await anext(items)
            if isinstance(first, Refused):
                raise ApiError(400, first.message, param=first.param, code=first.code)
            assert isinstance(first, Accepted)
            reply = Reply(request, first.prompt_tokens)
            if request.stream:
                return StreamingResponse(_events(reply, items), media_type="text/event-stream", headers=headers)
            return JSONResponse(await _whole(reply, items), headers=headers)
        except ApiError as error:
            error.headers |= headers
            raise
