"""The promise across turns: what a session generates is what one-shot generation gives for the same tokens.

With the default model and the lookup drafter, greedily and sampled, over forks, interruptions and injections. And the
other half of a session: a turn computes only what is new.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from conformance import served
from conformance.sessions import Actions, token_prompt, tokens_of
from draftwerk import Engine, SamplingParams
from draftwerk_client.v1 import output_pb2, parameters_pb2, session_pb2

Action = session_pb2.SessionRequest

KINDS: dict[str, tuple[SamplingParams, parameters_pb2.SamplingParameters]] = {
    "greedy": (SamplingParams(), parameters_pb2.SamplingParameters()),
    "sampled": (
        SamplingParams(temperature=1.0, top_k=64, seed=9),
        parameters_pb2.SamplingParameters(temperature=1.0, top_k=64, seed=9),
    ),
}
# The second and third turn repeat what was said, so that the drafter has something to find.
TURNS = [
    "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return",
    "\n\ndef area(width, height):\n    return width * height\n\ndef perimeter(width, height):\n    return",
    "\n\nThe harbour lay quiet in the early morning. A few boats had already left, and on the quay",
]


@pytest.fixture(scope="module")
def real_server(real_model: str) -> Iterator[served.Served]:
    # Without a prefix cache: what a turn finds is what the turn before has left.
    with served.serve(real_model, "--drafter", "lookup", "--kv-memory", "128MiB", "--no-prefix-cache") as running:
        yield running


@pytest.fixture(scope="module")
def real_reference(real_model: str) -> Iterator[Engine]:
    with Engine(real_model, drafter="none", kv_memory="128MiB", prefix_cache=False) as engine:
        yield engine


class Told:
    """A session, and what one-shot generation says about it."""

    def __init__(self, actions: Actions, reference: Engine, kind: str) -> None:
        self.params, sampling = KINDS[kind]
        self.reference = reference
        self.actions = actions
        actions.open(sampling=sampling)

    def expected(self, prompt: list[int], count: int) -> list[int]:
        if count == 0:
            return []
        params = replace(self.params, max_tokens=count, ignore_eos=True)
        return list(self.reference.generate(prompt, params).token_ids)

    def append(self, text: str, branch: int = 0) -> list[int]:
        content = parameters_pb2.Prompt(text=text)
        return list(self.actions.answer(Action.Append(content=content), branch).token_ids)

    def turn(self, branch: int = 0, count: int = 24) -> tuple[list[int], Any]:
        stop = parameters_pb2.StopConditions(max_tokens=count, ignore_end_tokens=True)
        chunks = self.actions.generate(branch, stop=stop)
        return tokens_of(chunks), chunks[-1].statistics


@pytest.fixture(params=KINDS)
def told(request: pytest.FixtureRequest, real_server: served.Served, real_reference: Engine) -> Iterator[Told]:
    with Actions(real_server) as actions:
        yield Told(actions, real_reference, request.param)


def test_turns(told: Told) -> None:
    sequence: list[int] = []
    drafted = 0
    for number, text in enumerate(TURNS):
        new = told.append(text)
        assert new == told.reference.tokenize(text, add_bos=number == 0)
        prompt = [*sequence, *new]
        generated, statistics = told.turn()
        assert generated == told.expected(prompt, len(generated))
        assert statistics.prompt_tokens == len(prompt)
        # The keys and values of the last token of a turn were never needed before the next one.
        assert statistics.cached_tokens == (len(sequence) - 1 if sequence else 0)
        drafted += statistics.drafts.accepted
        sequence = prompt + generated
    assert drafted > 0
    told.actions.end()


def test_a_turn_without_new_tokens_goes_on(told: Told) -> None:
    """Two generations of 10 tokens, and one of 20."""
    prompt = told.append(TURNS[0])
    first, _ = told.turn(count=10)
    second, statistics = told.turn(count=10)
    assert first + second == told.expected(prompt, 20)
    assert statistics.cached_tokens == len(prompt) + 10 - 1
    told.actions.end()


def test_forks(told: Told) -> None:
    """Of a whole branch, of its beginning, and of a branch that generates."""
    prompt = told.append(TURNS[0])
    sequence = prompt + told.turn()[0]
    whole = told.actions.answer(Action.Fork()).branch
    beginning = told.actions.answer(Action.Fork(position=len(prompt) - 3)).branch
    for branch, start in ((whole, sequence), (beginning, prompt[:-3]), (0, sequence)):
        new = told.append(TURNS[1], branch)
        generated, _ = told.turn(branch)
        assert generated == told.expected([*start, *new], len(generated))

    start = [*sequence, *new, *generated]
    stop = parameters_pb2.StopConditions(max_tokens=60, ignore_end_tokens=True)
    running = told.actions.chunks(told.actions.start(stop=stop))
    seen = tokens_of([next(running)])
    forked = told.actions.answer(Action.Fork())
    copied = forked.length - len(start)
    assert copied >= len(seen)
    copy, _ = told.turn(forked.branch)
    seen += tokens_of(running)
    assert seen == told.expected(start, 60)
    assert copy == told.expected(start + seen[:copied], len(copy))
    told.actions.end()


def test_interrupt(told: Told) -> None:
    """What was sent is kept, nothing else, and the next turn computes no more than it has to."""
    prompt = told.append(TURNS[0])
    stop = parameters_pb2.StopConditions(max_tokens=4000, ignore_end_tokens=True)
    running = told.actions.chunks(told.actions.start(stop=stop))
    kept = tokens_of([next(running), next(running)])
    interrupt = told.actions.send(Action.Interrupt())
    rest = list(running)
    kept += tokens_of(rest)
    assert rest[-1].finish_reason == output_pb2.FINISH_REASON_CANCELLED
    assert next(told.actions.responses(interrupt)).interrupted.length == len(prompt) + len(kept)
    assert kept == told.expected(prompt, len(kept))
    new = told.append(TURNS[1])
    generated, statistics = told.turn()
    assert generated == told.expected([*prompt, *kept, *new], len(generated))
    assert statistics.cached_tokens == len(prompt) + len(kept) - 1
    told.actions.end()


def test_inject(told: Told) -> None:
    prompt = told.append(TURNS[0])
    count = 60
    stop = parameters_pb2.StopConditions(max_tokens=count, ignore_end_tokens=True)
    generation = told.actions.start(stop=stop)
    running = told.actions.chunks(generation)
    chunks = [next(running)]
    inject = told.actions.send(Action.Inject(content=parameters_pb2.Prompt(text=" # 3 * 4 makes 12\n")))
    chunks += list(running)
    injected = next(told.actions.responses(inject)).injected
    assert list(injected.token_ids) == told.reference.tokenize(" # 3 * 4 makes 12\n", add_bos=False)
    before = tokens_of(chunk for chunk in chunks if chunk.position < injected.position)
    after = tokens_of(chunk for chunk in chunks if chunk.position >= injected.position)
    assert len(prompt) + len(before) == injected.position
    assert len(before) + len(after) == count
    assert before == told.expected(prompt, len(before))
    assert after == told.expected([*prompt, *before, *injected.token_ids], len(after))
    assert chunks[-1].finish_reason == output_pb2.FINISH_REASON_LENGTH
    # The branch has all of it.
    sequence = [*prompt, *before, *injected.token_ids, *after]
    new = told.append(TURNS[1])
    generated, _ = told.turn()
    assert generated == told.expected([*sequence, *new], len(generated))
    told.actions.end()


def test_token_prompt_is_taken_as_it_is(told: Told) -> None:
    ids = told.reference.tokenize(TURNS[2])
    told.actions.answer(Action.Append(content=token_prompt(ids[:5])))
    told.actions.answer(Action.Append(content=token_prompt(ids[5:])))
    generated, _ = told.turn()
    assert generated == told.expected(ids, len(generated))
    told.actions.end()
