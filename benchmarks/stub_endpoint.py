"""An OpenAI-compatible endpoint that thinks for a fixed time: what a load generator must measure is known beforehand.

Streams ``max_tokens`` one-letter tokens: the first ``--first-ms`` after the request, then one every ``--token-ms``.
Prints its URL when it listens. ``python benchmarks/stub_endpoint.py --port 8123``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

MODEL = "stub"


def main() -> None:
    """Serve until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--first-ms", type=float, default=20.0)
    parser.add_argument("--token-ms", type=float, default=5.0)
    args = parser.parse_args()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", args.port))
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app(args.first_ms / 1000, args.token_ms / 1000), log_level="warning"))
        server.run(sockets=[listening])


def app(first_s: float, token_s: float) -> FastAPI:
    """The endpoint, with its two delays in seconds."""
    api = FastAPI()

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "nobody"}]}

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        return answer(await request.json(), "chat.completion.chunk")

    @api.post("/v1/completions")
    async def complete(request: Request) -> StreamingResponse:
        return answer(await request.json(), "text_completion")

    def answer(asked: dict[str, Any], kind: str) -> StreamingResponse:
        return StreamingResponse(events(asked, kind), media_type="text/event-stream")

    async def events(asked: dict[str, Any], kind: str) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        tokens = int(asked.get("max_tokens") or asked.get("max_completion_tokens") or 16)
        head = {"id": "stub-1", "object": kind, "created": 0, "model": MODEL}
        for i in range(tokens):
            # By the clock and not by naps in a row, whose errors would add up.
            await asyncio.sleep(max(0.0, start + first_s + i * token_s - loop.time()))
            text: dict[str, Any] = {"delta": {"content": "a"}} if kind.startswith("chat") else {"text": "a"}
            choice = {"index": 0, **text, "finish_reason": "length" if i == tokens - 1 else None}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    return api


if __name__ == "__main__":
    main()
