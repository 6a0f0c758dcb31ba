"""The client of asyncio code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import grpc

from draftwerk_client import health
from draftwerk_client.async_session import AsyncSessionCall, SessionOpening
from draftwerk_client.channel import LONGEST_SECONDS, Endpoint, metadata_of
from draftwerk_client.errors import CallContext, cancelled, from_rpc_error
from draftwerk_client.parameters import Prompt, generate_request, prompt_message, session_open, token_ids
from draftwerk_client.results import Completion, Model, Stats, Tokens, model_of, stats_of
from draftwerk_client.stream import AsyncStream
from draftwerk_client.v1 import generation_pb2, models_pb2, operations_pb2, output_pb2
from draftwerk_client.v1.generation_pb2_grpc import GenerationStub
from draftwerk_client.v1.models_pb2_grpc import ModelsStub
from draftwerk_client.v1.operations_pb2_grpc import OperationsStub

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from draftwerk_client.parameters import RequestOptions
    from draftwerk_client.v1.generation_pb2_grpc import GenerationAsyncStub


class AsyncClient:
    """Talks to one Draftwerk server, or to several that serve the same model, from one event loop.

    Calls that fail before their first message because a server is down or full are tried again; sessions are not.
    """

    def __init__(
        self,
        addresses: str | Sequence[str] = "127.0.0.1:50051",
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
        retries: int = 3,
    ) -> None:
        """Connects when the first call is made, from whose event loop all others must come.

        Args:
            addresses: HOST:PORT, [IPV6]:PORT or unix:PATH; or several, which take calls in turn as long as they are
                healthy. Host names are resolved once, and here, if there are several addresses.
            timeout: seconds for each call that brings none of its own, retries included. None: no limit.
            credentials: for TLS, from grpc.ssl_channel_credentials(). None: no encryption.
            server_name: the name that the servers' certificate is for, if it is not that of the (first) address.
            retries: how many times a call is tried again, 0 to 4.

        Raises:
            ValueError: an address that is none, or a value out of range.
            OSError: one of several host names cannot be resolved.
        """
        self._endpoint = Endpoint.of(
            addresses, timeout=timeout, credentials=credentials, server_name=server_name, retries=retries
        )
        self._running: WeakValueDictionary[str, AsyncStream | AsyncSessionCall] = WeakValueDictionary()
        self._closed = False

    # --- generating --------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Generates from one prompt. Cancelling the task cancels the generation.

        Args:
            prompt: text, token ids or chat messages (a list of them, or a Chat).
            timeout: seconds. None: the client's; math.inf: no limit.
            request_id: 1 to 128 printable ASCII characters, for cancel() and the server's log. None: a new one.
            options: see RequestOptions.

        Raises:
            DraftwerkError: the generation failed.
            TypeError: an option that does not exist.
        """
        async with self.stream(prompt, timeout=timeout, request_id=request_id, **options) as stream:
            return await stream.completion()

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """Generates from one prompt, step by step. Arguments and errors are those of generate()."""
        request = generate_request(prompt, options)
        context = self._context(timeout, request_id)
        generation = _Generation(self._generation, request, context)
        stream = AsyncStream(context, read=generation.read, cancel=generation.cancel, leave=generation.cancel)
        self._running[context.request_id] = stream
        return stream

    def session(
        self, *, timeout: float | None = None, request_id: str | None = None, **options: Unpack[RequestOptions]
    ) -> SessionOpening:
        """Opens a conversation whose state stays on the server: `async with client.session() as session`.

        Args:
            timeout: seconds, for each action of the session that brings none of its own; the session itself may last.
                None: the client's; math.inf: no limit.
            request_id: 1 to 128 printable ASCII characters, for cancel() and the server's log. None: a new one.
            options: for every generation that does not bring its own. See RequestOptions.

        Raises:
            DraftwerkError: the session cannot be opened.
            TypeError: an option that does not exist.
        """
        opening = session_open(options)
        context = self._context(timeout, request_id)
        return SessionOpening(self._generation, context, opening, options, self._running)

    def cancel(self, request_id: str) -> bool:
        """Ends a generation or a whole session of this client, from any task or thread.

        A cancelled generation raises Cancelled where it is read; that of a session ends with what it has.

        Returns:
            Whether it was running.
        """
        running = self._running.get(request_id)
        return running is not None and running.cancel()

    # --- the server --------------------------------------------------------------------------------------------

    async def model(self, *, timeout: float | None = None) -> Model:
        """The model that is served."""
        response = await self._ask(self._models.GetModel, models_pb2.GetModelRequest(), timeout)
        return model_of(response.model)

    async def tokenize(self, prompt: Prompt, *, add_bos: bool = True, timeout: float | None = None) -> Tokens:
        """Token ids of a text, <bos> first unless `add_bos` is False, or of chat messages."""
        request = models_pb2.TokenizeRequest(prompt=prompt_message(prompt), no_bos=not add_bos)
        response = await self._ask(self._models.Tokenize, request, timeout)
        return Tokens(tuple(response.token_ids), tuple(response.token_bytes))

    async def detokenize(
        self, ids: Sequence[int], *, special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """Text of token ids; control tokens have none, or with `special_tokens` their names."""
        request = models_pb2.DetokenizeRequest(token_ids=token_ids("token_ids", ids), special_tokens=special_tokens)
        text: str = (await self._ask(self._models.Detokenize, request, timeout)).text
        return text

    async def stats(self, *, timeout: float | None = None) -> Stats:
        """Figures of the server, also of one that is shutting down or whose device has failed.

        One that answers them on a port of its own needs a client of its own.
        """
        return stats_of(await self._ask(self._operations.GetStats, operations_pb2.GetStatsRequest(), timeout))

    async def wait_ready(self, timeout: float) -> None:
        """Returns when a server is connected and healthy.

        Args:
            timeout: seconds.

        Raises:
            Unavailable: none was in time; with the reason.
        """
        context = self._context(timeout, None)
        check: Any = self._channel.unary_unary(health.METHOD)
        end = time.monotonic() + min(timeout, LONGEST_SECONDS)
        while (remaining := end - time.monotonic()) > 0:
            try:
                if await check(health.REQUEST, timeout=remaining, wait_for_ready=True) == health.SERVING:
                    return
            except grpc.RpcError as error:
                if error.code() not in health.PASSING:
                    raise from_rpc_error(error, context) from None
            await asyncio.sleep(min(health.INTERVAL, max(0.0, end - time.monotonic())))
        try:
            await check(health.REQUEST, timeout=health.INTERVAL)
            raise health.not_ready(context, None)
        except grpc.RpcError as error:
            raise health.not_ready(context, error) from None

    async def close(self) -> None:
        """Ends what still runs, with Cancelled, and the connection. May be called more than once."""
        self._closed = True
        for running in list(self._running.values()):
            running.cancel()
        for name in ("_channel", "_operations_channel"):
            if name in self.__dict__:  # was used
                await getattr(self, name).close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # A channel belongs to the event loop that runs when it is made: not yet in the constructor.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return self._endpoint.open_async()

    @cached_property
    def _generation(self) -> GenerationAsyncStub:
        return GenerationStub(self._channel)

    @cached_property
    def _models(self) -> Any:
        return ModelsStub(self._channel)

    @cached_property
    def _operations_channel(self) -> grpc.aio.Channel:
        # A server that shuts down, or whose device has failed, still says how it is doing.
        return self._endpoint.open_async(healthy=False)

    @cached_property
    def _operations(self) -> Any:
        return OperationsStub(self._operations_channel)

    def _context(self, timeout: float | None, request_id: str | None) -> CallContext:
        if self._closed:
            raise RuntimeError("this client is closed; make another")
        return self._endpoint.call(timeout, request_id)

    async def _ask(self, method: Callable[..., Any], request: Any, timeout: float | None) -> Any:
        context = self._context(timeout, None)
        try:
            return await method(request, timeout=context.timeout, metadata=metadata_of(context))
        except grpc.RpcError as error:
            raise from_rpc_error(error, context) from None
        except asyncio.CancelledError:
            if self._closed:  # grpc.aio reports a call that was cancelled as if its task had been
                raise cancelled(context) from None
            raise


class _Generation:
    """The gRPC call of one generation, as its AsyncStream sees it."""

    def __init__(
        self,
        stub: GenerationAsyncStub,
        request: generation_pb2.GenerateRequest,
        context: CallContext,
    ) -> None:
        self._call = stub.Generate(request, timeout=context.timeout, metadata=metadata_of(context))
        self._context = context
        self._cancelled = False

    async def read(self) -> output_pb2.GenerateResponse | None:
        try:
            response = await self._call.read()
        except asyncio.CancelledError:
            if self._cancelled:  # see AsyncClient._ask
                raise cancelled(self._context) from None
            raise
        return None if response is grpc.aio.EOF else cast(output_pb2.GenerateResponse, response)

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()
