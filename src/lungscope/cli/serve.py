"""`lungscope serve`: the web page and its API."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, cast

import typer
import uvicorn
from rich.console import Console
from uvicorn.protocols.http.h11_impl import H11Protocol

from lungscope.bundle import locate
from lungscope.cli.analyze import demo_film
from lungscope.cli.options import local
from lungscope.errors import MissingExtraError, UsageError
from lungscope.hardware import give_back_freed_arrays, is_loopback
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER
from lungscope.web.app import create_app
from lungscope.web.jobs import THREADS
from lungscope.web.limits import Limits

#: Seconds that open requests have to end when the server is stopped.
GRACE = 3
#: Seconds that a connection may be open and ask for nothing.
IDLE = 10
#: Connections at once, some more than requests (`Limits.requests`).
CONNECTIONS = 512

app = typer.Typer(add_completion=False)


class Connection(H11Protocol):
    """uvicorn's, which gives the head of a request any time to arrive, and has any number of connections."""

    @property
    def asks(self) -> bool:
        """Whether a request has begun that is not answered; one begins when its head is whole."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.loop.call_later(IDLE, self._look, None)
        if len(self.connections) > CONNECTIONS:
            idle = (one for one in self.connections if isinstance(one, Connection) and not one.asks and one is not self)
            gone = next(idle, self)
            gone.transport.abort()
            self.connections.discard(gone)  # as uvicorn does when it is told, later than the next one may come

    def _look(self, answered: object) -> None:
        """Close it where nothing was asked since `answered`, the request that was the last one `IDLE` seconds ago."""
        if not self.asks and self.cycle is answered:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(IDLE, self._look, None if self.asks else self.cycle)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    model: Annotated[str | None, typer.Option(help="A bundle's folder, or the name of an embedded one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, gpu, cuda, … (see `lungscope doctor`).")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, f32, bf16, f16 or int8; auto: the fastest here whose gate was passed.")
    ] = "auto",
    keep: Annotated[
        Path | None, typer.Option(help="Folder to write every result to; without it none is kept.", parser=local)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Films analysed at once.")] = 2,
    queue: Annotated[int, typer.Option(min=1, help="Films that may arrive or wait at once.")] = Limits.waiting,
    rate: Annotated[
        int, typer.Option(min=0, help="Films a minute of one client; 0 for any number.")
    ] = Limits.per_minute,
    max_upload: Annotated[int, typer.Option(min=1, help="Megabytes (2^20) of one film's file.")] = 64,
    max_pixels: Annotated[float, typer.Option(min=0.1, help="Millions of pixels of one film.")] = 40,
    ttl: Annotated[float, typer.Option(min=0.1, help="Minutes that a result stays after it was last asked for.")] = 30,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host name that the server is reached by; may be repeated.")
    ] = None,
    behind_proxy: Annotated[
        bool, typer.Option(help="Believe a proxy on this machine who the client is (X-Forwarded-For).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> None:
    """Serve the web page and the API.

    Nothing leaves this machine, and results go when the visit ends, unless --keep names a folder. Stop it with Ctrl-C
    or SIGTERM: exit status 0. 2: usage. 3: nothing could run.

    Research software, not a medical device. Not for diagnosis.
    """
    analyzer = Analyzer(locate(model), device=device, precision=precision)
    give_back_freed_arrays()
    _open_many_files()
    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--keep {keep} can not be a folder: {error.strerror}. Name one that can be written."
            ) from error
    try:
        demo = demo_film()
    except MissingExtraError:
        demo = None
    limits = Limits(
        upload_bytes=max_upload * 2**20,
        pixels=round(max_pixels * 1e6),
        waiting=queue,
        per_minute=rate,
        kept_seconds=60 * ttl,
    )
    application = create_app(analyzer, limits=limits, hosts=allow_host or (), workers=workers, keep=keep, demo=demo)
    config = uvicorn.Config(
        application,
        http=Connection,
        log_level="warning",
        server_header=False,
        proxy_headers=behind_proxy,
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True

    with _listen(host, port) as listener:
        # uvicorn raises the signal that ended it once more, and by itself that would be the exit status.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        url = _url(listener)
        if as_json:
            typer.echo(json.dumps({"url": url}))
        else:
            _greet(url, host)
        server.run(sockets=[listener])
    if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        os._exit(0)  # their films were given up, and the interpreter would wait for them


def _open_many_files() -> None:
    """Open as many files as the system lets a process, where 1024 are usual: up to eight of each result stay mapped."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit; macOS may call it endless
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"Can not listen on {host}, port {port}: {error.strerror or error}. Name another with --host or --port."
        ) from error
    # Inherited by what is accepted: else an answer's body waits for the acknowledgement of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _greet(url: str, host: str) -> None:
    console = Console()
    console.print(f"lungscope at {url}  (Ctrl-C stops it)", highlight=False, soft_wrap=True)
    if not is_loopback(host):
        console.print(
            f"[yellow]Whoever reaches {host} can use it: there is no password and no encryption here. docs/web.md says "
            "how to run it behind a proxy that has both.[/yellow]",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"[dim]{DISCLAIMER}[/dim]")
