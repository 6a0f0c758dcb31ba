"""Sessions with both clients: actions and answers, several branches, ends of every kind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from scripted_server import TIMEOUT, ScriptedServer, is_in, obedient_session, piece, status

import draftwerk_client.session
from draftwerk_client import Cancelled, Client, DeadlineExceeded, InvalidRequest, OutOfOrder, ServerError, Unavailable
from draftwerk_client.errors import CallContext
from draftwerk_client.session_state import MAX_UNREAD_MESSAGES, Mailbox, SessionState
from draftwerk_client.v1 import session_pb2 as pb

Answer = Callable[[pb.SessionResponse], None]

MORE = 5 * MAX_UNREAD_MESSAGES


def actions(server: ScriptedServer, count: int) -> list[pb.SessionRequest]:
    """The next actions that reach the server."""
    return [server.requests.get(timeout=TIMEOUT) for _ in range(count)]


def names(requests: list[pb.SessionRequest]) -> list[str]:
    return [f"{request.branch} {request.WhichOneof('action')}" for request in requests]


def test_a_conversation(client: Any, server: ScriptedServer) -> None:
    with client.session() as session:
        assert session.length == 0
        appended = session.append([5, 6, 7])
        assert (appended.token_ids, appended.length) == ((5, 6, 7), 3)
        completion = session.generate(max_tokens=3)
        assert completion.text == "0 1 end"
        assert completion.token_ids == (1000, 1001, 1002)
        assert session.length == 6
        assert session.append("ab").token_ids == (100, 101)
        assert session.length == 8
    sent = actions(server, 5)
    assert names(sent) == ["0 open", "0 append", "0 generate", "0 append", "0 close"]
    assert [request.request_number for request in sent] == [1, 2, 3, 4, 5]
    assert server.ended.get(timeout=TIMEOUT) == session.request_id


def test_the_call_ends_well(client: Any, server: ScriptedServer) -> None:
    ended = threading.Event()

    def script(requests: Iterator[pb.SessionRequest], answer: Answer) -> None:
        obedient_session(requests, answer)  # returns when the client has ended its side
        ended.set()

    server.session = script
    with client.session():
        assert not ended.is_set()
    assert ended.is_set()


def test_streams_of_a_session(client: Any) -> None:
    with client.session() as session:
        session.append([1])
        with session.stream(max_tokens=2) as stream:
            assert [(chunk.text, chunk.position) for chunk in stream] == [("0 ", 1), ("end", 2)]
            assert stream.completion().finish_reason == "length"
            assert stream.completion().request_id == stream.request_id == f"{session.request_id}/1"


def test_interrupt(client: Any) -> None:
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        assert next(stream).text == "0 "
        session.interrupt()
        assert session.length == 3
        completion = stream.completion()
        assert (completion.text, completion.finish_reason) == ("0 1 ", "cancelled")
        assert session.generate(max_tokens=1).text == "end"


def test_inject(client: Any, server: ScriptedServer) -> None:
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        next(stream)
        injected = session.inject([7, 8])
        assert (injected.token_ids, injected.position) == ((7, 8), 3)
        assert [next(stream).text for _ in range(2)] == ["1 ", "more"]
        assert session.length == 6
        session.interrupt()


def test_forks_are_branches_of_their_own(client: Any, server: ScriptedServer) -> None:
    with client.session() as session:
        session.append([1, 2, 3])
        with session.fork(2) as fork, session.fork() as whole:
            assert (fork.length, whole.length) == (2, 3)
            fork.append([9])
            assert (session.length, fork.length) == (3, 3)
            assert fork.generate(max_tokens=2).token_ids == (1000, 1001)
            streams = [session.stream(max_tokens=2), whole.stream(max_tokens=3)]
            assert [stream.completion().text for stream in reversed(streams)] == ["0 1 end", "0 end"]
    assert names(actions(server, 11))[-3:] == ["2 close", "1 close", "0 close"]


def test_branches_are_read_by_several_threads_at_once(client: Any) -> None:
    texts: dict[int, str] = {}

    def run(branch: Any, tokens: int) -> None:
        texts[tokens] = branch.generate(max_tokens=tokens).text

    with client.session() as session:
        session.append([1])
        threads = [threading.Thread(target=run, args=(session.fork(), 50 + i)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    assert texts == {n: "".join(f"{i} " for i in range(n - 1)) + "end" for n in range(50, 56)}


def test_forks_outlive_the_branch_they_are_of(client: Any, server: ScriptedServer) -> None:
    with client.session() as session:
        session.append([1])
        fork = session.fork()
    with pytest.raises(OutOfOrder, match="this session is closed"):
        session.append([2])
    assert fork.append([2]).length == 2
    fork.close()
    assert server.ended.get(timeout=TIMEOUT) == session.request_id


# --- parameters ------------------------------------------------------------------------------------------------------


def test_defaults_go_with_open_and_overrides_replace_whole_parts(client: Any, server: ScriptedServer) -> None:
    defaults = {"temperature": 0.5, "top_k": 4, "logprobs": 2, "stop": ["x"], "salt": "tenant", "model": "tiny"}
    with client.session(**defaults) as session:
        session.stream(temperature=1.0, logprobs=None, max_tokens=1).completion()
        session.stream(max_tokens=1).completion()
    opening, first, second, _ = actions(server, 4)
    assert opening.open == pb.SessionRequest.Open(
        sampling={"temperature": 0.5, "top_k": 4},
        output={"logprobs": 2},
        stop={"strings": ["x"]},
        cache_salt="tenant",
        model="tiny",
    )
    assert first.generate == pb.SessionRequest.Generate(
        sampling={"temperature": 1.0, "top_k": 4}, output={}, stop={"strings": ["x"], "max_tokens": 1}
    )
    assert first.generate.HasField("output")
    assert second.generate == pb.SessionRequest.Generate(stop={"strings": ["x"], "max_tokens": 1})


def test_what_holds_for_a_session_is_not_for_one_generation(client: Any) -> None:
    with client.session() as session:
        with pytest.raises(TypeError, match=r"salt holds for a whole session: give it to session\(\)"):
            session.generate(salt="x")
        with pytest.raises(TypeError, match="did you mean temperature"):
            session.generate(temprature=1.0)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_session_usable(client: Any) -> None:
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        with pytest.raises(OutOfOrder, match="interrupt it first"):
            session.generate(max_tokens=1)
        session.interrupt()
        assert stream.completion().finish_reason == "cancelled"
        assert session.generate(max_tokens=1).text == "end"
        with pytest.raises(InvalidRequest):
            session.append([1.5])
        assert session.append([1]).length == 5


def test_a_failed_call_fails_everything_that_waits(client: Any, server: ScriptedServer) -> None:
    fail = threading.Event()

    def script(requests: Iterator[pb.SessionRequest], answer: Answer) -> None:
        answer(pb.SessionResponse(request_number=next(requests).request_number, opened={}))
        next(requests), next(requests)
        fail.wait(TIMEOUT)
        answer(pb.SessionResponse(error={"message": "the server has had enough"}))

    server.session = script
    session = client.session().__enter__()
    errors: list[Exception] = []

    def wait(action: Callable[[], object]) -> None:
        with pytest.raises(ServerError) as caught:
            action()
        errors.append(caught.value)

    threads = [
        threading.Thread(target=wait, args=(action,)) for action in (lambda: session.append([1]), session.generate)
    ]
    for thread in threads:
        thread.start()
    actions(server, 3)
    fail.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert [error.args[0] for error in errors] == ["INTERNAL: the server has had enough"] * 2
    with pytest.raises(ServerError):
        session.append([1])
    session.close()


def test_a_session_that_cannot_be_opened(client: Any, server: ScriptedServer) -> None:
    def script(requests: Iterator[pb.SessionRequest], answer: Answer) -> None:
        number = next(requests).request_number
        answer(pb.SessionResponse(request_number=number, error=status(grpc.StatusCode.NOT_FOUND, "no such model")))
        for _ in requests:
            pass

    server.session = script
    with pytest.raises(Exception, match="no such model"):
        client.session(model="other").__enter__()
    server.ended.get(timeout=TIMEOUT)


def test_the_server_goes_away(client: Any, server: ScriptedServer) -> None:
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        next(stream)
        server.stop()
        with pytest.raises(Unavailable):
            stream.completion()
        with pytest.raises(Unavailable):
            session.fork()


# --- ends ------------------------------------------------------------------------------------------------------------


def test_an_action_that_is_not_answered_in_time(client: Any, server: ScriptedServer) -> None:
    silent = threading.Event()

    def script(requests: Iterator[pb.SessionRequest], answer: Answer) -> None:
        obedient_session(requests, lambda response: silent.is_set() or answer(response))

    server.session = script
    with client.session() as session:
        silent.set()
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
            session.append([1], timeout=0.2)
        silent.clear()
        assert session.append([1]).length == 2


def test_a_session_may_take_as_long_as_it_likes(client: Any, server: ScriptedServer) -> None:
    with client.session(timeout=1e12) as session:
        session.append([1])
        assert session.generate(max_tokens=1).text == "end"


def test_a_generation_that_takes_too_long_is_interrupted(client: Any, server: ScriptedServer) -> None:
    with client.session(timeout=2.0) as session:
        session.append([1])
        with pytest.raises(DeadlineExceeded, match="of 2 s"):
            session.generate()
        assert names(actions(server, 4))[-1] == "0 interrupt"
        assert session.generate(max_tokens=1).text == "end"
        assert session.length == 4


@pytest.mark.parametrize("how", ["leave", "drop"])
def test_a_stream_that_is_left_is_interrupted(client: Any, server: ScriptedServer, how: str) -> None:
    with client.session() as session:
        session.append([1])
        if how == "leave":
            with session.stream() as stream:
                next(stream)
            with pytest.raises(Cancelled):
                next(stream)
        else:
            next(session.stream())
            gc.collect()
        assert names(actions(server, 4))[-1] == "0 interrupt"
        assert session.append([2]).length == 4


@pytest.mark.parametrize("another_runs", [True, False])
def test_leaving_a_finished_stream_interrupts_nothing(client: Any, server: ScriptedServer, another_runs: bool) -> None:
    with client.session() as session:
        session.append([1])
        stream = session.stream(max_tokens=1)
        session.append([2])  # it has finished, and nobody has read that
        if another_runs:
            running = session.stream()
            next(running)
        with stream:
            pass
    assert names(actions(server, 5))[-1] == ("0 generate" if another_runs else "0 close")


def test_an_interrupt_never_hits_a_generation_that_was_started_later() -> None:
    state = SessionState(CallContext("s", "127.0.0.1:50051", None))
    first, second = (Mailbox(pb.SessionRequest(branch=1)) for _ in range(2))
    for generation in (first, second):
        state.started(generation)
    assert state.interrupt_of(first) is None  # the server takes a second one only after the first: it has ended
    assert state.interrupt_of(second) is not None
    second.complete = True  # it was refused
    assert state.interrupt_of(first) is not None


def test_cancel_by_id(client: Any, server: ScriptedServer) -> None:
    with client.session(request_id="s") as session:
        session.append([1])
        stream = session.stream()
        next(stream)
        assert client.cancel("s/1")
        assert stream.completion().finish_reason == "cancelled"
        assert not client.cancel("s/1")
        session.append([1])
        assert client.cancel("s")
        with pytest.raises(Cancelled):
            for _ in range(100):
                session.append([1])
    assert server.ended.get(timeout=TIMEOUT) == "s"


def test_a_session_that_is_dropped_is_closed(client: Any, server: ScriptedServer) -> None:
    session = client.session()
    session.append([1])
    del session
    gc.collect()
    assert names(actions(server, 3))[-1] == "0 close"
    server.ended.get(timeout=TIMEOUT)


def test_closing_twice_and_after_the_client(client: Any) -> None:
    session = client.session().__enter__()
    session.close()
    session.close()
    other = client.session().__enter__()
    client.close()
    with pytest.raises(Cancelled):
        other.append([1])
    other.close()


def test_ctrl_c_leaves_the_session_usable(server: ScriptedServer) -> None:
    reader = threading.get_ident()

    def interrupt() -> None:
        actions(server, 3)
        while not is_in(reader, draftwerk_client.session):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with Client(server.address) as client, client.session() as session:
        session.append([1])
        stream = session.stream()
        interrupter = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):
            interrupter.start()
            for _ in stream:
                pass
        interrupter.join(TIMEOUT)
        assert stream.completion().text == "0 1 "
        assert session.generate(max_tokens=1).text == "end"


# --- a reader that is slow -------------------------------------------------------------------------------------------


def endless(requests: Iterator[pb.SessionRequest], answer: Answer) -> None:
    """obedient_session, whose generations send more than a client holds before they wait."""
    sent = MORE

    def more(response: pb.SessionResponse) -> None:
        answer(response)
        if response.WhichOneof("event") == "generated" and response.generated.text == "1 ":
            for _ in range(sent):
                answer(pb.SessionResponse(request_number=response.request_number, generated=piece("x" * 100, 1)))

    obedient_session(requests, more)


def unread(stream: Any) -> int:
    """Messages that the client holds for a stream of a session."""
    stream = getattr(stream, "target", stream)
    return len(stream._read.__self__._mailbox.messages)


def wait_until_held(stream: Any) -> None:
    end = time.monotonic() + TIMEOUT
    while unread(stream) < MAX_UNREAD_MESSAGES:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_nobody_reads_is_bounded_and_held_back(client: Any, server: ScriptedServer) -> None:
    server.session = endless
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        wait_until_held(stream)
        assert client.model() is not None  # other calls go on
        assert unread(stream) == MAX_UNREAD_MESSAGES
        for _ in range(3 * MAX_UNREAD_MESSAGES):
            next(stream)
        assert unread(stream) <= MAX_UNREAD_MESSAGES


def test_an_action_is_answered_although_a_stream_is_unread(client: Any, server: ScriptedServer) -> None:
    server.session = endless
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        wait_until_held(stream)
        session.interrupt(timeout=TIMEOUT)
        completion = stream.completion()
        assert completion.finish_reason == "cancelled"
        assert len(completion.token_ids) == 2 + MORE


def test_closing_with_an_unread_stream(client: Any, server: ScriptedServer) -> None:
    server.session = endless
    with client.session() as session:
        session.append([1])
        stream = session.stream()
        wait_until_held(stream)
    assert names(actions(server, 4))[-1] == "0 close"


def test_cancelling_while_a_stream_is_held(client: Any, server: ScriptedServer) -> None:
    server.session = endless
    with client.session(request_id="s") as session:
        session.append([1])
        fork = session.fork()
        held = session.stream()
        wait_until_held(held)
        behind_it = fork.stream(timeout=TIMEOUT)
        assert client.cancel("s")
        for stream in (behind_it, held):
            with pytest.raises(Cancelled):
                stream.completion()
        fork.close()
    assert server.ended.get(timeout=TIMEOUT) == "s"


def test_a_fork_that_comes_too_late_keeps_no_call_open(client: Any, server: ScriptedServer) -> None:
    late: list[pb.SessionResponse] = []

    def script(requests: Iterator[pb.SessionRequest], answer: Answer) -> None:
        def hold_forks(response: pb.SessionResponse) -> None:
            if response.HasField("forked"):
                late.append(response)
                return
            while late:
                answer(late.pop())
            answer(response)

        obedient_session(requests, hold_forks)

    server.session = script
    with client.session() as session:
        with pytest.raises(DeadlineExceeded):
            session.fork(timeout=0.1)
        session.append([1])
    assert server.ended.get(timeout=TIMEOUT) == session.request_id
