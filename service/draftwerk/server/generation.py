"""The service Generation: one-shot generations, and sessions."""

from __future__ import annotations

import asyncio
from typing import Any

from draftwerk.engine import Engine
from draftwerk.requests import output_fingerprint
from draftwerk.server.calls import current_call
from draftwerk.server.conversion import check_known_fields, check_model, sampling_params, token_ids_of
from draftwerk.server.metrics import Metrics
from draftwerk.server.responses import generate_response, spelling
from draftwerk.server.session import Session
from draftwerk_client.v1 import generation_pb2, generation_pb2_grpc


class GenerationService(generation_pb2_grpc.GenerationServicer):
    """Generates text with one engine.

    Args:
        model_name: what clients may call the model.
        max_unread_tokens: a generation whose client has not taken this many tokens pauses until it has.
        draining: set when the server shuts down; what runs is finished then, and nothing new is begun.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, model_name: str, max_unread_tokens: int, draining: asyncio.Event
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._model_name = model_name
        self._max_unread_tokens = max_unread_tokens
        self._draining = draining

    # The stubs know handlers that are generators; grpc.aio takes coroutines too, which write when they have something.

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> None:
        """Generates from one prompt: one message for each engine step."""
        check_known_fields(request)
        check_model(request.model, self._model_name)
        prompt = await token_ids_of(request.prompt, self._engine)
        room = self._engine.info.max_context - len(prompt)
        params = sampling_params(
            request.sampling, request.stop, request.drafting, request.output, request.cache_salt, room
        )
        call = current_call()
        generation = self._engine.submit(prompt, params, max_unread_tokens=self._max_unread_tokens)
        ended = False
        try:
            await call.accept()
            fingerprint = output_fingerprint(self._engine.info.fingerprint, prompt, params)
            spell = spelling(request.output, self._engine)
            request_id = call.request_id
            previous_at = None
            async for chunk in generation:
                if chunk.finish_reason is not None:
                    self._metrics.observe_end(chunk.stats, chunk.finish_reason)
                    ended = True
                if chunk.finish_reason == "error":
                    continue  # the iteration raises it next
                response = generate_response(chunk, fingerprint, spell)
                if request_id:
                    response.request_id, request_id = request_id, ""
                self._metrics.observe_chunk(generation.submitted_at, previous_at, chunk)
                previous_at = chunk.received_at
                if chunk.finish_reason is not None and chunk.stats is not None:
                    call.note(
                        prompt_tokens=chunk.stats.prompt_tokens,
                        generated_tokens=chunk.stats.generated_tokens,
                        finish_reason=chunk.finish_reason,
                    )
                await context.write(response)
        finally:
            generation.cancel()
            if not ended:
                self._metrics.observe_end(None, "cancelled")

    async def Session(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """Holds a conversation; see session.py."""
        await Session(
            self._engine,
            self._metrics,
            self._model_name,
            self._max_unread_tokens,
            self._draining,
            current_call(),
            context,
        ).run()
