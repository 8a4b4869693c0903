"""The OpenAPI description of what a door takes, made from the same models that check it."""

from __future__ import annotations

from typing import Any

from serving.api.requests import ChatRequest, CompletionRequest, Request

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAILURES = {
    400: "A parameter cannot be used; `param` names it.",
    401: "No valid API key.",
    403: "The key may not do this.",
    404: "No such model or path.",
    405: "Another method is meant.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body does not say that it is application/json.",
    429: "The key's requests of this minute are used up; see Retry-After.",
    500: "The arm failed.",
    503: "No arm can answer now; see Retry-After.",
    504: "The answer took too long.",
}


def openapi(name: str) -> dict[str, Any]:
    """The document; ``name`` is the model that means the split."""
    answer = {"type": "object", "required": ["id", "object", "created", "model", "choices"]}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Stillhouse: {name}", "version": "1"},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}, "schemas": {"Error": _ERROR}},
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/completions": {"post": _operation("Continue a text.", answer, CompletionRequest)},
            "/v1/chat/completions": {"post": _operation("Answer a chat.", answer, ChatRequest)},
            "/v1/models": {"get": _operation("The endpoint and its arms.", {"type": "object", "required": ["data"]})},
            "/healthz": {"get": _operation("Whether the door is open.", {"type": "object", "required": ["status"]})},
        },
    }


def _operation(summary: str, answer: dict[str, Any], body: type[Request] | None = None) -> dict[str, Any]:
    failures = {
        str(status): {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _FAILURES.items()
    }
    content = {"application/json": {"schema": answer}, **({"text/event-stream": {}} if body else {})}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": content}, **failures},
    }
    if body is not None:
        schema = _inlined(body.model_json_schema())
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its own definitions put where they are referred to: none of them refers to itself."""
    definitions = schema.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return put(definitions[node["$ref"].rpartition("/")[2]])
            return {name: put(value) for name, value in node.items()}
        return [put(each) for each in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = put(schema)
    return inlined
