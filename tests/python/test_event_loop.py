"""Events taken by an event loop itself (Engine.deliver_on): same tokens, one wake-up per step, no thread between."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_files as tiny

from draftwerk import Engine, EngineClosed, Generation, SamplingParams
from fake_checkpoint import NATIVE_MODULE_BUILT, FakeCheckpoint
from fake_core import Engine as ScriptedEngine

TIMEOUT = 10.0


def here() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


@pytest.fixture
def event_threads(engine: Engine) -> Callable[[], set[threading.Thread]]:
    """The threads that take events, apart from those of engines that other tests have open."""

    def named() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "draftwerk-events"}

    before = named()
    return lambda: named() - before


async def text_of(generation: Generation) -> str:
    return "".join([chunk.text async for chunk in generation])


async def test_streams_get_their_own_tokens_with_one_wake_up_per_step(
    engine: Engine, scripted: ScriptedEngine, event_threads: Callable[[], set[threading.Thread]]
) -> None:
    engine.deliver_on(here())
    generations = [engine.submit([100 + i], SamplingParams(max_tokens=50)) for i in range(16)]
    texts = await asyncio.wait_for(asyncio.gather(*map(text_of, generations)), TIMEOUT)
    assert texts == [chr(96 + i) * 50 for i in range(16)]
    assert set(scripted.takers) == {threading.current_thread().name}
    assert scripted.waits == 25  # two tokens a step
    assert not event_threads()


async def test_chunks_come_step_by_step(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(here())
    scripted.gate.clear()
    generation = engine.submit("a", SamplingParams(max_tokens=4))
    reader = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    assert not reader.done()
    scripted.gate.set()
    chunk = await asyncio.wait_for(reader, TIMEOUT)
    assert (chunk.position, chunk.token_ids, chunk.finish_reason) == (2, (2, 101), None)
    rest = [chunk async for chunk in generation]
    assert [chunk.finish_reason for chunk in rest] == ["length"]
    assert [chunk async for chunk in generation] == []


async def test_what_comes_just_before_the_wait_is_not_missed(
    engine: Engine, scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.gate.clear()
    create_future = here().create_future

    for read in (anext, Generation.aresult):
        generation = engine.submit("a", SamplingParams(max_tokens=2))

        def last_moment(generation: Generation = generation) -> asyncio.Future[None]:
            scripted.gate.set()
            assert generation.wait(TIMEOUT)
            scripted.gate.clear()
            return create_future()

        async def reads(generation: Generation = generation, read: Any = read) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(here(), "create_future", last_moment)
                await read(generation)

        await asyncio.wait_for(reads(), TIMEOUT)


async def test_results_and_other_threads_wait_as_before(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(here())
    params = SamplingParams(max_tokens=6)
    completions = await asyncio.gather(*(engine.agenerate([100 + i], params) for i in range(5)))
    assert [c.text for c in completions] == [chr(96 + i) * 6 for i in range(5)]
    assert (await asyncio.to_thread(engine.generate, [101, 102], params)).text == "ababab"
    in_thread = await asyncio.to_thread(lambda: "".join(chunk.text for chunk in engine.stream([101], params)))
    assert in_thread == "a" * 6
    assert set(scripted.takers) == {threading.current_thread().name}


async def test_waiting_on_the_thread_of_the_loop_is_refused(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(here())
    scripted.gate.clear()
    generation = engine.submit("a", SamplingParams(max_tokens=2))
    for wait in (generation.result, generation.wait, lambda: next(generation)):
        with pytest.raises(RuntimeError, match="await aresult"):
            wait()
    scripted.gate.set()
    completion = await generation.aresult()
    assert generation.result() == completion  # it is done: nothing to wait for
    assert generation.wait()


async def test_the_loop_takes_over_from_the_thread(
    engine: Engine, scripted: ScriptedEngine, event_threads: Callable[[], set[threading.Thread]]
) -> None:
    expected = tuple(range(4, 200))
    running = [engine.submit(expected, SamplingParams(max_tokens=4000)) for _ in range(3)]
    await asyncio.to_thread(scripted.wait_for, lambda: scripted.waits > 20)
    assert len(event_threads()) == 1
    engine.deliver_on(here())
    assert not event_threads()
    running.append(engine.submit(expected, SamplingParams(max_tokens=4000)))
    for generation in running:
        chunks = [chunk async for chunk in generation]
        assert [chunk.position for chunk in chunks] == list(range(196, 4196, 2))
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == (expected * 21)[:4000]
    taken_by = scripted.takers
    assert taken_by == sorted(taken_by, key=lambda name: name != "draftwerk-events"), "the thread took events later"


async def test_another_loop_takes_over(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(here())
    generation = engine.submit([101], SamplingParams(max_tokens=100_000))
    await anext(generation)
    finished: list[str] = []

    async def elsewhere() -> None:
        engine.deliver_on(here())
        engine.deliver_on(here())  # again: nothing changes
        finished.append((await engine.agenerate([102], SamplingParams(max_tokens=50))).text)

    await asyncio.to_thread(asyncio.run, elsewhere())
    assert finished == ["b" * 50]
    position = 3
    generation.cancel()
    assert not here().remove_reader(scripted.event_fd()), "two loops take events"
    assert await asyncio.to_thread(engine.generate, "x", SamplingParams(max_tokens=1))  # by a thread again
    async for chunk in generation:
        assert chunk.position == position
        position += len(chunk.token_ids)
    assert (await generation.aresult()).finish_reason == "cancelled"


def test_without_its_loop_the_engine_goes_on_in_a_thread(engine: Engine) -> None:
    params = SamplingParams(max_tokens=5)

    async def serve() -> str:
        engine.deliver_on(here())
        return (await engine.agenerate([101], params)).text

    for _ in range(2):
        assert asyncio.run(serve()) == "aaaaa"
        assert engine.generate([102], params).text == "bbbbb"


async def test_it_has_to_be_called_on_the_loop(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="on the loop"):
        engine.deliver_on(asyncio.new_event_loop())
    with pytest.raises(RuntimeError, match="no running event loop"):
        await asyncio.to_thread(engine.deliver_on, here())
    engine.close()
    with pytest.raises(EngineClosed):
        engine.deliver_on(here())


@pytest.mark.parametrize("from_another_thread", [False, True])
async def test_closing_wakes_what_waits(engine: Engine, scripted: ScriptedEngine, from_another_thread: bool) -> None:
    engine.deliver_on(here())
    scripted.gate.clear()
    stream, whole = engine.submit("a"), engine.submit("b")
    tasks = [asyncio.ensure_future(text_of(stream)), asyncio.ensure_future(whole.aresult())]
    await asyncio.sleep(0)
    if from_another_thread:
        await asyncio.to_thread(engine.close)
    else:
        engine.close()
    for task in tasks:
        with pytest.raises(EngineClosed):
            await asyncio.wait_for(task, TIMEOUT)
    assert stream.done
    taken = scripted.waits
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert scripted.waits == taken, "the loop goes on looking at a closed engine"


async def test_what_was_done_before_closing_can_be_read(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(here())
    short, long = engine.submit("a", SamplingParams(max_tokens=2)), engine.submit("a", SamplingParams(max_tokens=99))
    engine.close()
    assert (await short.aresult()).finish_reason == "length"
    assert (await anext(long)).text == "a"
    with pytest.raises(EngineClosed):
        await anext(long)
    with pytest.raises(EngineClosed):
        await long.aresult()


async def test_a_dropped_engine_leaves_the_loop(checkpoint: FakeCheckpoint) -> None:
    engine = Engine("fake")
    engine.deliver_on(here())
    scripted, gone = ScriptedEngine.instances[-1], weakref.ref(engine)
    await engine.agenerate("a", SamplingParams(max_tokens=3))
    del engine
    gc.collect()
    assert gone() is None
    assert scripted.closed
    await asyncio.sleep(0)
    assert not here().remove_reader(scripted.event_fd())


async def test_cancelling_a_task_cancels_its_request(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(here())
    scripted.gate.clear()
    tasks = [asyncio.ensure_future(engine.agenerate("a")), asyncio.ensure_future(anext(engine.astream("b")))]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert scripted.cancelled == [1, 2]


@pytest.mark.parametrize("delivery", ["thread", "loop", "thread, then loop"])
def test_a_forgotten_engine_ends_with_the_interpreter(delivery: str) -> None:
    script = f"""
        import asyncio, atexit, sys
        import fake_core
        sys.modules["draftwerk._core"] = fake_core
        atexit.register(lambda: print("closed:", fake_core.Engine.instances[0].closed))
        import draftwerk.weights
        from fake_checkpoint import FakeCheckpoint
        from draftwerk import Engine, SamplingParams
        draftwerk.weights.open_checkpoint = lambda *_, **__: FakeCheckpoint()
        engine = Engine("fake")
        endless = SamplingParams(max_tokens=10**9)

        async def main():
            engine.deliver_on(asyncio.get_running_loop())
            engine.submit("a", endless)
            print((await engine.agenerate("a", SamplingParams(max_tokens=3))).text)

        if "thread" in {delivery!r}:
            engine.submit("a", endless)
        if "loop" in {delivery!r}:
            asyncio.run(main())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parent,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "closed: True"


# --- on the native engine --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not NATIVE_MODULE_BUILT, reason="the native module is not built")
@pytest.mark.parametrize("on_loop", [True, False])
async def test_the_native_engine(on_loop: bool, tmp_path: Path) -> None:
    params = [SamplingParams(max_tokens=n, temperature=1.0, seed=n, ignore_eos=True) for n in range(1, 40, 3)]
    endless = SamplingParams(max_tokens=100, ignore_eos=True)
    with Engine(tiny.TinyGguf().write(tmp_path / "tiny.gguf"), threads=1, max_sequences=1) as engine:
        expected = engine.generate([[2, 30]] * len(params), params)
        if on_loop:
            engine.deliver_on(here())
        generations = [engine.submit([2, 30], its) for its in params]
        texts = await asyncio.wait_for(asyncio.gather(*map(text_of, generations)), 60)
        assert texts == [completion.text for completion in expected]
        queued = [engine.submit([2, 31], endless) for _ in range(200)]
        await anext(queued[0])
    with pytest.raises(EngineClosed):
        await queued[-1].aresult()
