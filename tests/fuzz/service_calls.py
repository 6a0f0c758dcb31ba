"""Calls of the service that fuzz_service.py makes: valid ones, damaged ones and nonsense, each from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import protobuf_messages
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from mutations import mutated

from draftwerk_client.v1 import generation_pb2, models_pb2, operations_pb2
from draftwerk_client.v1.generation_pb2 import GenerateRequest
from draftwerk_client.v1.parameters_pb2 import (
    ChatMessage,
    ChatMessages,
    DraftingOptions,
    OutputOptions,
    Prompt,
    SamplingParameters,
    StopConditions,
    TokenIds,
)
from draftwerk_client.v1.session_pb2 import SessionRequest

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for module in (generation_pb2, models_pb2, operations_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
GENERATE = "/draftwerk.v1.Generation/Generate"
SESSION = "/draftwerk.v1.Generation/Session"
REQUEST_ID = "x-request-id"
# Tokens of the served model: small enough that most ids of a random message are valid, or nearly.
VOCABULARY = 300

_ACTIONS = ("append", "generate", "interrupt", "inject", "fork", "close", "open")
_REQUEST_IDS = ("r", "r" * 128, "r" * 129, "r" * 5000, "", " ", "a b", "~!\"#$%&'()*+,/:;<=>?@[]^`{|}")
_OTHER_KEYS = ("grpc-retry-pushback-ms", "authorization", "te", "x")

# close: half-close, then read everything. cancel: after the first responses. hold: stay open, or do not read, until the
# other calls of the batch are done; then as with close.
Ending = Literal["close", "cancel", "hold"]


@dataclass(frozen=True)
class Call:
    """One call: all that is sent, and how.

    Attributes:
        path: of the method.
        messages: what is sent, as it goes over the wire.
        metadata: of the call.
        ending: how the client ends it.
        reads: with cancel: how many responses to read first. With hold: whether to read meanwhile.
        paced: whether each message waits for as many responses as there were messages before it.
        timeout: its deadline in seconds, where it is to be a short one.
        is_plain: whether the request is valid, so that it has to be served or find the queue full.
    """

    path: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    ending: Ending = "close"
    reads: int = 1
    paced: bool = False
    timeout: float | None = None
    is_plain: bool = False


def generate_request(rng: random.Random) -> GenerateRequest:
    """A valid request with few tokens. Often one that others make too: their outputs must be equal."""
    rng = random.Random(rng.randrange(100)) if rng.random() < 0.5 else rng
    request = GenerateRequest(prompt=prompt(rng), stop=StopConditions(max_tokens=rng.randint(1, 6)))
    if rng.random() < 0.5:
        request.sampling.CopyFrom(sampling(rng))
    if rng.random() < 0.3:
        request.stop.strings.extend(rng.choice((["a"], ["the", " world"], ["zzz"])))
        request.stop.min_tokens = rng.randint(0, request.stop.max_tokens)
    if rng.random() < 0.3:
        request.drafting.CopyFrom(DraftingOptions(enabled=rng.random() < 0.5, max_length=rng.choice((0, 4))))
    if rng.random() < 0.3:
        request.output.CopyFrom(OutputOptions(logprobs=rng.choice((0, 3, 20)), token_bytes=rng.random() < 0.5))
    if rng.random() < 0.2:
        request.cache_salt = "tenant"
    return request


def prompt(rng: random.Random) -> Prompt:
    """A prompt in one of its three forms."""
    kind = rng.randrange(4)
    if kind == 0:
        return Prompt(text=rng.choice(("hello world", "the ", "日本語", "a b c", "x" * 60)))
    if kind == 1:
        messages = [ChatMessage(role="user", content=rng.choice(("hello", "the world")))]
        return Prompt(messages=ChatMessages(messages=messages))
    length = rng.randint(1, 40) if rng.random() < 0.9 else rng.randint(100, 200)
    return Prompt(token_ids=TokenIds(ids=[rng.randrange(VOCABULARY) for _ in range(length)]))


def sampling(rng: random.Random) -> SamplingParameters:
    """Parameters that are all in range."""
    return SamplingParameters(
        temperature=rng.choice((0.0, 0.7, 1.0)),
        top_k=rng.choice((0, 1, 64)),
        top_p=rng.choice((1.0, 0.95)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.5)),
        logit_bias={rng.randrange(VOCABULARY): rng.choice((-100.0, 2.0))},
        seed=rng.randrange(2**64),
    )


def session_actions(rng: random.Random) -> list[SessionRequest]:
    """Actions that are mostly in order: the branch they name mostly exists, and mostly does what the action needs."""
    opening = SessionRequest.Open(stop=StopConditions(max_tokens=rng.choice((1, 4, 30))))
    if rng.random() < 0.3:
        opening.sampling.CopyFrom(sampling(rng))
    actions = [SessionRequest(open=opening), SessionRequest(append=SessionRequest.Append(content=prompt(rng)))]
    branches = 1
    for _ in range(rng.randint(0, 12)):
        branch = rng.randrange(branches) if rng.random() < 0.95 else rng.choice((-1, branches, 2**31 - 1))
        action = SessionRequest(branch=branch)
        (kind,) = rng.choices(_ACTIONS, (4, 8, 3, 2, 3, 1, 0.2))
        if kind == "append":
            action.append.content.CopyFrom(prompt(rng))
        elif kind == "generate":
            action.generate.SetInParent()
            if rng.random() < 0.2:
                action.generate.stop.max_tokens = rng.randint(1, 20)
        elif kind == "inject":
            action.inject.content.CopyFrom(prompt(rng))
        elif kind == "fork":
            action.fork.SetInParent()
            branches += 1
            if rng.random() < 0.5:
                action.fork.position = rng.choice((0, 1, 5, 1000, -1))
        else:
            getattr(action, kind).SetInParent()
        actions.append(action)
    for number, action in enumerate(actions, start=1):
        action.request_number = number if rng.random() < 0.99 else rng.choice((0, -1, number - 1, 2**63 - 1))
    return actions


def _valid_message(rng: random.Random, path: str) -> Message:
    """A valid message of a method."""
    if path == GENERATE:
        return generate_request(rng)
    if path == SESSION:
        return rng.choice(session_actions(rng))
    if path.endswith("/Tokenize"):
        return models_pb2.TokenizeRequest(prompt=prompt(rng), no_bos=rng.random() < 0.5)
    if path.endswith("/Detokenize"):
        return models_pb2.DetokenizeRequest(token_ids=[rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 20))])
    return models_pb2.GetModelRequest()


def _path(rng: random.Random) -> str:
    return GENERATE if rng.random() < 0.6 else rng.choice(sorted(METHODS))


def _valid(rng: random.Random) -> Call:
    return Call(GENERATE, (generate_request(rng).SerializeToString(),), is_plain=True)


def _one_odd_field(rng: random.Random) -> Call:
    """A valid message, and after it some fields again with other values: the last value counts."""
    path = _path(rng)
    maker = protobuf_messages.MessageMaker(rng, hostility=0.02)
    odd = b"".join(maker.some_field(METHODS[path].input_type) for _ in range(rng.randint(1, 3)))
    return Call(path, (_valid_message(rng, path).SerializeToString() + odd,))


def _random_fields(rng: random.Random) -> Call:
    path = _path(rng)
    maker = protobuf_messages.MessageMaker(rng, hostility=rng.choice((0.0, 0.01, 0.1)))
    message = maker.message(METHODS[path].input_type)
    if path == GENERATE and rng.random() < 0.9:  # or nearly all would be for another model, and get no further
        message += protobuf_messages.tagged(GenerateRequest.MODEL_FIELD_NUMBER, protobuf_messages.LENGTH, b"")
    return Call(path, (message,))


def _mutated(rng: random.Random) -> Call:
    path = _path(rng)
    return Call(path, (mutated(_valid_message(rng, path).SerializeToString(), rng),))


def _random_bytes(rng: random.Random) -> Call:
    return Call(_path(rng), (rng.randbytes(rng.choice((0, 1, 2, 10, 100, 1000))),))


def _session(rng: random.Random) -> Call:
    messages = [action.SerializeToString() for action in session_actions(rng)]
    if rng.random() < 0.4:
        at = rng.randrange(len(messages))
        maker = protobuf_messages.MessageMaker(rng)
        messages[at] = rng.choice(
            (
                mutated(messages[at], rng),
                messages[at] + maker.some_field(SessionRequest.DESCRIPTOR),
                maker.message(SessionRequest.DESCRIPTOR),
            )
        )
    if rng.random() < 0.1:
        rng.shuffle(messages)
    ending: Ending = rng.choices(("close", "cancel", "hold"), (7, 2, 0.5))[0]
    reads = min(rng.choice((0, 1, 4)), len(messages))  # each action has an answer at least
    return Call(SESSION, tuple(messages), ending=ending, reads=reads, paced=rng.random() < 0.6)


def _metadata(rng: random.Random) -> Call:
    """A valid request with a request id that is valid, or not, or not alone."""
    entries: list[tuple[str, str | bytes]] = [
        (
            REQUEST_ID,
            rng.choice(("r", "r" * 128, "r" * 129, "r" * 5000, "", " ", "a b", "~!\"#$%&'()*+,/:;<=>?@[]^`{|}")),
        )
    ]
    if rng.random() < 0.3:
        entries.append((REQUEST_ID, "second"))
    if rng.random() < 0.3:
        entries.append((f"{REQUEST_ID}-bin", rng.randbytes(rng.choice((0, 1, 200)))))
    if rng.random() < 0.2:
        entries.append(
            (rng.choice(("grpc-retry-pushback-ms", "authorization", "te", "x")), rng.choice(("", "-1", "x" * 900)))
        )
    return replace(_valid(rng), metadata=tuple(entries))


def _hurried(rng: random.Random) -> Call:
    call = rng.choice((_valid, _session))(rng)
    return replace(call, ending="close", timeout=rng.choice((0.001, 0.005, 0.02)), is_plain=False)


def _long(rng: random.Random) -> Call:
    """A generation of hundreds of tokens with long messages that is cancelled, or whose reader stops reading."""
    request = GenerateRequest(prompt=prompt(rng), stop=StopConditions(max_tokens=400, ignore_end_tokens=True))
    request.output.CopyFrom(OutputOptions(logprobs=20, token_bytes=True))
    ending: Ending = "hold" if rng.random() < 0.2 else "cancel"
    return Call(GENERATE, (request.SerializeToString(),), ending=ending, reads=rng.choice((0, 1, 30)), is_plain=True)


def _wrong_count(rng: random.Random) -> Call:
    """No request message where one belongs, or several."""
    path = rng.choice(sorted(METHODS))
    return Call(path, tuple(_valid_message(rng, path).SerializeToString() for _ in range(rng.choice((0, 0, 2, 3)))))


def _no_such_method(rng: random.Random) -> Call:
    path = rng.choice(("/draftwerk.v1.Generation/Degenerate", "/draftwerk.v2.Generation/Generate", "/", "/x", "/a/b/c"))
    return Call(path, (rng.randbytes(3),))


def _too_large(rng: random.Random) -> Call:
    request = GenerateRequest(prompt=Prompt(text="x" * rng.choice((100_000, 1_000_000, 1_200_000))))
    return Call(GENERATE, (request.SerializeToString(),))


_KINDS: dict[Callable[[random.Random], Call], float] = {
    _valid: 20,
    _one_odd_field: 25,
    _random_fields: 20,
    _mutated: 15,
    _random_bytes: 3,
    _session: 10,
    _metadata: 3,
    _hurried: 2,
    _long: 2,
    _wrong_count: 1,
    _no_such_method: 0.3,
    _too_large: 0.1,
}


def call(seed: int, number: int) -> Call:
    """Call `number` of a seed: always the same."""
    rng = random.Random(f"{seed}:{number}")
    return rng.choices(list(_KINDS), list(_KINDS.values()))[0](rng)
