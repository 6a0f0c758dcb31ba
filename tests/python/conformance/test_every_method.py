"""Every method over a real port, with bare stubs, against the same model in this process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from conformance.served import MAX_CONTEXT, Served
from conformance.sessions import Actions, text_of, token_prompt, tokens_of
from draftwerk import Engine, SamplingParams
from draftwerk_client.v1 import (
    generation_pb2,
    models_pb2,
    operations_pb2,
    output_pb2,
    parameters_pb2,
    session_pb2,
)
from service.serve_process import TIMEOUT

GREETING = "hello world"
SAMPLED = SamplingParams(temperature=1.0, seed=11, max_tokens=40)
FIELDS: dict[str, Any] = {
    "sampling": parameters_pb2.SamplingParameters(temperature=1.0, seed=11),
    "stop": parameters_pb2.StopConditions(max_tokens=40),
}
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "on"},
]


def chat_prompt(messages: list[dict[str, str]] = MESSAGES) -> parameters_pb2.Prompt:
    chat = parameters_pb2.ChatMessages(messages=[parameters_pb2.ChatMessage(**message) for message in messages])
    return parameters_pb2.Prompt(messages=chat)


def generate(server: Served, request: generation_pb2.GenerateRequest) -> list[output_pb2.GenerateResponse]:
    return list(server.generation.Generate(request, timeout=TIMEOUT))


# --- Generation.Generate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "token_ids", "messages"])
def test_generate_from_each_form_of_prompt(server: Served, reference: Engine, form: str) -> None:
    ids = reference.encode_prompt(MESSAGES if form == "messages" else GREETING)
    prompt = {
        "text": parameters_pb2.Prompt(text=GREETING),
        "token_ids": token_prompt(ids),
        "messages": chat_prompt(),
    }[form]
    responses = generate(server, generation_pb2.GenerateRequest(prompt=prompt, **FIELDS))
    expected = reference.generate(ids, SAMPLED)
    assert tokens_of(responses) == list(expected.token_ids)
    assert text_of(responses) == expected.text
    assert responses[-1].statistics.prompt_tokens == len(ids)


def test_generate_with_every_option(server: Served, reference: Engine) -> None:
    params = SamplingParams(
        max_tokens=60,
        min_tokens=5,
        temperature=0.8,
        top_k=100,
        top_p=0.95,
        min_p=0.001,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={30: 1.5, 31: -2.0},
        seed=2**64 - 1,
        logprobs=3,
        stop=("hello", "the"),
        stop_token_ids=(250,),
        ignore_eos=True,
    )
    request = generation_pb2.GenerateRequest(
        prompt=parameters_pb2.Prompt(text=GREETING),
        sampling=parameters_pb2.SamplingParameters(
            temperature=0.8,
            top_k=100,
            top_p=0.95,
            min_p=0.001,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=0.1,
            logit_bias={30: 1.5, 31: -2.0},
            seed=2**64 - 1,
        ),
        stop=parameters_pb2.StopConditions(
            max_tokens=60, min_tokens=5, strings=["hello", "the"], token_ids=[250], ignore_end_tokens=True
        ),
        drafting=parameters_pb2.DraftingOptions(enabled=True, max_length=3),
        output=parameters_pb2.OutputOptions(logprobs=3, token_bytes=True),
        model="tiny",
        cache_salt="tenant",
    )
    # The wire has 32-bit floats.
    float32 = {
        name: getattr(request.sampling, name)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    expected = reference.generate(GREETING, replace(params, **float32))
    responses = generate(server, request)
    assert tokens_of(responses) == list(expected.token_ids)
    assert text_of(responses) == expected.text
    assert expected.logprobs is not None
    logprobs = [logprob for response in responses for logprob in response.logprobs]
    assert [logprob.logprob for logprob in logprobs] == [logprob.logprob for logprob in expected.logprobs]
    assert [[top.token_id for top in logprob.top] for logprob in logprobs] == [
        [token for token, _ in logprob.top] for logprob in expected.logprobs
    ]


def test_what_a_stream_is_made_of(server: Served, reference: Engine) -> None:
    # Greedily this model repeats itself, so that the drafter has something to find.
    request = generation_pb2.GenerateRequest(
        prompt=parameters_pb2.Prompt(text=GREETING),
        stop=parameters_pb2.StopConditions(max_tokens=60, ignore_end_tokens=True),
        output=parameters_pb2.OutputOptions(token_bytes=True),
    )
    call = server.generation.Generate(request, timeout=TIMEOUT, metadata=(("x-request-id", "made-of"),))
    assert dict(call.initial_metadata())["x-request-id"] == "made-of"
    responses = list(call)
    position = len(reference.tokenize(GREETING))
    for response in responses:
        assert response.position == position
        assert 0 <= response.drafted_tokens <= len(response.token_ids)
        assert len(response.token_bytes) == len(response.token_ids)
        assert not response.logprobs
        position += len(response.token_ids)
    assert all(response.token_ids for response in responses[:-1])
    assert [response.request_id for response in responses] == ["made-of"] + [""] * (len(responses) - 1)
    assert all(not response.finish_reason and not response.HasField("statistics") for response in responses[:-1])
    last = responses[-1]
    expected = reference.generate(GREETING, SamplingParams(max_tokens=60, ignore_eos=True))
    assert last.finish_reason == output_pb2.FINISH_REASON_LENGTH
    assert last.statistics.generated_tokens == len(expected.token_ids)
    assert last.statistics.steps == sum(bool(response.token_ids) for response in responses)
    assert last.statistics.drafts.accepted == sum(response.drafted_tokens for response in responses) > 0
    assert last.statistics.time_to_first_token.ToTimedelta() >= last.statistics.queue_time.ToTimedelta()
    joined = b"".join(piece for response in responses for piece in response.token_bytes)
    assert joined.decode(errors="replace") == reference.detokenize(list(expected.token_ids))


def test_fingerprints_say_whether_outputs_are_equal(server: Served) -> None:
    base = generation_pb2.GenerateRequest(prompt=token_prompt([2, 20, 21]), **FIELDS)
    same, salted, seeded, longer, prompted = (generation_pb2.GenerateRequest() for _ in range(5))
    for request in (same, salted, seeded, longer, prompted):
        request.CopyFrom(base)
    same.drafting.enabled = False
    same.output.logprobs = 1
    salted.cache_salt = "other"
    seeded.sampling.seed += 1
    longer.stop.max_tokens += 1
    prompted.prompt.token_ids.ids.append(22)
    expected, *others = [
        {response.fingerprint for response in generate(server, request)}
        for request in (base, same, salted, seeded, longer, prompted)
    ]
    assert len(expected) == 1 and expected != {0}
    assert [other == expected for other in others] == [True, True, False, False, False]


def test_text_and_tokens_are_one_prompt(server: Served, reference: Engine) -> None:
    by_text = generate(server, generation_pb2.GenerateRequest(prompt=parameters_pb2.Prompt(text=GREETING), **FIELDS))
    ids = reference.tokenize(GREETING)
    by_ids = generate(server, generation_pb2.GenerateRequest(prompt=token_prompt(ids), **FIELDS))
    assert by_text[0].fingerprint == by_ids[0].fingerprint


def test_a_second_request_finds_the_prefix(server: Served) -> None:
    prompt = token_prompt([2, *range(40, 140)])
    for _ in range(2):
        request = generation_pb2.GenerateRequest(prompt=prompt, stop=FIELDS["stop"], cache_salt="prefix")
        cached = generate(server, request)[-1].statistics.cached_tokens
    assert 64 <= cached < 101


def test_request_ids(server: Served) -> None:
    request = generation_pb2.GenerateRequest(prompt=token_prompt([2]), stop=parameters_pb2.StopConditions(max_tokens=1))

    def answered(*metadata: tuple[str, str]) -> str:
        call = server.generation.Generate(request, timeout=TIMEOUT, metadata=metadata)
        found = dict(call.initial_metadata())["x-request-id"]
        assert next(iter(call)).request_id == found
        return str(found)

    assert answered(("x-request-id", "a" * 128)) == "a" * 128
    assert answered(("x-request-id", "a" * 129)) not in ("", "a" * 129)
    assert answered() != answered()
    _, call = server.models.GetModel.with_call(models_pb2.GetModelRequest(), timeout=TIMEOUT)
    assert dict(call.initial_metadata())["x-request-id"]


# --- Generation.Session ------------------------------------------------------------------------------------------


def test_session_with_every_action(session: Actions, reference: Engine) -> None:
    """Each action once; where injection and interruption land is the answer's to say, what follows is not."""
    long = parameters_pb2.StopConditions(max_tokens=MAX_CONTEXT // 2, ignore_end_tokens=True)
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=MAX_CONTEXT // 2, ignore_eos=True)
    request_id = session.open(sampling=FIELDS["sampling"], stop=long).request_id
    assert request_id == dict(session.call.initial_metadata())["x-request-id"]
    start = reference.tokenize(GREETING)
    appended = session.answer(session_pb2.SessionRequest.Append(content=parameters_pb2.Prompt(text=GREETING)))
    assert (list(appended.token_ids), appended.length) == (start, len(start))

    generation = session.start()
    chunks = session.chunks(generation)
    generated = tokens_of([next(chunks)])
    inject = session.send(session_pb2.SessionRequest.Inject(content=token_prompt([30, 31])))
    injected = next(session.responses(inject)).injected
    assert list(injected.token_ids) == [30, 31]
    interrupt = session.send(session_pb2.SessionRequest.Interrupt())
    rest = list(chunks)
    interrupted = next(session.responses(interrupt)).interrupted
    assert rest[-1].finish_reason == output_pb2.FINISH_REASON_CANCELLED

    for chunk in rest:
        if chunk.position == injected.position + 2 and chunk.token_ids:
            assert len(start) + len(generated) == injected.position
            generated += [30, 31]
        generated += chunk.token_ids
    if len(start) + len(generated) == injected.position:  # the interruption came before another token did
        generated += [30, 31]
    assert interrupted.length == len(start) + len(generated)
    before = injected.position - len(start)
    after = generated[before + 2 :]
    assert generated[:before] == list(reference.generate(start, replace(params, max_tokens=before)).token_ids)
    expected = reference.generate([*start, *generated[: before + 2]], replace(params, max_tokens=max(1, len(after))))
    assert after == list(expected.token_ids)[: len(after)]

    forked = session.answer(session_pb2.SessionRequest.Fork(position=len(start)))
    assert (forked.branch, forked.length) == (1, len(start))
    copy = session.generate(forked.branch, stop=FIELDS["stop"])
    assert tokens_of(copy) == list(reference.generate(start, SAMPLED).token_ids)
    assert session.answer(session_pb2.SessionRequest.Close(), 1) == session_pb2.SessionResponse.Closed()
    session.end()


def test_branches_generate_at_the_same_time(session: Actions, reference: Engine) -> None:
    session.open(stop=parameters_pb2.StopConditions(max_tokens=300, ignore_end_tokens=True))
    session.append([2, 20])
    branches = [0] + [session.answer(session_pb2.SessionRequest.Fork()).branch for _ in range(4)]
    numbers = [
        session.start(branch, sampling=parameters_pb2.SamplingParameters(temperature=1.0, seed=branch))
        for branch in branches
    ]
    for branch, number in zip(branches, numbers, strict=True):
        params = SamplingParams(temperature=1.0, seed=branch, max_tokens=300, ignore_eos=True)
        assert tokens_of(session.chunks(number)) == list(reference.generate([2, 20], params).token_ids)
    session.end()


def test_a_chat_of_two_turns(session: Actions, reference: Engine) -> None:
    session.open(sampling=FIELDS["sampling"], stop=parameters_pb2.StopConditions(max_tokens=10))
    said = [{"role": "user", "content": "hello"}]
    appended = session.answer(session_pb2.SessionRequest.Append(content=chat_prompt(said)))
    branch = reference.encode_prompt(said)
    assert list(appended.token_ids) == branch
    branch += tokens_of(session.generate())
    more = reference.continue_chat(branch, [{"role": "user", "content": "world"}])
    appended = session.answer(
        session_pb2.SessionRequest.Append(content=chat_prompt([{"role": "user", "content": "world"}]))
    )
    assert list(appended.token_ids) == more
    assert appended.length == len(branch) + len(more)
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=10)
    assert tokens_of(session.generate()) == list(reference.generate([*branch, *more], params).token_ids)
    session.end()


