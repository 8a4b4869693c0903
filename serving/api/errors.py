"""Answers other than success, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success: ``status`` is the HTTP status, the rest is OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """``{"error": {message, type, param, code}}``"""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def try_again(status: int, message: str, code: str, after_s: float = 1.0) -> ApiError:
    """An error that goes away by itself; ``after_s`` is told in ``Retry-After``, in whole seconds."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, round(after_s)))})
