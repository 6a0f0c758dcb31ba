"""The Python engine over a scripted core: prompts in, events to the right owner, text out, errors, cancellation."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from draftwerk import Engine, EngineClosed, GenerationError, QueueFull, RequestError, SamplingParams
from fake_checkpoint import FakeCheckpoint
from fake_core import Engine as ScriptedEngine
from fake_core import QueueFull as CoreQueueFull


def script(text: bytes):
    """A model that writes this text, then end tokens."""
    return lambda request, index: 4 + text[index] if index < len(text) else 1


def test_generate_returns_tokens_text_marks_and_statistics(engine: Engine) -> None:
    completion = engine.generate("ab", SamplingParams(max_tokens=5))
    assert completion.prompt_token_ids == (2, 4 + 97, 4 + 98)
    assert completion.token_ids == (2, 101, 102, 2, 101)
    assert completion.text == "aba"
    assert completion.finish_reason == "length"
    assert completion.drafted == (True, False, True, False, False)
    assert completion.logprobs is None
    assert completion.stats.generated_tokens == 5
    assert completion.stats.steps == 3
    assert completion.stats.tokens_per_step == pytest.approx(5 / 3)
    assert completion.stats.decode_tokens_per_second == pytest.approx(4 / 0.1)
    assert completion.stats.drafted_by_position == (5,)
    assert completion.stats.extra == {"preemptions": 0}
    assert completion.stats.as_dict()["preemptions"] == 0


def test_a_list_of_prompts_gives_a_list_in_order(engine: Engine) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    completions = engine.generate(prompts, SamplingParams(max_tokens=9))
    assert [c.text for c in completions] == [p[:8] for p in prompts]
    assert [c.text for c in engine.generate([[101, 102], [103]], SamplingParams(max_tokens=3))] == ["aba", "ccc"]
    assert engine.generate([]) == []


def test_each_prompt_may_have_its_own_parameters(engine: Engine, scripted: ScriptedEngine) -> None:
    params = [SamplingParams(max_tokens=n, seed=n) for n in (1, 2, 3)]
    assert [len(c.token_ids) for c in engine.generate(["a", "b", "c"], params)] == [1, 2, 3]
    assert [r.seed for r in scripted.requests] == [1, 2, 3]
    with pytest.raises(RequestError, match="one for each of 3 prompts"):
        engine.generate(["a", "b", "c"], params[:2])


def test_prompt_forms(engine: Engine, checkpoint: FakeCheckpoint) -> None:
    assert engine.encode_prompt("a") == [2, 101]
    assert engine.encode_prompt((101, 102)) == [101, 102]
    assert engine.detokenize(engine.encode_prompt([{"role": "user", "content": "hi"}])) == "<user>hi"


@pytest.mark.parametrize(
    "prompt", [None, 5, b"text", [1.5], [[1]], [{"role": "user", "content": "x"}, 5], [-1], "\ud800"]
)
def test_what_is_no_prompt(engine: Engine, prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        engine.submit(prompt)
    assert caught.value.field.startswith("prompt")


def test_bytes_and_text_of_tokens(engine: Engine) -> None:
    ids = [2, *(4 + byte for byte in "né".encode())]
    assert engine.token_bytes(ids) == [b"", b"n", b"\xc3", b"\xa9"]
    assert engine.detokenize(ids) == "né"
    for wrong in ([-1], [1.5], "text", 5):
        for method in (engine.token_bytes, engine.detokenize):
            with pytest.raises(RequestError) as caught:
                method(wrong)  # type: ignore[arg-type]
            assert caught.value.field.startswith("token_ids")


def test_a_long_prompt_of_any_integers_is_taken_as_it_is(engine: Engine, scripted: ScriptedEngine) -> None:
    ids = [4 + i % 250 for i in range(100_000)]
    for prompt in (ids, tuple(ids), np.array(ids)):
        generation = engine.submit(prompt, SamplingParams(max_tokens=1))
        assert generation.prompt_token_ids == tuple(ids)
        assert scripted.requests[-1].prompt == ids
    with pytest.raises(RequestError, match=r"prompt\[99999\] = -5"):
        engine.submit([*ids[:-1], -5])


def test_a_chat_prompt_needs_a_template(checkpoint: FakeCheckpoint) -> None:
    checkpoint.chat_template = None
    with Engine("fake") as engine, pytest.raises(RequestError, match="no chat template"):
        engine.generate([{"role": "user", "content": "hi"}])


def test_a_checkpoint_without_tokenizer_works_with_ids(checkpoint: FakeCheckpoint) -> None:
    checkpoint.tokenizer = None
    with Engine("fake") as engine:
        completion = engine.generate([101, 102], SamplingParams(max_tokens=3))
        assert (completion.token_ids, completion.text) == ((101, 102, 101), "")
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.generate("text")
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.generate([101], SamplingParams(stop=["x"]))


def test_stream_pieces_join_to_the_completion(engine: Engine) -> None:
    params = SamplingParams(max_tokens=7)
    completion = engine.generate("xyz", params)
    chunks = list(engine.stream("xyz", params))
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == completion.token_ids
    assert [chunk.position for chunk in chunks] == [4, 6, 8, 10]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert [chunk.stats is not None for chunk in chunks] == [False, False, False, True]
    assert sorted(chunk.received_at for chunk in chunks) == [chunk.received_at for chunk in chunks]


def test_result_after_partial_iteration_is_whole(engine: Engine) -> None:
    generation = engine.submit("xyz", SamplingParams(max_tokens=8))
    next(iter(generation))
    assert generation.result().token_ids == (2, 124, 125, 126) * 2
    assert list(generation) == []
    assert generation.done


def test_streamed_text_never_has_half_a_character(engine: Engine, scripted: ScriptedEngine) -> None:
    text = "naïve 🦜 日本語"
    scripted.next_token = script(text.encode())
    pieces = [chunk.text for chunk in engine.stream("a", SamplingParams(max_tokens=100, drafting=False))]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    scripted.next_token = script("🦜".encode()[:3])
    assert engine.generate("a", SamplingParams(max_tokens=3)).text == "\ufffd"


def test_stop_string_cuts_the_text_and_is_never_streamed(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.next_token = script(b"one EN two END three")
    for drafting in (True, False):
        params = SamplingParams(max_tokens=50, stop=["never", "END"], drafting=drafting)
        pieces = [chunk.text for chunk in engine.stream("a", params)]
        assert "".join(pieces) == "one EN two "
        completion = engine.generate("a", params)
        assert (completion.text, completion.finish_reason) == ("one EN two ", "stop")
        assert engine.detokenize(completion.token_ids).startswith("one EN two END")


def test_a_stop_token_is_no_part_of_the_text(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.next_token = script(b"one;two")
    completion = engine.generate("a", SamplingParams(stop_token_ids=[4 + ord(";")]))
    assert (completion.text, completion.finish_reason) == ("one", "stop")
    assert completion.token_ids[-1] == 4 + ord(";")


def test_logprobs(engine: Engine) -> None:
    completion = engine.generate("a", SamplingParams(max_tokens=3, logprobs=2))
    assert completion.logprobs is not None
    assert [(entry.logprob, len(entry.top)) for entry in completion.logprobs] == [(-0.5, 2)] * 3


def test_every_parameter_reaches_the_core(engine: Engine, scripted: ScriptedEngine) -> None:
    params = SamplingParams(
        max_tokens=3,
        min_tokens=1,
        temperature=0.5,
        top_k=5,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.125,
        frequency_penalty=-0.125,
        logit_bias={7: 2.5},
        seed=2**64 - 1,
        logprobs=0,
        stop=["é"],
        stop_token_ids=[9],
        ignore_eos=True,
        drafting=False,
        max_draft_length=3,
        salt="tenant",
    )
    engine.generate([101], params)
    sent = scripted.requests[-1]
    for name in (field.name for field in fields(SamplingParams) if field.name not in ("stop", "special_tokens")):
        assert getattr(sent, name) == getattr(params, name), name
    assert sent.stop_strings == ["é".encode()]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 1.5, "an integer"),
        ("max_tokens", 2**40, "1 to 2147483647"),
        ("max_tokens", True, "an integer"),
        ("top_k", "5", "an integer"),
        ("seed", -1, "0 to 18446744073709551615"),
        ("seed", 2**64, "0 to 18446744073709551615"),
        ("temperature", "hot", "a number"),
        ("temperature", None, "a number"),
        ("logprobs", -1, "0 to"),
        ("logit_bias", [1, 2], "a mapping"),
        ("logit_bias", {-1: 0.0}, "0 to"),
        ("logit_bias", {1: "x"}, "a number"),
        ("stop", "END", "a sequence of strings"),
        ("stop", [""], "a non-empty string"),
        ("stop", ["\ud800"], "valid Unicode"),
        ("stop_token_ids", [1.5], "an integer"),
        ("stop_token_ids", 5, "a sequence"),
        ("salt", 5, "a string"),
        ("max_draft_length", -2, "0 to"),
    ],
)
def test_wrong_values_name_field_value_and_what_is_allowed(
    engine: Engine, field: str, value: object, allowed: str
) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([101], replace(SamplingParams(), **{field: value}))
    assert caught.value.field.startswith(field)
    assert allowed in caught.value.allowed
    assert str(caught.value).startswith(caught.value.field)


def test_errors_of_the_core_become_those_of_the_package(engine: Engine, scripted: ScriptedEngine) -> None:
    with pytest.raises(RequestError, match="max_tokens = 0: must be 1 or more"):
        engine.generate("a", SamplingParams(max_tokens=0))
    scripted.refuse_with = CoreQueueFull("1000 tokens are queued")
    with pytest.raises(QueueFull, match="1000 tokens"):
        engine.generate("a")


def test_a_refused_prompt_cancels_the_batch(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    with pytest.raises(RequestError):
        engine.generate(["a", "b"], [SamplingParams(), SamplingParams(max_tokens=0)])
    assert scripted.cancelled == [1]


def test_a_failure_inside_the_engine_is_raised(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.fail_with = "out of pages"
    with pytest.raises(GenerationError, match="out of pages"):
        engine.generate("a")
    with pytest.raises(GenerationError, match="out of pages"):
        list(engine.stream("a"))


def test_cancel_ends_a_generation(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    generation = engine.submit("a", SamplingParams(max_tokens=1000))
    assert not generation.wait(0.01)
    with pytest.raises(TimeoutError):
        generation.result(timeout=0.01)
    generation.cancel()
    assert generation.result().finish_reason == "cancelled"
    generation.cancel()  # of what is done already: nothing happens
    assert scripted.cancelled == [1]


def test_leaving_a_stream_cancels_it(engine: Engine, scripted: ScriptedEngine) -> None:
    stream = engine.stream("a", SamplingParams(max_tokens=10**6))
    next(stream)
    stream.close()
    assert scripted.cancelled == [1]


def test_a_stream_that_nobody_reads_is_cancelled(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    stream = engine.stream("a", SamplingParams(max_tokens=10**6))
    stream.close()
    assert scripted.cancelled == [1]
    stream = engine.stream("b", SamplingParams(max_tokens=10**6))
    del stream
    gc.collect()
    assert scripted.cancelled[-1] == 2


def test_close_ends_what_runs(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    generation = engine.submit("a")
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            generation.result()
        except EngineClosed as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    engine.close()
    waiter.join(10)
    assert len(failures) == 1
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit("a")
    with pytest.raises(EngineClosed):
        list(generation)


def test_an_engine_that_is_dropped_closes_itself(checkpoint: FakeCheckpoint) -> None:
    engine = Engine("fake")
    scripted, gone = ScriptedEngine.instances[-1], weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert scripted.closed


def test_many_threads_get_their_own_tokens(engine: Engine) -> None:
    texts: dict[int, str] = {}

    def work(i: int) -> None:
        texts[i] = "".join(chunk.text for chunk in engine.stream([100 + i], SamplingParams(max_tokens=20)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: chr(96 + i) * 20 for i in range(16)}


async def test_asyncio_generate_and_stream(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6)
    completions = await asyncio.gather(*(engine.agenerate([100 + i], params) for i in range(20)))
    assert [c.text for c in completions] == [chr(96 + i) * 6 for i in range(20)]
    assert "".join([chunk.text async for chunk in engine.astream("ab", params)]) == "abab"


async def test_asyncio_streams_side_by_side(engine: Engine) -> None:
    async def read(i: int) -> str:
        return "".join([c.text async for c in engine.astream([100 + i], SamplingParams(max_tokens=50))])

    assert await asyncio.gather(*(read(i) for i in range(16))) == [chr(96 + i) * 50 for i in range(16)]


async def test_cancelling_a_task_cancels_its_request(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()

    async def read() -> None:
        async for _ in engine.astream("b"):
            pass

    tasks = [asyncio.create_task(engine.agenerate("a")), asyncio.create_task(read())]
    while len(scripted.requests) < 2:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
    assert sorted(scripted.cancelled) == [1, 2]


async def test_closing_wakes_tasks(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    task = asyncio.create_task(engine.agenerate("a"))
    while not scripted.requests:
        await asyncio.sleep(0)
    engine.close()
    with pytest.raises(EngineClosed):
        await task


def test_engine_options(checkpoint: FakeCheckpoint) -> None:
    with Engine("fake", drafter="none", kv_memory="3MiB", max_context=99, draft_length=2, prefix_cache=False) as engine:
        options = ScriptedEngine.instances[-1].options
        assert (options.drafters, options.kv_memory_bytes, options.max_context) == ([], 3 << 20, 99)
        assert (options.draft_length, options.prefix_cache, options.eos_token_ids) == (2, False, [1])
        assert engine.info.kv_memory_bytes == 3 << 20
    with Engine("fake") as engine:
        assert engine.info.drafter == "lookup"
        assert engine.info.max_context == 4096
        assert 0 < engine.info.kv_memory_bytes <= 1 << 30


def test_a_kv_cache_that_memory_has_no_room_for_is_said(
    checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("draftwerk.engine.available_memory", lambda: (20 << 30) + 1)
    for size in ("20GiB", None):
        Engine("fake", kv_memory=size).close()
    assert not caplog.records
    Engine("fake", kv_memory="100GiB").close()
    (said,) = caplog.records
    assert (said.levelname, said.name) == ("WARNING", "draftwerk.engine")
    assert said.getMessage() == (
        "the KV cache may grow to 100.0 GiB, and with the weights loaded 20.0 GiB of memory are available: as it "
        "fills, the process may be ended for lack of memory; kv_memory = 20.0GiB fits"
    )


@pytest.mark.parametrize(
    "options", [{"drafter": "best"}, {"draft_length": 17}, {"kv_memory": "much"}, {"kv_memory": 0}, {"weights": "int3"}]
)
def test_engine_options_out_of_range(checkpoint: FakeCheckpoint, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        Engine("fake", **options)  # type: ignore[arg-type]