# --- Models, Operations, health ----------------------------------------------------------------------------------


def test_get_model(server: Served, reference: Engine) -> None:
    for name in ("", "tiny"):
        model = server.models.GetModel(models_pb2.GetModelRequest(name=name), timeout=TIMEOUT).model
        info = reference.info
        assert (model.name, model.architecture, model.vocabulary_size) == ("tiny", info.architecture, info.vocab_size)
        assert (model.backend, model.drafter) == (info.backend, "lookup")
        assert (model.max_context, model.weight_bytes) == (info.max_context, info.weight_bytes)
        assert (model.has_tokenizer, model.has_chat_template) == (True, True)
        assert tuple(model.end_token_ids) == info.end_token_ids
        assert model.fingerprint == info.fingerprint
        assert model.server_version


def test_tokenize_and_detokenize(server: Served, reference: Engine) -> None:
    def tokenize(prompt: parameters_pb2.Prompt, no_bos: bool = False) -> models_pb2.TokenizeResponse:
        return server.models.Tokenize(models_pb2.TokenizeRequest(prompt=prompt, no_bos=no_bos), timeout=TIMEOUT)

    for text in ("", GREETING, "é à 日本\n\n  the 🙂 <end_of_turn>"):
        assert list(tokenize(parameters_pb2.Prompt(text=text)).token_ids) == reference.tokenize(text)
        bare = tokenize(parameters_pb2.Prompt(text=text), no_bos=True)
        assert list(bare.token_ids) == reference.tokenize(text, add_bos=False)
        assert b"".join(bare.token_bytes).decode() == text.replace("<end_of_turn>", "")
        back = server.models.Detokenize(models_pb2.DetokenizeRequest(token_ids=bare.token_ids), timeout=TIMEOUT)
        assert back.text == text.replace("<end_of_turn>", "")
    assert list(tokenize(chat_prompt()).token_ids) == reference.encode_prompt(MESSAGES)
    assert list(tokenize(token_prompt([5, 6, 7])).token_ids) == [5, 6, 7]


