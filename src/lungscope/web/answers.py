"""The one form in which the web API says that something went wrong, and long answers on their way."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, BinaryIO

import anyio.to_thread
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from lungscope.errors import HTTP_STATUS, BusyError, LungscopeError, status_of

#: Bytes that the server is given at a time: it keeps what a client does not read.
BLOCK = 2**18


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


class Outbox:
    """Answers out of files that clients have not read to their end yet, at most `limit` bytes in all.

    Used on the event loop's thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def answer(self, file: BinaryIO, media: str, headers: Mapping[str, str]) -> FileAnswer:
        """The answer with the content of `file`, which it closes. Raises BusyError where there is no room for it."""
        size = file.seek(0, os.SEEK_END)
        if self._held + size > self._limit:
            file.close()
            raise BusyError(
                f"More than {self._limit:,} bytes of answers are not read yet. Wait, then ask again.", retry_after=5
            )
        self._held += size

        def gone() -> None:
            self._held -= size

        return FileAnswer(file, size, media, headers, gone)


class FileAnswer(StreamingResponse):
    """`size` bytes of a file, a block at a time. gone: called when they are sent, or the client went away."""

    def __init__(
        self, file: BinaryIO, size: int, media: str, headers: Mapping[str, str], gone: Callable[[], None]
    ) -> None:
        super().__init__(_blocks(file), media_type=media, headers={**headers, "Content-Length": str(size)})
        self._file, self._gone = file, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()
            self._gone()


async def _blocks(file: BinaryIO) -> AsyncIterator[bytes]:
    file.seek(0)
    while block := await anyio.to_thread.run_sync(file.read, BLOCK):
        yield block
