"""Random sessions against a plain model of them: a branch is a list of tokens, and one-shot generation continues it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from session_client import TIMEOUT, Request, SessionClient, append, inject

from draftwerk import Completion, Engine, SamplingParams
from draftwerk.server.server import Server
from draftwerk.server.settings import Settings
from draftwerk_client.v1 import output_pb2, parameters_pb2
from draftwerk_client.v1 import session_pb2 as pb

MAX_BRANCHES, MAX_LENGTH = 5, 500
FINISH_REASONS = {"stop": output_pb2.FINISH_REASON_STOP, "length": output_pb2.FINISH_REASON_LENGTH}
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION.value[0]

TOKENS = st.lists(st.integers(6, 250), max_size=20)
TEXT = st.text("abcde ", max_size=12)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10) | st.integers(100, 300),
    min_tokens=st.just(0) | st.integers(0, 1),
    temperature=st.sampled_from([0.0, 0.0, 1.0, 2.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.25]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    seed=st.integers(0, 3),
    stop_token_ids=st.just(()) | st.lists(st.integers(6, 250), max_size=20).map(tuple),
    ignore_eos=st.booleans(),
    drafting=st.booleans(),
)


class World:
    """A server in a loop of its own that runs while somebody waits, and an engine that knows no tricks."""

    def __init__(self, model: Path, **engine_options: Any) -> None:
        self.engine = Engine(model, threads=1, **engine_options)
        self.oracle = Engine(model, threads=1, drafter="none", prefix_cache=False)
        self._known: dict[tuple[tuple[int, ...], str], Completion] = {}
        self._loop = asyncio.new_event_loop()
        # Sequences pause and go on all the time with so few tokens unread.
        self.server = Server(Settings(listen="127.0.0.1:0", metrics_listen="", max_unread_tokens=4), self.engine)
        self.wait(self.server.start())
        self.channel = self.wait(self._connect())

    def wait(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(awaitable, TIMEOUT))

    def continuation(self, tokens: list[int], params: SamplingParams) -> Completion:
        """What one-shot generation makes of these tokens."""
        key = (tuple(tokens), repr(replace(params, drafting=False)))
        if key not in self._known:
            self._known[key] = self.oracle.generate(tokens, params)
        return self._known[key]

    def wait_until_free(self) -> None:
        """Waits until the engine holds nothing but cached prefixes."""

        async def poll() -> None:
            while True:
                stats = self.engine.stats()
                kv = stats["kv"]
                if stats["conversations"] == stats["running"] == stats["waiting"] == stats["paused"] == 0:
                    assert (kv["parked_bytes"], kv["used_bytes"] - kv["cached_bytes"]) == (0, 0)
                    return
                await asyncio.sleep(0.005)

        self.wait(poll())

    def close(self) -> None:
        self.wait(self.channel.close())
        self.wait(self.server.stop(grace=0))
        self._loop.close()
        self.engine.close()
        self.oracle.close()

    async def _connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.server.address)

    async def open_session(self) -> SessionClient:
        client = SessionClient(self.channel)
        await client.open()
        return client


@dataclass
class Running:
    """A generation as it should be."""

    request_number: int
    params: SamplingParams
    prompt_tokens: int
    warm_tokens: int | None
    expected: Completion
    """Of the current part: from the start, or from the last injection."""
    received: int = 0
    """Tokens of the current part."""
    generated: int = 0
    may_be_cancelled: bool = False


@dataclass
class ModelBranch:
    tokens: list[int] = field(default_factory=list)
    running: Running | None = None
    warm_tokens: int | None = None
    """Tokens whose keys and values the last generation must have left."""


class SessionMachine(RuleBasedStateMachine):
    """Acts at random, and holds every message against the model.

    How far a generation is when the next action arrives is up to chance. So nothing that is drawn may depend on it.
    """

    def __init__(self, world: World, *, checks_cache: bool) -> None:
        super().__init__()
        self.world = world
        self.checks_cache = checks_cache
        self.client = world.wait(world.open_session())
        self.branches = {0: ModelBranch()}
        self.closed: list[int] = []

    # --- actions -----------------------------------------------------------------------------------------------

    @initialize(data=st.data(), content=TOKENS)
    def begin(self, data: st.DataObject, content: list[int]) -> None:
        self.append(data, content)

    @rule(data=st.data(), content=TOKENS | TEXT)
    def append(self, data: st.DataObject, content: list[int] | str) -> None:
        number, branch = self._draw(data)
        if len(branch.tokens) > MAX_LENGTH:
            return
        was_empty = not branch.tokens
        response = self._answer(number, append=append(content))
        if self._refused_because(branch.running is not None, response):
            return
        added = self.world.oracle.tokenize(content, add_bos=was_empty) if isinstance(content, str) else content
        assert list(response.appended.token_ids) == added
        branch.tokens += added
        assert response.appended.length == len(branch.tokens)

    @rule(data=st.data(), params=PARAMS)
    def generate(self, data: st.DataObject, params: SamplingParams) -> None:
        number, branch = self._draw(data)
        self._drain(branch)
        if branch.tokens:
            self._start(number, branch, params)
        else:
            assert self._answer(number, generate=generate_action(params)).error.code == FAILED_PRECONDITION

    @rule(params=PARAMS)
    def generate_everywhere(self, params: SamplingParams) -> None:
        for branch in self.branches.values():
            self._drain(branch)
            if 0 < len(branch.tokens) <= MAX_LENGTH:
                self.world.continuation(branch.tokens, params)  # known before: then all run at the same time
        for number, branch in self.branches.items():
            self._start(number, branch, params)

    @rule(data=st.data(), params=PARAMS)
    def generate_twice(self, data: st.DataObject, params: SamplingParams) -> None:
        number, branch = self._draw(data)
        self._start(number, branch, params)
        if branch.running is not None:
            response = self._answer(number, append=Request.Append(content={"token_ids": {}}))
            assert branch.running is None or response.error.code == FAILED_PRECONDITION

    @rule(data=st.data(), params=PARAMS, messages=st.integers(0, 4))
    def interrupt(self, data: st.DataObject, params: SamplingParams, messages: int) -> None:
        number, branch = self._draw(data)
        self._start(number, branch, params)
        self._read(branch, messages)
        if branch.running is not None:
            branch.running.may_be_cancelled = True
        response = self._answer(number, interrupt=Request.Interrupt())
        assert branch.running is None
        if not self._refused_because(True, response):  # it may have been over before
            assert response.interrupted.length == len(branch.tokens)

    @rule(data=st.data(), params=PARAMS, messages=st.integers(0, 4), content=TOKENS | TEXT)
    def inject(self, data: st.DataObject, params: SamplingParams, messages: int, content: list[int] | str) -> None:
        number, branch = self._draw(data)
        self._start(number, branch, params)
        self._read(branch, messages)
        if len(branch.tokens) > MAX_LENGTH:
            return
        response = self._answer(number, inject=inject(content))
        if self._refused_because(branch.running is None, response):
            return
        running = branch.running
        assert running is not None
        added = self.world.oracle.tokenize(content, add_bos=False) if isinstance(content, str) else content
        assert (list(response.injected.token_ids), response.injected.position) == (added, len(branch.tokens))
        branch.tokens += added
        left = replace(
            running.params,
            max_tokens=running.params.max_tokens - running.generated,
            min_tokens=max(0, running.params.min_tokens - running.generated),
        )
        running.expected, running.received = self.world.continuation(branch.tokens, left), 0
        if running.generated == 0:
            running.warm_tokens = None  # it may have been injected before its first step, which finds what is warm

    @precondition(lambda self: len(self.branches) < MAX_BRANCHES)
    @rule(data=st.data(), share=st.none() | st.floats(0, 1))
    def fork(self, data: st.DataObject, share: float | None) -> None:
        number, branch = self._draw(data)
        position = None if share is None else round(share * len(branch.tokens))
        response = self._answer(number, fork=Request.Fork(position=position))
        length = len(branch.tokens) if position is None else position
        assert response.forked.length == length
        assert response.forked.branch not in [*self.branches, *self.closed]
        self.branches[response.forked.branch] = ModelBranch(branch.tokens[:length])

    @precondition(lambda self: len(self.branches) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        number, branch = self._draw(data)
        if branch.running is not None:
            branch.running.may_be_cancelled = True
        assert self._answer(number, close=Request.Close()).HasField("closed")
        assert branch.running is None
        del self.branches[number]
        self.closed.append(number)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def act_on_a_closed_branch(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.closed))
        assert self._answer(number, fork=Request.Fork()).error.code == FAILED_PRECONDITION

    # --- reading -----------------------------------------------------------------------------------------------

    @rule(data=st.data(), messages=st.integers(1, 10))
    def read(self, data: st.DataObject, messages: int) -> None:
        self._read(self._draw(data)[1], messages)

    @rule(data=st.data())
    def read_to_the_end(self, data: st.DataObject) -> None:
        self._drain(self._draw(data)[1])

    @invariant()
    def nothing_has_gone_wrong(self) -> None:
        assert not self.client.call.done()

    def teardown(self) -> None:
        try:
            for branch in self.branches.values():
                self._drain(branch)
            assert self.world.wait(self.client.end()) is grpc.StatusCode.OK
            self.world.wait_until_free()
        finally:
            self.client.call.cancel()

    # --- the model ---------------------------------------------------------------------------------------------

    def _draw(self, data: st.DataObject) -> tuple[int, ModelBranch]:
        number = data.draw(st.sampled_from(sorted(self.branches)))
        return number, self.branches[number]

    def _answer(self, branch: int, **action: Any) -> pb.SessionResponse:
        """Sends an action; takes in what is generated until its answer comes."""
        number = self.world.wait(self.client.act(branch, **action))
        while (response := self.world.wait(self.client.next())).request_number != number:
            self._take(response)
        assert response.branch == branch
        return response

    def _refused_because(self, may_be: bool, response: pb.SessionResponse) -> bool:
        if response.HasField("error"):
            assert may_be, response
            assert response.error.code == FAILED_PRECONDITION, response
        return response.HasField("error")

    def _start(self, number: int, branch: ModelBranch, params: SamplingParams) -> None:
        """Lets the branch generate, unless it does so already or has no tokens, or too many of them."""
        if branch.running is not None or not 0 < len(branch.tokens) <= MAX_LENGTH:
            return
        expected = self.world.continuation(branch.tokens, params)
        number = self.world.wait(self.client.act(number, generate=generate_action(params)))
        branch.running = Running(number, params, len(branch.tokens), branch.warm_tokens, expected)

    def _read(self, branch: ModelBranch, messages: int) -> None:
        while messages > 0 and branch.running is not None:
            self._take(self.world.wait(self.client.next()))
            messages -= 1

    def _drain(self, branch: ModelBranch) -> None:
        while branch.running is not None:
            self._take(self.world.wait(self.client.next()))

    def _take(self, response: pb.SessionResponse) -> None:
        """Holds a message of a generation against what must come."""
        branch = self.branches[response.branch]
        running, message = branch.running, response.generated
        assert running is not None and response.HasField("generated"), response
        assert response.request_number == running.request_number
        count = len(message.token_ids)
        assert message.position == len(branch.tokens)
        assert tuple(message.token_ids) == running.expected.token_ids[running.received :][:count]
        branch.tokens += message.token_ids
        running.received += count
        running.generated += count
        if not message.finish_reason:
            return
        if message.finish_reason == output_pb2.FINISH_REASON_CANCELLED:
            assert running.may_be_cancelled
        else:
            assert message.finish_reason == FINISH_REASONS[running.expected.finish_reason]
            assert running.received == len(running.expected.token_ids)
        statistics = message.statistics
        assert (statistics.prompt_tokens, statistics.generated_tokens) == (running.prompt_tokens, running.generated)
        if self.checks_cache and running.warm_tokens is not None and running.generated > 0:
            # The last token's keys and values are there only if it was a draft that was accepted.
            assert statistics.cached_tokens in (running.warm_tokens - 1, running.warm_tokens)
        branch.warm_tokens = len(branch.tokens) if running.received > 0 else None
        branch.running = None


def generate_action(params: SamplingParams) -> pb.SessionRequest.Generate:
    return Request.Generate(
        sampling=parameters_pb2.SamplingParameters(
            temperature=params.temperature,
            top_k=params.top_k,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            seed=params.seed,
        ),
        stop=parameters_pb2.StopConditions(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            token_ids=params.stop_token_ids,
            ignore_end_tokens=params.ignore_eos,
        ),
        drafting=parameters_pb2.DraftingOptions(enabled=params.drafting),
    )


@pytest.fixture(params=["ample memory", "scarce memory"])
def machine(request: pytest.FixtureRequest, tiny_model_path: Path) -> Iterator[Any]:
    """Makes session machines on one server."""
    ample = request.param == "ample memory"
    world = World(tiny_model_path, kv_memory="64MiB" if ample else "512KiB", max_step_rows=64, max_sequences=16)
    yield lambda: SessionMachine(world, checks_cache=ample)
    world.close()


def test_random_sessions_are_what_one_shot_generation_makes_of_their_tokens(machine: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            deadline=None,
            phases=[Phase.generate],  # timing differs from run to run: a failure does not shrink
            suppress_health_check=list(HealthCheck),
        ),
    )
