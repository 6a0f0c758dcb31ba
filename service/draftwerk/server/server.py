"""The server: its ports, what they answer, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from draftwerk import __version__
from draftwerk.engine import Engine
from draftwerk.server import http_port, logs
from draftwerk.server.calls import METHODS, Calls
from draftwerk.server.errors import ShuttingDown
from draftwerk.server.generation import GenerationService
from draftwerk.server.metrics import Metrics
from draftwerk.server.models import ModelsService
from draftwerk.server.operations import OperationsService
from draftwerk.server.ports import cannot_listen, check, credentials_of, host_and_port, listen
from draftwerk.server.settings import Settings
from draftwerk.weights import Progress
from draftwerk_client.v1 import generation_pb2_grpc, models_pb2_grpc, operations_pb2_grpc

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_MOST_FREQUENT_PING_MS = 10_000  # clients ping every 30 s; pings that come faster than this end the connection
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 60_000, 20_000  # a client that vanished must not hold its sessions for hours
_LOOKS_AT_STEPS = 5.0  # seconds between two looks at whether a step hangs, at most
_LAST_WORDS = 1.0  # seconds that ended calls get to send their status

_log = structlog.stdlib.get_logger("draftwerk.server")


class Server:
    """One engine's services on their ports. Lives on the event loop that start() runs on.

    Args:
        settings: all of them.
        engine: generates; stays open when the server stops.
    """

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings = settings
        self.address = ""
        """Where the service listens, once started: HOST:PORT with the port that was bound, or unix:PATH."""
        self.operations_address = ""
        """Where the Operations service listens."""
        self.metrics_address = ""
        """Where metrics and health are served over HTTP; empty if they are not."""
        self._engine = engine
        self._metrics = Metrics(engine)
        self._draining = asyncio.Event()
        self._calls = Calls(self._metrics, settings.max_calls, self._draining)
        self._health = _Health()
        self._why_not_serving = "the server is starting"
        self._telling: asyncio.Task[None] | None = None  # of the device's failure
        self._watching: asyncio.Task[None] | None = None  # for steps that do not end
        self._servers: dict[grpc.aio.Server, list[str]] = {}  # one for each port, with its services of draftwerk.v1
        self._http_server: tuple[WSGIServer, threading.Thread] | None = None

    async def start(self) -> None:
        """Listens and serves.

        Raises:
            StartError: an address cannot be listened on, or a TLS file cannot be used.
        """
        settings, engine = self.settings, self._engine
        check(settings)
        engine.deliver_on(asyncio.get_running_loop())
        credentials = credentials_of(settings)
        own_port = bool(settings.operations_listen)
        main = self._new_server(["Generation", "Models"] if own_port else ["Generation", "Models", "Operations"])
        operations = self._new_server(["Operations"]) if own_port else main
        generation_pb2_grpc.add_GenerationServicer_to_server(
            GenerationService(
                engine, self._metrics, engine.info.model, settings.max_unread_tokens, draining=self._draining
            ),
            main,
        )
        models_pb2_grpc.add_ModelsServicer_to_server(ModelsService(engine), main)
        operations_pb2_grpc.add_OperationsServicer_to_server(
            OperationsService(engine, self._metrics, settings.max_queued_tokens), operations
        )
        for server, services in self._servers.items():
            server.add_generic_rpc_handlers((_UnknownMethods(services),))  # asked after all others
        self.address = listen(main, settings.listen, credentials, "listen")
        self.operations_address = self.address
        if own_port:
            self.operations_address = listen(operations, settings.operations_listen, credentials, "operations_listen")
        if settings.metrics_listen:
            self.metrics_address = self._serve_http(settings.metrics_listen)
        for server in self._servers:
            await server.start()
        await self._set_health()
        engine.when_failed(self._device_failed)
        if settings.step_timeout > 0:
            self._watching = asyncio.create_task(self._watch_steps(settings.step_timeout))

    async def stop(self, grace: float) -> None:
        """Takes no new calls, waits `grace` seconds at most for those that run, ends the others, stops listening."""
        ends_at = time.monotonic() + grace
        self._draining.set()
        self._engine.when_failed(None)
        if self._watching is not None:
            self._watching.cancel()
        await self._set_health("the server is shutting down")
        if self._calls.running:
            _log.info("waiting for running calls", running=self._calls.running, grace_period=grace)
            await _within(grace, self._calls.finished())
        if self._calls.running:
            _log.warning("grace period is over: ending calls", running=self._calls.running)
            self._calls.end_all(ShuttingDown(f"the server ended the call after its grace period of {grace:g} s"))
            await _within(_LAST_WORDS, self._calls.finished())
        self._health.end_watches()
        # What is left are bytes on their way to readers, slow ones among them.
        last_words = max(_LAST_WORDS, ends_at - time.monotonic())
        for server in self._servers:
            await server.stop(last_words)
        if self._http_server is not None:
            http, thread = self._http_server
            await asyncio.to_thread(http.shutdown)
            http.server_close()
            thread.join()

    def _new_server(self, services: list[str]) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=(self._calls,),
            options=(
                ("grpc.so_reuseport", 0),  # or a second server on the same port would take half of the connections
                ("grpc.max_receive_message_length", self.settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.min_ping_interval_without_data_ms", _MOST_FREQUENT_PING_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.settings.reflection:
            names = [f"draftwerk.v1.{service}" for service in services]
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        self._servers[server] = services
        return server

    def _device_failed(self, why: str) -> None:
        """From now on whoever asks for the health of the server hears that it has to be started anew."""
        _log.critical("the device has failed: not serving any more", error=why)
        self._telling = asyncio.get_running_loop().create_task(self._set_health(f"the device has failed: {why}"))

    async def _watch_steps(self, timeout: float) -> None:
        """Has health say NOT_SERVING as long as a step takes more than `timeout` seconds: the device may hang."""
        hangs = False
        while True:
            await asyncio.sleep(min(timeout / 4, _LOOKS_AT_STEPS))
            seconds = self._engine.step_seconds
            if (seconds > timeout) == hangs or self._engine.failure:
                continue
            hangs = not hangs
            if hangs:
                _log.critical("a step does not end: not serving until it does", seconds=round(seconds))
            else:
                _log.info("the step has ended: serving again")
            await self._set_health(f"a step does not end: it has taken more than {timeout:g} s" if hangs else "")

    async def _set_health(self, why_not_serving: str = "") -> None:
        """Settles what whoever asks for health hears from now on: that the server serves, unless there is a reason."""
        self._why_not_serving = " ".join(why_not_serving.split())
        status = _NOT_SERVING if why_not_serving else _SERVING
        for service in ("", *sorted({method.split("/")[1] for method in METHODS})):
            await self._health.set(service, status)

    def _serve_http(self, address: str) -> str:
        host, port = host_and_port(address)
        try:
            self._http_server = http_port.serve(host, port, self._metrics.registry, lambda: self._why_not_serving)
        except OSError as error:
            raise cannot_listen(error, address, "metrics_listen") from None
        return f"{address.rpartition(':')[0]}:{self._http_server[0].server_port}"


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # no stubs
    """Whose watches can be ended: a client keeps one open for as long as it is connected."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[Any]] = set()
        self._ending = False

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802 (gRPC's name)
        """Sends the status now and whenever it changes."""
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await super().Watch(request, context)
        except asyncio.CancelledError:
            if not self._ending:  # the client did it
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        finally:
            self._watches.discard(task)

    def end_watches(self) -> None:
        """Ends all watches."""
        self._ending = True
        for task in list(self._watches):
            task.cancel()


class _UnknownMethods(grpc.GenericRpcHandler):
    """Tells a client what it has met: a port that has only some of the services, or a server that is older."""

    def __init__(self, services: list[str]) -> None:
        names = sorted(method.removeprefix("/draftwerk.v1.") for method in METHODS)
        self._known = ", ".join(name for name in names if name.split("/")[0] in services)

    def service(self, handler_call_details: Any) -> Any:
        asked = handler_call_details.method
        remedy = (
            "This server answers it on another port: see its operations_listen."
            if asked in METHODS
            else "A newer client needs a newer server."
        )

        async def refuse(_: Any, context: Any) -> None:
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"draftwerk {__version__} does not know {asked} on this port. "
                f"Of draftwerk.v1 it has {self._known}. {remedy}",
            )

        return grpc.stream_stream_rpc_method_handler(refuse)


