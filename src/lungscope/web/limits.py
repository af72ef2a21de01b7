"""What a stranger's request may ask for, and the gate that every request passes."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lungscope.errors import BusyError, ForbiddenError, LungscopeError, MisdirectedError, TooLargeError
from lungscope.web.answers import answer
from lungscope.web.metrics import Metrics

#: The page's own files alone: no script or style inside the markup, no other host, no frame around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
#: Methods that are counted by name.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
#: What a form may hold beside the film: names, boundaries, headers.
FORM_BYTES = 2**16
#: Clients whose rate is remembered; the one heard of longest ago is forgotten first.
CLIENTS = 4096


@dataclass(frozen=True)
class Limits:
    """upload_bytes: of one film's file. pixels: that its header may promise. upload_seconds: it may take to arrive.

    waiting: films that may arrive or wait at once. per_minute: films of one client, as many at once; 0 for any number.
    requests: requests answered at once. kept_seconds: how long a result stays after it was last asked for.
    kept_bytes: of all results together; those asked for longest ago go first. unread_bytes: of long answers that
    clients have not read to their end yet.
    """

    upload_bytes: int = 64 * 2**20
    pixels: int = 40_000_000
    upload_seconds: float = 60
    waiting: int = 64
    per_minute: int = 120
    requests: int = 256
    kept_seconds: float = 30 * 60
    kept_bytes: int = 4 * 2**30
    unread_bytes: int = 4 * 2**30


class Rate:
    """A token bucket for each client: `per_minute` at once, and as many again in each minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> None:
        """Raises BusyError where `client` has none left at `now` (seconds on any steady clock)."""
        if self._per_minute == 0:
            return
        tokens, then = self._buckets.pop(client, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - then) * self._per_minute / 60)
        self._buckets[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            raise BusyError(
                f"More than {self._per_minute} films a minute came from {client}. Wait, then send the next.",
                retry_after=math.ceil((1 - tokens) * 60 / self._per_minute),
            )


class Gate:
    """ASGI middleware: refuses what must not reach the application, puts `HEADERS` on every answer, and counts it.

    - Host must be an IP address, localhost, or one of `hosts`: another site's name that was pointed at this machine
      (DNS rebinding) has no business here.
    - A request that changes something must not come from another site's page (Fetch Metadata, Origin).
    - The body is counted as it arrives and cut off at the limit, whatever Content-Length said.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, hosts: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._hosts = hosts
        self._rate = Rate(limits.per_minute)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._metrics.requests.labels(method, route, message["status"]).inc()
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        self._open += 1
        try:
            try:
                self._check(scope)
            except LungscopeError as error:
                await answer(error)(scope, receive, dressed)
            else:
                await self._app(scope, self._counted(receive), dressed)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if self._open > self._limits.requests:
            raise BusyError(
                f"More than {self._limits.requests} requests are open. Wait, then ask again.", retry_after=1
            )
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
        foreign = origin is not None and _authority(origin) != headers["host"].lower()
        if site not in ("same-origin", "none") or foreign:
            raise ForbiddenError(
                f"This request was made by a page of another site ({origin or site}). Only lungscope's own page, and "
                "programs that are no browsers, may send films."
            )
        if (length := headers.get("content-length", "0")).isdecimal():
            self._check_size(int(length))
        if scope["method"] == "POST":
            client = scope.get("client")
            self._rate.take(client[0] if client else "an unknown address", monotonic())

    def _check_host(self, host: str) -> None:
        name = _host_name(host)
        if name == "localhost" or name in self._hosts or _is_address(name):
            return
        raise MisdirectedError(
            f"This server does not answer to the host name {name!r}. Use its IP address or localhost, or start it with "
            "--allow-host and that name."
        )

    def _check_size(self, size: int) -> None:
        if size > self._limits.upload_bytes + FORM_BYTES:
            raise TooLargeError(
                f"The upload has more than {self._limits.upload_bytes:,} bytes, the most that is taken. Send a single "
                "film, or start the server with a larger --max-upload."
            )

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self._check_size(size)
            return message

        return counted


def _authority(origin: str) -> str:
    return origin.lower().partition("://")[2]


def _host_name(host: str) -> str:
    """The name or address in a Host header, without its port and the brackets of IPv6; "" where it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