def test_get_stats_counts(server: Served) -> None:
    before = server.wait_idle()
    request = generation_pb2.GenerateRequest(prompt=token_prompt([2, 20]), stop=FIELDS["stop"])
    generated = len(tokens_of(generate(server, request)))
    after = server.wait_idle()
    assert (after.requests, after.finished) == (before.requests + 1, before.finished + 1)
    assert after.generated_tokens == before.generated_tokens + generated
    assert after.steps > before.steps and after.rows > before.rows
    assert after.uptime.ToTimedelta() > before.uptime.ToTimedelta()
    assert after.peak_resident_bytes >= after.resident_bytes > 10 << 20
    assert 0 <= after.cache.reclaimable_bytes <= after.cache.used_bytes <= after.cache.peak_bytes
    assert after.cache.peak_bytes <= after.cache.budget_bytes <= 64 << 20
    assert after.max_queued_tokens > 0 and after.queued_tokens == 0
    assert not math.isclose(after.time.target.ToTimedelta().total_seconds(), 0.0)


def test_get_stats_shows_an_open_session(server: Served, session: Actions) -> None:
    session.open()
    assert server.stats().sessions == 1
    session.end()
    assert server.wait_idle().sessions == 0


def test_health(server: Served) -> None:
    services = ["", "draftwerk.v1.Generation", "draftwerk.v1.Models", "draftwerk.v1.Operations"]
    for service in services:
        request = health_pb2.HealthCheckRequest(service=service)
        assert server.health.Check(request, timeout=TIMEOUT).status == health_pb2.HealthCheckResponse.SERVING
    watch = server.health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    with pytest.raises(grpc.RpcError) as unknown:
        server.health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_no_method_is_left_out() -> None:
    """The tests above, by the protos: a method that is added there has to be added here."""
    methods = {
        f"{service.name}.{method.name}"
        for file in (generation_pb2, models_pb2, operations_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert methods == {
        "Generation.Generate",
        "Generation.Session",
        "Models.GetModel",
        "Models.Tokenize",
        "Models.Detokenize",
        "Operations.GetStats",
    }