def open_engine(settings: Settings, progress: Progress | None = None) -> Engine:
    """The engine that these settings describe."""
    return Engine(
        settings.model,
        drafter=settings.drafter,
        lookup=settings.lookup,
        device=settings.device,
        threads=settings.threads,
        kv_memory=settings.kv_memory,
        gpu_memory_fraction=settings.gpu_memory_fraction,
        weights=settings.weights,
        draft_length=settings.draft_length,
        max_draft_length=settings.max_draft_length,
        max_sequences=settings.max_sequences,
        max_step_rows=settings.max_step_rows,
        prefill_chunk=settings.prefill_chunk,
        max_queued_tokens=settings.max_queued_tokens,
        max_context=settings.max_context,
        prefix_cache=settings.prefix_cache,
        progress=progress,
    )


def run(settings: Settings, engine: Engine) -> None:
    """Serves until SIGTERM or SIGINT, then lets running streams finish. A second signal ends the process at once.

    Raises:
        StartError: the server cannot listen.
    """
    asyncio.run(_serve(settings, engine))


def exit_at_once(number: int, _: object = None) -> None:
    """Handler of signals that ends the process."""
    os._exit(128 + number)


async def _serve(settings: Settings, engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    logs.log_loop_exceptions(loop)
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if received.done():
            _log.warning("second signal: ending at once", signal=number.name)
            exit_at_once(number)
        received.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    server = Server(settings, engine)
    await server.start()
    _log.info(
        "serving",
        listen=server.address,
        operations=server.operations_address,
        metrics=server.metrics_address or None,
        tls=settings.tls_certificate is not None,
        model=engine.info.model,
        backend=engine.info.backend,
        drafter=engine.info.drafter,
        weight_bytes=engine.info.weight_bytes,
        kv_memory_bytes=engine.info.kv_memory_bytes,
        max_context=engine.info.max_context,
        version=__version__,
    )
    _log.info("shutting down", signal=(await received).name)
    await server.stop(settings.grace_period)
    _log.info("ended")


async def _within(seconds: float, awaitable: Any) -> bool:
    """Awaits it; False if it took longer."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(awaitable, seconds)
        return True
    return False
