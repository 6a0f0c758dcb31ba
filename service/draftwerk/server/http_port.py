"""What is served over plain HTTP: the metrics, and health for probes that cannot speak gRPC with TLS."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

HEALTH_PATH = "/healthz"


def serve(
    host: str, port: int, registry: CollectorRegistry, why_not_serving: Callable[[], str]
) -> tuple[WSGIServer, threading.Thread]:
    """Answers HTTP requests on threads of its own, until the server that is returned is shut down.

    Args:
        registry: has the metrics, for every path but HEALTH_PATH.
        why_not_serving: asked for each probe, on any thread; one line, empty while all is well.

    Raises:
        OSError: the address cannot be listened on.
    """
    server, thread = start_http_server(port, host, registry)
    metrics = server.get_app()
    assert metrics is not None

    def answer(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environment["PATH_INFO"] != HEALTH_PATH:
            return metrics(environment, start_response)
        why = why_not_serving()
        status = "503 Service Unavailable" if why else "200 OK"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{why or 'serving'}\n".encode()]

    server.set_app(answer)
    return server, thread
