"""A generation while it runs: chunks as they come, then the completion."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from draftwerk_client.errors import CallContext, DraftwerkError, cancelled, from_rpc_error, no_finish_reason
from draftwerk_client.results import Chunk, Completion, chunk_of, completion_of
from draftwerk_client.v1 import output_pb2


class _Received:
    """What has come of a generation so far."""

    def __init__(self, context: CallContext) -> None:
        self._context = context
        self._chunks: list[Chunk] = []
        self._fingerprint = 0
        self._finished = False
        self._failure: DraftwerkError | None = None
        self._left = False

    @property
    def request_id(self) -> str:
        """For cancel(), and as in the server's log."""
        return self._context.request_id

    def _take(self, response: output_pb2.GenerateResponse) -> Chunk:
        chunk = chunk_of(response)
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            self._finished = True
            self._fingerprint = response.fingerprint
        return chunk

    def _fail(self, failure: DraftwerkError) -> DraftwerkError:
        self._failure = failure
        return failure

    @property
    def _over(self) -> bool:
        return self._finished or self._failure is not None

    def _completion(self) -> Completion:
        return completion_of(self._chunks, self._fingerprint, self._context.request_id)


class Stream(_Received):
    """Iterate to get the chunks of a generation as they come; completion() puts them together.

    Leaving the `with` block before the end, or dropping the stream, cancels the generation. One thread at a time reads
    a stream; cancel() may be called from any.

    Made by Client.stream() and Session.stream().
    """

    def __init__(
        self,
        context: CallContext,
        read: Callable[[], output_pb2.GenerateResponse],
        cancel: Callable[[], object],
        leave: Callable[[], object],
    ) -> None:
        """
        Args:
            context: the call, for messages.
            read: returns the next message; raises StopIteration at the end.
            cancel: ends the generation; what was sent can still be read.
            leave: ends the generation, of which nothing will be read any more.
        """
        super().__init__(context)
        self._read = read
        self._cancel = cancel
        self._leave = leave

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        """The next chunk.

        Raises:
            DraftwerkError: the generation failed. Raised again by everything that needs the rest.
        """
        if self._failure is not None:
            raise self._failure
        if self._left:
            raise self._fail(cancelled(self._context))
        try:
            response = self._read()
        except StopIteration:
            if not self._finished:
                raise self._fail(no_finish_reason(self._context)) from None
            raise
        except grpc.RpcError as error:
            if self._finished:
                raise StopIteration from None  # the output is complete, whatever came after it
            raise self._fail(from_rpc_error(error, self._context)) from None
        except DraftwerkError as error:
            raise self._fail(error) from None
        except BaseException:  # Ctrl-C
            self._cancel()
            raise
        return self._take(response)

    def completion(self) -> Completion:
        """The finished generation. Reads what has not been read yet.

        Raises:
            DraftwerkError: the generation failed or was cancelled.
        """
        for _ in self:
            pass
        return self._completion()

    def cancel(self) -> bool:
        """Ends the generation. False if it was over already."""
        if self._over:
            return False
        self._cancel()
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._over and not self._left:
            self._left = True
            self._leave()

    def __del__(self) -> None:
        if hasattr(self, "_leave"):
            self.__exit__()


class AsyncStream(_Received):
    """Iterate with `async for` to get the chunks of a generation as they come; completion() puts them together.

    Leaving the `async with` block before the end, dropping the stream, or cancelling the task that reads it, cancels
    the generation.

    Made by AsyncClient.stream() and AsyncSession.stream().
    """

    def __init__(
        self,
        context: CallContext,
        read: Callable[[], Awaitable[output_pb2.GenerateResponse | None]],
        cancel: Callable[[], object],
        leave: Callable[[], object],
    ) -> None:
        """
        Args:
            context: the call, for messages.
            read: returns the next message, None at the end.
            cancel: ends the generation; what was sent can still be read.
            leave: ends the generation, of which nothing will be read any more.
        """
        super().__init__(context)
        self._read = read
        self._cancel = cancel
        self._leave = leave
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            DraftwerkError: the generation failed. Raised again by everything that needs the rest.
        """
        if self._failure is not None:
            raise self._failure
        if self._left:
            raise self._fail(cancelled(self._context))
        try:
            response = await self._read()
        except grpc.RpcError as error:
            if self._finished:
                raise StopAsyncIteration from None  # the output is complete, whatever came after it
            raise self._fail(from_rpc_error(error, self._context)) from None
        except DraftwerkError as error:
            raise self._fail(error) from None
        except asyncio.CancelledError:
            self._cancel()
            raise
        if response is None:
            if not self._finished:
                raise self._fail(no_finish_reason(self._context))
            raise StopAsyncIteration
        return self._take(response)

    async def completion(self) -> Completion:
        """The finished generation. Reads what has not been read yet.

        Raises:
            DraftwerkError: the generation failed or was cancelled.
        """
        async for _ in self:
            pass
        return self._completion()

    def cancel(self) -> bool:
        """Ends the generation. False if it was over already. May be called from any thread."""
        if self._over:
            return False
        self._in_loop(self._cancel)
        return True

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._abandon()

    def __del__(self) -> None:
        if hasattr(self, "_loop") and not self._loop.is_closed():
            self._abandon()

    def _abandon(self) -> None:
        if not self._over and not self._left:
            self._left = True
            self._in_loop(self._leave)

    def _in_loop(self, action: Callable[[], object]) -> None:
        # Calls of grpc.aio belong to the thread of their loop.
        try:
            in_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            in_loop = False
        if in_loop:
            action()
        else:
            self._loop.call_soon_threadsafe(action)
