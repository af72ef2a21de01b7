"""The one form in which the web API says that something went wrong."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from lungscope.errors import HTTP_STATUS, BusyError, LungscopeError, status_of


class Problem(BaseModel):
    """code: stable and machine-readable. message: what came, what is allowed, what to do next."""

    code: str
    message: str


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "code": "unreadable",
                    "message": "film.png: is empty (0 bytes). Export or copy the film again.",
                }
            }
        }
    )

    error: Problem


def body(code: str, message: str) -> dict[str, Any]:
    """`ErrorBody` as a JSON-ready dict."""
    return {"error": {"code": code, "message": message}}


def answer(error: LungscopeError) -> JSONResponse:
    """The answer that `error` is, with the status that `HTTP_STATUS` has for it."""
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else None
    return JSONResponse(body(error.code, str(error)), status_of(error, HTTP_STATUS), headers)
