"""A client with no code of ours: grpcio, and definitions that come from the server or from the .proto files.

    python stock_client.py reflection ADDRESS    asks the server for its definitions
    python stock_client.py protos ADDRESS        imports draftwerk/v1/*_pb2.py, made by protoc

Both make the same calls. The results go to stdout as one JSON object, for test_stock_clients.py to look at.
"""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory

TIMEOUT = 60.0
GREETING = "hello world"


class Api:
    """Messages and methods by their full names."""

    def __init__(self, channel: grpc.Channel, pool: Any) -> None:
        self._channel = channel
        self._pool = pool

    def message(self, name: str, **fields: Any) -> Any:
        return self._class(self._pool.FindMessageTypeByName(name))(**fields)

    def method(self, service: str, name: str) -> Any:
        method = self._pool.FindServiceByName(service).methods_by_name[name]
        call = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, True): self._channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        return call(
            f"/{service}/{name}",
            request_serializer=_serialized,
            response_deserializer=self._class(method.output_type).FromString,
        )

    def plain(self, message: Any) -> dict[str, Any]:
        values: dict[str, Any] = json_format.MessageToDict(
            message, preserving_proto_field_name=True, descriptor_pool=self._pool
        )
        return values

    def _class(self, descriptor: Any) -> Any:
        return message_factory.GetMessageClass(descriptor)


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


class SessionActions:
    """The client's side of a session; sends each action when asked to."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._number = 0
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        sent: Callable[[], Any] = self._requests.get
        self._responses = api.method("draftwerk.v1.Generation", "Session")(iter(sent, None), timeout=TIMEOUT)

    def act(self, action: str, branch: int = 0, **fields: Any) -> int:
        self._number += 1
        name = f"draftwerk.v1.SessionRequest.{action.title()}"
        message = self._api.message(name, **fields)
        request = self._api.message("draftwerk.v1.SessionRequest", request_number=self._number, branch=branch)
        field = getattr(request, action)
        field.SetInParent()  # also where the action has no fields
        field.MergeFrom(message)
        self._requests.put(request)
        return self._number

    def answer(self, action: str, branch: int = 0, **fields: Any) -> Any:
        """The answer to an action that has one."""
        number = self.act(action, branch, **fields)
        response = next(self._responses)
        assert (response.request_number, response.branch) == (number, branch), response
        return getattr(response, response.WhichOneof("event"))

    def generated(self, branch: int = 0, **fields: Any) -> list[int]:
        """The tokens of a whole generation."""
        number = self.act("generate", branch, **fields)
        token_ids: list[int] = []
        for response in self._responses:
            assert response.WhichOneof("event") == "generated", response
            assert response.request_number == number
            token_ids += response.generated.token_ids
            if response.generated.finish_reason:
                break
        return token_ids

    def end(self) -> None:
        self._requests.put(None)
        assert list(self._responses) == []
        assert self._responses.code() is grpc.StatusCode.OK


def generate(api: Api) -> dict[str, Any]:
    request = api.message(
        "draftwerk.v1.GenerateRequest",
        prompt={"text": GREETING},
        sampling={"temperature": 1.0, "seed": 7},
        stop={"max_tokens": 24},
        output={"logprobs": 2, "token_bytes": True},
    )
    call = api.method("draftwerk.v1.Generation", "Generate")(request, timeout=TIMEOUT)
    return {
        "request_id": dict(call.initial_metadata())["x-request-id"],
        "messages": [api.plain(response) for response in call],
    }


def session(api: Api) -> dict[str, Any]:
    """Two turns, a fork, and the same turn on both branches."""
    actions = SessionActions(api)
    opened = actions.answer("open", sampling={"temperature": 1.0, "seed": 3}, stop={"max_tokens": 12})
    first = list(actions.answer("append", content={"text": GREETING}).token_ids)
    first += actions.generated()
    forked = actions.answer("fork")
    second = list(actions.answer("append", content={"token_ids": {"ids": [20, 21]}}).token_ids)
    second += actions.generated()
    actions.answer("append", forked.branch, content={"token_ids": {"ids": [20, 21]}})
    copy = actions.generated(forked.branch)
    actions.answer("close", forked.branch)
    actions.end()
    return {
        "request_id": opened.request_id,
        "first": first,
        "second": second,
        "fork_length": forked.length,
        "copy": copy,
    }


def failure(api: Api) -> dict[str, Any]:
    request = api.message("draftwerk.v1.GenerateRequest", prompt={"text": "a"}, sampling={"top_p": 2.0})
    try:
        list(api.method("draftwerk.v1.Generation", "Generate")(request, timeout=TIMEOUT))
    except grpc.RpcError as raised:
        error: Any = raised  # which is the call as well
        trailers = dict(error.trailing_metadata())
        status = api.message("draftwerk.v1.Status")
        status.ParseFromString(trailers["grpc-status-details-bin"])
        found = {}
        for detail in status.details:
            name = detail.type_url.rpartition(".")[2]
            message = api.message(f"draftwerk.v1.{name}")
            message.ParseFromString(detail.value)
            found[name] = api.plain(message)
        return {"code": error.code().name, "details": found}
    return {}


def calls(api: Api) -> Iterator[tuple[str, Any]]:
    """Every method, and an error with its details."""

    def answer(service: str, method: str, request: str, **fields: Any) -> dict[str, Any]:
        message = api.message(request, **fields)
        return api.plain(api.method(service, method)(message, timeout=TIMEOUT))

    yield "model", answer("draftwerk.v1.Models", "GetModel", "draftwerk.v1.GetModelRequest")
    tokens = answer("draftwerk.v1.Models", "Tokenize", "draftwerk.v1.TokenizeRequest", prompt={"text": GREETING})
    yield "tokens", tokens
    detokenize = answer(
        "draftwerk.v1.Models", "Detokenize", "draftwerk.v1.DetokenizeRequest", token_ids=tokens["token_ids"]
    )
    yield "text", detokenize["text"]
    yield "generate", generate(api)
    yield "session", session(api)
    yield "failure", failure(api)
    yield "stats", answer("draftwerk.v1.Operations", "GetStats", "draftwerk.v1.GetStatsRequest")


def by_reflection(channel: grpc.Channel) -> tuple[Api, dict[str, Any]]:
    reflection = import_module("grpc_reflection.v1alpha.proto_reflection_descriptor_database")
    database = reflection.ProtoReflectionDescriptorDatabase(channel)
    api = Api(channel, descriptor_pool.DescriptorPool(database))
    check = api.message("grpc.health.v1.HealthCheckRequest")
    health = api.plain(api.method("grpc.health.v1.Health", "Check")(check, timeout=TIMEOUT))
    return api, {"services": sorted(database.get_services()), "health": health["status"]}


def by_protos(channel: grpc.Channel) -> tuple[Api, dict[str, Any]]:
    for name in ("generation", "models", "operations", "errors"):
        import_module(f"draftwerk.v1.{name}_pb2")
    return Api(channel, descriptor_pool.Default()), {}


def main() -> None:
    way, address = sys.argv[1:]
    ours = [name for name in ("draftwerk", "draftwerk.engine", "draftwerk_client") if _importable(name)]
    with grpc.insecure_channel(address) as channel:
        api, results = {"reflection": by_reflection, "protos": by_protos}[way](channel)
        results.update(calls(api))
    json.dump({"importable": ours, **results}, sys.stdout)


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent
        return False


if __name__ == "__main__":
    main()
