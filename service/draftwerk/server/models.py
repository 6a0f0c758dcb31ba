"""The service Models: the model that is served, and its tokenizer."""

from __future__ import annotations

from typing import Any

import draftwerk
from draftwerk.engine import Engine
from draftwerk.server.conversion import (
    check_known_fields,
    check_model,
    check_token_ids,
    off_loop_if_long,
    token_ids_of,
)
from draftwerk.server.errors import InvalidField
from draftwerk_client.v1 import models_pb2 as pb
from draftwerk_client.v1 import models_pb2_grpc


class ModelsService(models_pb2_grpc.ModelsServicer):
    """Describes the model and translates between text and its tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802 (gRPC's names)
        check_known_fields(request)
        info = self._engine.info
        check_model(request.name, info.model)
        return pb.GetModelResponse(
            model=pb.Model(
                name=info.model,
                architecture=info.architecture,
                backend=info.backend,
                drafter=info.drafter,
                vocabulary_size=info.vocab_size,
                max_context=info.max_context,
                end_token_ids=info.end_token_ids,
                has_tokenizer=self._engine.has_tokenizer,
                has_chat_template=self._engine.has_chat_template,
                fingerprint=info.fingerprint,
                weight_bytes=info.weight_bytes,
                server_version=draftwerk.__version__,
                has_thinking=self._engine.has_thinking,
                has_tools=self._engine.has_tools,
            )
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802 (gRPC's names)
        check_known_fields(request)
        token_ids = await token_ids_of(request.prompt, self._engine, add_bos=not request.no_bos)

        def spell() -> pb.TokenizeResponse:
            spelled = self._engine.token_bytes(token_ids) if self._engine.has_tokenizer else []
            return pb.TokenizeResponse(token_ids=token_ids, token_bytes=spelled)

        return await off_loop_if_long(len(token_ids), spell)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        check_known_fields(request)
        if not self._engine.has_tokenizer:
            raise InvalidField("token_ids", "given", "absent: the model was loaded without a tokenizer")
        check_token_ids(request.token_ids, self._engine.info.vocab_size, "token_ids")
        text = await off_loop_if_long(
            len(request.token_ids),
            lambda: self._engine.detokenize(request.token_ids, special_tokens=request.special_tokens),
        )
        return pb.DetokenizeResponse(text=text)
