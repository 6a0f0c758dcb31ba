"""Generating with both clients: what is sent, what comes back, how it is ended early."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from typing import Any

import grpc
import pytest
from scripted_server import TIMEOUT, ScriptedServer, is_in, last, piece, two_pieces, until_cancelled

import draftwerk_client.stream
from draftwerk_client import (
    Cancelled,
    Chunk,
    Client,
    DeadlineExceeded,
    DrafterStats,
    GenerationStats,
    ServerError,
    TokenLogprobs,
)
from draftwerk_client.v1 import generation_pb2, models_pb2, operations_pb2, output_pb2, statistics_pb2


def test_completion_is_all_chunks_together(client: Any, server: ScriptedServer) -> None:
    completion = client.generate("Say hello")
    assert completion.text == "Hello"
    assert completion.token_ids == (5, 6, 7)
    assert completion.drafted == (True, False, False)
    assert completion.finish_reason == "length"
    assert completion.fingerprint == 77
    assert completion.request_id == server.request_ids[0]
    assert completion.logprobs is None and completion.token_bytes is None


def test_chunks_come_one_by_one(client: Any) -> None:
    with client.stream("Say hello") as stream:
        chunks = list(stream)
        assert stream.completion().text == "Hello"
    assert chunks == [
        Chunk("Hel", (5, 6), (True, False), 3, None, None, None, None, chunks[0].received_at),
        Chunk("lo", (7,), (False,), 5, None, None, "length", GenerationStats(), chunks[1].received_at),
    ]
    assert 0 < chunks[0].received_at <= chunks[1].received_at


def test_completion_reads_what_is_left(client: Any) -> None:
    with client.stream("Say hello") as stream:
        assert next(stream).text == "Hel"
        assert stream.completion().text == "Hello"
        assert stream.completion().text == "Hello"


def test_a_chunk_is_there_before_the_next(client: Any, server: ScriptedServer) -> None:
    server.generate = until_cancelled(piece("early", 1))
    with client.stream("x") as stream:
        assert next(stream).text == "early"


def test_statistics_are_in_seconds_and_counts(client: Any, server: ScriptedServer) -> None:
    final = last("", 9)
    final.statistics.prompt_tokens, final.statistics.cached_tokens, final.statistics.generated_tokens = 10, 4, 6
    final.statistics.steps, final.statistics.preemptions = 3, 1
    final.statistics.drafts.drafted, final.statistics.drafts.accepted = 8, 2
    final.statistics.drafts.drafted_by_position.extend([5, 3])
    final.statistics.drafts.accepted_by_position.extend([2, 0])
    final.statistics.queue_time.FromMilliseconds(250)
    final.statistics.time_to_first_token.FromMilliseconds(500)
    final.statistics.decode_time.FromMilliseconds(2500)
    server.generate = lambda *_: [final]
    stats = client.generate("x").stats
    assert stats == GenerationStats(10, 4, 6, 3, 8, 2, (5, 3), (2, 0), 1, 0.25, 0.5, 2.5)
    assert (stats.tokens_per_step, stats.acceptance_rate, stats.decode_tokens_per_second) == (2.0, 0.25, 2.0)
    assert stats.as_dict()["drafted_by_position"] == [5, 3]
    assert stats.as_dict()["acceptance_rate"] == 0.25


def test_logprobs_and_bytes_are_those_of_the_tokens(client: Any, server: ScriptedServer) -> None:
    logprobs = [
        output_pb2.TokenLogprobs(logprob=-0.5, top=[{"token_id": 4, "logprob": -0.25}]),
        output_pb2.TokenLogprobs(logprob=-1.0),
    ]
    server.generate = lambda *_: [
        piece("a", 5, logprobs=logprobs[:1], token_bytes=[b"a"]),
        last("", 6, logprobs=logprobs[1:], token_bytes=[b""]),
    ]
    completion = client.generate("x", logprobs=1, token_bytes=True)
    assert completion.logprobs == (TokenLogprobs(-0.5, ((4, -0.25),)), TokenLogprobs(-1.0))
    assert completion.token_bytes == (b"a", b"")


@pytest.mark.parametrize(
    ("reason", "name"),
    [(output_pb2.FINISH_REASON_STOP, "stop"), (output_pb2.FINISH_REASON_CANCELLED, "cancelled"), (99, "unknown")],
)
def test_finish_reasons(client: Any, server: ScriptedServer, reason: int, name: str) -> None:
    server.generate = lambda *_: [last("", 1, reason=reason)]
    assert client.generate("x").finish_reason == name


def test_options_reach_the_server(client: Any, server: ScriptedServer) -> None:
    client.generate(
        "Hi",
        max_tokens=12,
        min_tokens=2,
        temperature=0.5,
        top_k=40,
        top_p=0.75,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={3: -4.0},
        seed=2**64 - 1,
        logprobs=0,
        stop=["\n"],
        stop_token_ids=[8],
        ignore_eos=True,
        drafting=False,
        max_draft_length=0,
        token_bytes=True,
        salt="tenant",
        model="tiny",
    )
    assert server.requests.get(timeout=TIMEOUT) == generation_pb2.GenerateRequest(
        prompt={"text": "Hi"},
        sampling={
            "temperature": 0.5,
            "top_k": 40,
            "top_p": 0.75,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.25,
            "logit_bias": {3: -4.0},
            "seed": 2**64 - 1,
        },
        stop={"max_tokens": 12, "min_tokens": 2, "strings": ["\n"], "token_ids": [8], "ignore_end_tokens": True},
        drafting={"enabled": False, "max_length": 0},
        output={"logprobs": 0, "token_bytes": True},
        model="tiny",
        cache_salt="tenant",
    )


def test_what_is_not_given_is_not_sent(client: Any, server: ScriptedServer) -> None:
    client.generate([1, 2], temperature=None, stop=None)
    assert server.requests.get(timeout=TIMEOUT) == generation_pb2.GenerateRequest(prompt={"token_ids": {"ids": [1, 2]}})


def test_chat_messages_reach_the_server(client: Any, server: ScriptedServer) -> None:
    client.generate([{"role": "user", "content": "Hi"}])
    expected = generation_pb2.GenerateRequest(prompt={"messages": {"messages": [{"role": "user", "content": "Hi"}]}})
    assert server.requests.get(timeout=TIMEOUT) == expected


def test_request_ids_are_the_callers_or_new(client: Any, server: ScriptedServer) -> None:
    client.generate("x", request_id="mine-1")
    for _ in range(2):
        client.generate("x")
    first, *others = server.request_ids
    assert first == "mine-1"
    assert len(set(others)) == 2 and all(len(other) == 32 for other in others)


# --- ending early ----------------------------------------------------------------------------------------------------


def test_leaving_the_with_block_cancels(client: Any, server: ScriptedServer) -> None:
    server.generate = until_cancelled(piece("a", 1))
    with client.stream("x", request_id="left") as stream:
        next(stream)
    assert server.ended.get(timeout=TIMEOUT) == "left"
    with pytest.raises(Cancelled, match="left"):
        stream.completion()


def test_dropping_the_stream_cancels(client: Any, server: ScriptedServer) -> None:
    server.generate = until_cancelled(piece("a", 1))
    for _ in client.stream("x", request_id="dropped"):
        break
    gc.collect()
    assert server.ended.get(timeout=TIMEOUT) == "dropped"


def test_cancel_by_id_from_another_thread(client: Any, server: ScriptedServer) -> None:
    server.generate = until_cancelled(piece("a", 1))

    def cancel() -> None:
        server.requests.get(timeout=TIMEOUT)
        end = time.monotonic() + TIMEOUT
        while not client.cancel("doomed") and time.monotonic() < end:
            pass  # the server may have the request before the client's method has returned from sending it

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(Cancelled) as caught:
        client.generate("x", request_id="doomed")
    canceller.join(TIMEOUT)
    assert caught.value.request_id == "doomed"
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert server.ended.get(timeout=TIMEOUT) == "doomed"


def test_cancel_says_whether_something_ran(client: Any) -> None:
    assert client.cancel("never seen") is False
    stream = client.stream("x", request_id="over")
    stream.completion()
    assert client.cancel("over") is False
    assert stream.cancel() is False


def test_the_deadline_of_a_call(client: Any, server: ScriptedServer) -> None:
    server.generate = until_cancelled(piece("a", 1))
    with pytest.raises(DeadlineExceeded, match=r"timeout of 0\.2 s") as caught:
        client.generate("x", timeout=0.2, request_id="late")
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.ended.get(timeout=TIMEOUT) == "late"


def test_the_deadline_of_the_client_and_none(make_client: Any, server: ScriptedServer) -> None:
    client = make_client(server.address, timeout=0.2)
    server.generate = until_cancelled(piece("a", 1))
    with pytest.raises(DeadlineExceeded):
        client.generate("x")
    remaining: list[float | None] = []

    def note(_: object, context: Any) -> Any:
        remaining.append(context.time_remaining())
        return two_pieces()

    server.generate = note
    client.generate("x", timeout=float("inf"))
    client.generate("x", timeout=500)
    assert remaining[0] is None or remaining[0] > 1e6
    assert remaining[1] is not None and 400 < remaining[1] < 510


def test_a_stream_without_an_end_is_an_error(client: Any, server: ScriptedServer) -> None:
    server.generate = lambda *_: [piece("a", 1)]
    with client.stream("x") as stream:
        assert next(stream).text == "a"
        with pytest.raises(ServerError, match="not complete"):
            next(stream)
        with pytest.raises(ServerError, match="not complete"):
            stream.completion()


def test_closing_the_client_ends_what_runs(make_client: Any, server: ScriptedServer) -> None:
    client = make_client(server.address)
    server.generate = until_cancelled(piece("a", 1))
    stream = client.stream("x")
    next(stream)
    client.close()
    with pytest.raises(Cancelled):
        next(stream)
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")
    client.close()


def test_ctrl_c_cancels_the_call(server: ScriptedServer) -> None:
    server.generate = until_cancelled(piece("a", 1))
    reader = threading.get_ident()

    def interrupt() -> None:
        server.requests.get(timeout=TIMEOUT)
        # Once it is read: a call that is interrupted while gRPC starts it is nobody's, and ends with its channel.
        while not is_in(reader, draftwerk_client.stream):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with Client(server.address) as client:
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt) as interrupted:
            client.generate("x", request_id="interrupted")
        interrupter.join(TIMEOUT)
        assert server.ended.get(timeout=TIMEOUT) == "interrupted"
        assert interrupted.tb is not None  # as at a prompt: a call that it keeps is not ended by being dropped
        server.generate = two_pieces
        assert client.generate("x").text == "Hello"


# --- the other methods -----------------------------------------------------------------------------------------------


def test_model(client: Any, server: ScriptedServer) -> None:
    response = models_pb2.GetModelResponse()
    response.model.name, response.model.vocabulary_size, response.model.fingerprint = "tiny", 320, 2**64 - 1
    response.model.end_token_ids.extend([1, 5])
    server.unary[models_pb2.GetModelRequest] = lambda *_: response
    model = client.model()
    assert (model.name, model.vocabulary_size, model.fingerprint) == ("tiny", 320, 2**64 - 1)
    assert model.end_token_ids == (1, 5)


def test_tokenize_and_detokenize(client: Any, server: ScriptedServer) -> None:
    server.unary[models_pb2.TokenizeRequest] = lambda *_: models_pb2.TokenizeResponse(
        token_ids=[2, 9], token_bytes=[b"", b"a"]
    )
    server.unary[models_pb2.DetokenizeRequest] = lambda request, _: models_pb2.DetokenizeResponse(
        text=str(list(request.token_ids))
    )
    tokens = client.tokenize("a", add_bos=False)
    assert (tokens.token_ids, tokens.token_bytes) == ((2, 9), (b"", b"a"))
    assert server.requests.get(timeout=TIMEOUT) == models_pb2.TokenizeRequest(prompt={"text": "a"}, no_bos=True)
    assert client.detokenize((2, 9)) == "[2, 9]"


def test_stats(client: Any, server: ScriptedServer) -> None:
    response = operations_pb2.GetStatsResponse(requests=3, sessions=2)
    response.uptime.FromMilliseconds(1500)
    response.drafts.accepted_by_position.extend([2, 1])
    response.cache.used_bytes = 7
    response.time.target.FromMilliseconds(500)
    response.drafters.add(
        name="mtp",
        drafts={"drafted": 9, "accepted": 4, "drafted_by_position": [5, 4], "accepted_by_position": [3, 1]},
        recent={"drafted": 3, "accepted": 1, "drafted_by_position": [2, 1], "accepted_by_position": [1, 0]},
        recent_rounds=2,
        warning="hardly any",
    )
    server.unary[operations_pb2.GetStatsRequest] = lambda *_: response
    stats = client.stats()
    assert (stats.requests, stats.sessions, stats.uptime) == (3, 2, 1.5)
    assert (stats.accepted_by_position, stats.cache.used_bytes, stats.time.target) == ((2, 1), 7, 0.5)
    assert stats.drafters == (DrafterStats("mtp", 9, 4, (5, 4), (3, 1), 2, (2, 1), (1, 0), "hardly any"),)


def test_results_have_every_field_of_the_api(client: Any, server: ScriptedServer) -> None:
    """A field added to the API has to be added here too."""
    server.unary[operations_pb2.GetStatsRequest] = lambda *_: operations_pb2.GetStatsResponse(drafters=[{"name": "a"}])
    flattened = {
        "drafts": ["drafted", "accepted", "drafted_by_position", "accepted_by_position"],
        "recent": ["recent_drafted_by_position", "recent_accepted_by_position"],  # of which the others are sums
    }
    for result, descriptor in [
        (client.model(), models_pb2.Model.DESCRIPTOR),
        (client.stats(), operations_pb2.GetStatsResponse.DESCRIPTOR),
        (client.stats().cache, operations_pb2.CacheStatistics.DESCRIPTOR),
        (client.stats().drafters[0], statistics_pb2.DrafterStatistics.DESCRIPTOR),
        (client.stats().time, operations_pb2.EngineTime.DESCRIPTOR),
        (client.generate("x").stats, output_pb2.GenerateResponse().statistics.DESCRIPTOR),
    ]:
        expected = [name for field in descriptor.fields for name in flattened.get(field.name, [field.name])]
        assert set(expected) == set(type(result).__dataclass_fields__)
