"""What the node says of itself on a local port: /healthz for supervisors, /metrics for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from lungscope.errors import UsageError
from lungscope.pacs.spool import STAGES, Spool

#: Only this machine can ask.
HOST = "127.0.0.1"


class Metrics:
    """The node's numbers, since its process started; the depth of the queue is looked up when it is asked for."""

    def __init__(self, spool: Spool) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="lungscope_pacs", registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            buckets = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
            return Histogram(name, text, namespace="lungscope_pacs", registry=self.registry, buckets=buckets)

        self.received = counter("films_received", "Films received that were not here before.")
        self.repeated = counter("films_repeated", "Films received that were here already, byte for byte.")
        self.analysed = counter("films_analysed", "Films analysed.")
        self.failed = counter("films_failed", "Films put away in failed/, by the code of the error.", "code")
        self.sent = counter("results_sent", "Objects that the destination acknowledged, by kind.", "kind")
        self.refused = counter("results_refused", "Objects put away because they were not taken, by kind.", "kind")
        self.pauses = counter("pauses", "Pauses before another try, by the code of the error.", "code")
        self.analysis_seconds = seconds("analysis_seconds", "Time to analyse a film and make its objects.")
        self.delivery_seconds = seconds("delivery_seconds", "Time to send the results of a film.")
        depth = Gauge(
            "queue_films", "Films in a stage of the queue.", ["stage"], namespace="lungscope_pacs",
            registry=self.registry,
        )  # fmt: skip
        for stage in STAGES:
            if stage != "sent":
                depth.labels(stage).set_function(partial(spool.depth, stage))


class StatusServer:
    """Answers on `HOST`:`port`. health: says whether all is well, and what else there is to say."""

    def __init__(self, port: int, metrics: Metrics, health: Callable[[], tuple[bool, dict[str, Any]]]) -> None:
        self._metrics, self._health = make_wsgi_app(metrics.registry), health
        try:
            self._server = make_server(HOST, port, self._answer, ThreadingWSGIServer, _Silent)
        except OSError as error:
            raise UsageError(
                f"Nothing can listen on {HOST}:{port}: {error.strerror}. Give another --status-port."
            ) from error
        self.port = int(self._server.server_port)
        self._thread = Thread(target=self._server.serve_forever, name="status", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if environ["PATH_INFO"] == "/healthz":
            well, content = self._health()
            status, body = "200 OK" if well else "503 Service Unavailable", content
        else:
            status, body = "404 Not Found", {"error": {"code": "not-found", "message": "There are /healthz, /metrics."}}
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""
