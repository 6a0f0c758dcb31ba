"""Client and AsyncClient over a real port: the same calls, the same results, the same errors."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import draftwerk_client
from conformance.served import MAX_CONTEXT, Served, serve
from draftwerk import Engine, SamplingParams
from draftwerk_client import AsyncClient, Client
from service.serve_process import TIMEOUT

GREETING = "hello world"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 40}


class Awaited:
    """An object of the asyncio client with the face of the other one: each call runs its coroutine to the end."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        return functools.partial(self._run, value)

    def __enter__(self) -> Awaited:
        self._run(self._inner.__aenter__)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._run(self._inner.__aexit__, *raised)

    def __iter__(self) -> Iterator[Any]:
        chunks = aiter(self._inner)
        while True:
            try:
                yield self._run(anext, chunks)
            except StopAsyncIteration:
                return

    def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        async def run() -> Any:
            value = function(*arguments, **options)
            return await value if inspect.isawaitable(value) else value

        value = self._loop.run_until_complete(asyncio.wait_for(run(), TIMEOUT))
        return Awaited(value, self._loop) if hasattr(value, "__aenter__") else value


Connect = Callable[[str], Any]  # by address


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients of one kind; all have the face of Client."""
    if request.param == "Client":
        yield lambda address: Client(address, timeout=TIMEOUT, retries=0)
        return
    loop = asyncio.new_event_loop()
    yield lambda address: Awaited(AsyncClient(address, timeout=TIMEOUT, retries=0), loop)
    # Calls that were cancelled end a moment later. grpc.aio tells the loop of it, and takes a closed one badly.
    if tasks := asyncio.all_tasks(loop):
        loop.run_until_complete(asyncio.wait(tasks, timeout=TIMEOUT))
    loop.close()


@pytest.fixture
def client(connect: Connect, server: Served) -> Iterator[Any]:
    with connect(server.address) as opened:
        yield opened


def test_generate(client: Any, reference: Engine) -> None:
    expected = reference.generate(GREETING, SamplingParams(**SAMPLED, logprobs=2))
    completion = client.generate(GREETING, **SAMPLED, logprobs=2, token_bytes=True, request_id="by-the-client")
    assert (completion.text, tuple(completion.token_ids)) == (expected.text, expected.token_ids)
    assert completion.finish_reason == expected.finish_reason
    assert len(completion.drafted) == len(completion.token_bytes) == len(expected.token_ids)
    assert expected.logprobs is not None
    assert [one.logprob for one in completion.logprobs] == [one.logprob for one in expected.logprobs]
    assert completion.request_id == "by-the-client"
    assert completion.fingerprint != 0
    assert completion.stats.prompt_tokens == len(expected.prompt_token_ids)
    assert completion.stats.generated_tokens == len(expected.token_ids)


@pytest.mark.parametrize("prompt", [[2, 20, 21], [{"role": "user", "content": "hello"}]], ids=["ids", "messages"])
def test_other_prompts(client: Any, reference: Engine, prompt: Any) -> None:
    expected = reference.generate(reference.encode_prompt(prompt), SamplingParams(**SAMPLED))
    assert tuple(client.generate(prompt, **SAMPLED).token_ids) == expected.token_ids


def test_stream(client: Any, reference: Engine) -> None:
    expected = reference.generate(GREETING, SamplingParams(**SAMPLED))
    with client.stream(GREETING, **SAMPLED) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [expected.finish_reason]
    assert chunks[-1].stats.steps == len([chunk for chunk in chunks if chunk.token_ids])


def test_leaving_a_stream_frees_the_place(client: Any, server: Served) -> None:
    with client.stream([2], max_tokens=MAX_CONTEXT - 100, ignore_eos=True) as stream:
        next(iter(stream))
    server.wait_idle()


def test_cancel_by_stream_and_by_id(client: Any, server: Served) -> None:
    ways: list[Callable[[Any], object]] = [lambda s: s.cancel(), lambda s: client.cancel(s.request_id)]
    for cancel in ways:
        with client.stream([2], max_tokens=MAX_CONTEXT - 100, ignore_eos=True) as stream:
            next(iter(stream))
            cancel(stream)
            with pytest.raises(draftwerk_client.Cancelled):
                list(stream)
        server.wait_idle()
    assert client.cancel("nobody") is False


def test_session(client: Any, reference: Engine) -> None:
    with client.session(**SAMPLED) as session:
        appended = session.append(GREETING)
        branch = reference.tokenize(GREETING)
        assert (list(appended.token_ids), appended.length) == (branch, len(branch))
        first = session.generate()
        branch += first.token_ids
        assert first.token_ids == reference.generate(GREETING, SamplingParams(**SAMPLED)).token_ids
        assert session.length == len(branch)
        fork = session.fork()
        session.append([30, 31])
        second = session.generate(max_tokens=7, temperature=1.0, seed=12)
        params = SamplingParams(temperature=1.0, seed=12, max_tokens=7)
        assert second.token_ids == reference.generate([*branch, 30, 31], params).token_ids
        assert second.stats.cached_tokens == len(branch) - 1
        assert fork.length == len(branch)
        fork.append([32])
        expected = reference.generate([*branch, 32], SamplingParams(**SAMPLED))
        assert fork.generate().token_ids == expected.token_ids
        fork.close()


def test_session_interrupt_and_inject(client: Any, reference: Engine) -> None:
    with client.session(temperature=1.0, seed=5, max_tokens=MAX_CONTEXT // 2, ignore_eos=True) as session:
        session.append([2])
        with session.stream() as stream:
            chunks = iter(stream)
            got = list(next(chunks).token_ids)
            injected = session.inject([30, 31])
            at = injected.position - 1
            while len(got) <= at:  # until there is something behind it
                got += next(chunks).token_ids
            session.interrupt()
            for chunk in chunks:
                got += chunk.token_ids
        params: dict[str, Any] = {"temperature": 1.0, "seed": 5, "ignore_eos": True}
        assert got[:at] == list(reference.generate([2], SamplingParams(**params, max_tokens=at)).token_ids)
        prompt = [2, *got[:at], 30, 31]
        assert session.length == 3 + len(got)
        after = got[at:]
        expected = reference.generate(prompt, SamplingParams(**params, max_tokens=len(after)))
        assert after == list(expected.token_ids)


def test_model_stats_tokens(client: Any, reference: Engine) -> None:
    client.wait_ready(TIMEOUT)
    model = client.model()
    assert (model.name, model.vocabulary_size) == ("tiny", reference.info.vocab_size)
    assert model.fingerprint == reference.info.fingerprint
    assert client.stats().steps > 0
    assert list(client.tokenize(GREETING).token_ids) == reference.tokenize(GREETING)
    assert client.detokenize(reference.tokenize(GREETING)) == GREETING


# --- errors ------------------------------------------------------------------------------------------------------


def test_invalid_request(client: Any) -> None:
    with pytest.raises(draftwerk_client.InvalidRequest) as raised:
        client.generate(GREETING, top_p=2.0, request_id="wrong-p")
    [violation] = raised.value.violations
    assert violation.field == "sampling.top_p"
    assert "must be" in violation.description
    assert raised.value.request_id == "wrong-p"
    assert "top_p" in str(raised.value)
    with pytest.raises(draftwerk_client.InvalidRequest):
        client.tokenize([320])


def test_out_of_order(client: Any) -> None:
    with client.session() as session:
        with pytest.raises(draftwerk_client.OutOfOrder):
            session.generate()
        assert session.append([2]).length == 1  # it goes on


def test_deadline(client: Any, server: Served) -> None:
    with pytest.raises(draftwerk_client.DeadlineExceeded):
        client.generate([2], max_tokens=MAX_CONTEXT - 100, ignore_eos=True, timeout=0.05)
    server.wait_idle()


def test_nobody_there(connect: Connect, server: Served) -> None:
    with connect("127.0.0.1:9") as nowhere, pytest.raises(draftwerk_client.Unavailable):
        nowhere.generate(GREETING, timeout=5.0)


def test_a_full_queue(connect: Connect, crowded: Served) -> None:
    with connect(crowded.address) as client, pytest.raises(draftwerk_client.QueueFull) as raised:
        client.generate([2] * 40)
    assert raised.value.retry_after is not None and 0.1 <= raised.value.retry_after <= 10


def test_two_servers_share_the_calls(tiny_gguf: Path, server: Served) -> None:
    with (
        serve(tiny_gguf, "--kv-memory", "32MiB") as other,
        Client([server.address, other.address], timeout=TIMEOUT) as client,
    ):
        before = [one.wait_idle().requests for one in (server, other)]
        client.wait_ready(TIMEOUT)
        outputs = {client.generate(GREETING, **SAMPLED).token_ids for _ in range(8)}
        after = [one.wait_idle().requests for one in (server, other)]
    assert len(outputs) == 1
    assert sum(after) - sum(before) == 8
    assert all(now > then for now, then in zip(after, before, strict=True))
