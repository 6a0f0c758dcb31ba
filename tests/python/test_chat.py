"""`draftwerk chat` over a scripted session: what the commands do, and what becomes of a conversation on failure."""

from __future__ import annotations

import io
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from draftwerk.cli.chat import answer_lines
from draftwerk.cli.chat_branches import Conversations, TurnRefused
from draftwerk.cli.draft_colours import DRAFTED, OWN, DraftColours
from draftwerk.cli.failures import CommandError
from draftwerk.cli.status_line import StatusLine
from draftwerk.cli.terminal_chat import TerminalChat
from draftwerk_client import Appended, Chat, Chunk, GenerationStats, InvalidRequest, OutOfOrder, Unavailable

END = GenerationStats(prompt_tokens=9, cached_tokens=4, generated_tokens=5, steps=2, drafted=4, accepted=3)


def chunk(text: str, position: int = 0, received_at: float = 0.0, **values: Any) -> Chunk:
    """One step: a token for each character, of which only the last was not drafted."""
    return Chunk(
        **{
            "text": text,
            "token_ids": tuple(text.encode()),
            "drafted": tuple(i < len(text) - 1 for i in range(len(text))),
            "position": position,
            "logprobs": None,
            "token_bytes": tuple(character.encode() for character in text),
            "finish_reason": None,
            "stats": None,
            "received_at": received_at,
            **values,
        }
    )


@dataclass
class Script:
    """What all branches of a session share: how they answer, and what was asked of them."""

    answer: Callable[[ScriptedSession], Iterator[Chunk]]
    asked: list[dict[str, Any]] = field(default_factory=list)
    interrupted: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    branches: int = 1
    most_branches: int = 64


class ScriptedSession:
    """One branch. Its content is text; its length is in characters."""

    def __init__(self, script: Script, content: str = "") -> None:
        self.script = script
        self.content = content
        self.appended: list[Any] = []
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.content)

    def append(self, prompt: str | Chat) -> Appended:
        """Thoughts are dropped as soon as more follows."""
        self._check()
        self.appended.append(prompt)
        said = prompt if isinstance(prompt, str) else "".join(f"<{m['role']}>{m['content']}" for m in prompt.messages)
        agreed = min((place for place in [self.content.find("<|channel>")] if place >= 0), default=len(self.content))
        self.content = re.sub(r"<\|channel>.*?<channel\|>", "", self.content, flags=re.DOTALL) + said
        return Appended(tuple(self.content[agreed:].encode()), len(self.content))

    def stream(self, **parameters: Any) -> Iterator[Chunk]:
        self._check()
        self.script.asked.append(parameters)
        for answered in self.script.answer(self):
            self.content += answered.text
            yield answered

    def interrupt(self) -> None:
        if self.script.interrupted.is_set():
            raise OutOfOrder("nothing runs", code=None)  # type: ignore[arg-type]
        self.script.interrupted.set()

    def fork(self, position: int | None = None) -> ScriptedSession:
        self._check()
        if self.script.branches == self.script.most_branches:
            raise OutOfOrder("the session has all branches that it may have", code=None)  # type: ignore[arg-type]
        self.script.branches += 1
        return ScriptedSession(self.script, self.content[:position])

    def close(self) -> None:
        self.closed = True
        self.script.branches -= 1

    def _check(self) -> None:
        assert not self.closed
        if self.script.failure is not None:
            raise self.script.failure


def short_answer(_: ScriptedSession) -> Iterator[Chunk]:
    yield chunk("yes", received_at=1.0)
    yield chunk("!", received_at=1.5, finish_reason="stop", stats=END)


def invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code=None, request_id="r1", violations=())  # type: ignore[arg-type]


def unavailable() -> Unavailable:
    return Unavailable("connection refused", code=None, request_id=None, retry_after=None)  # type: ignore[arg-type]


def opened(
    script: Script, *, has_chat_template: bool = True, system: str | None = None, **thinking: Any
) -> Conversations:
    root: Any = ScriptedSession(script)
    return Conversations(root, has_chat_template=has_chat_template, system=system, **thinking)


def parameters() -> dict[str, Any]:
    return {"max_tokens": 9, "temperature": 0.0, "seed": 0}


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Types into a chat and returns what it shows."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def type_into(keys: str, script: Script, **options: Any) -> str:
        shown = io.StringIO()
        console = Console(file=shown, width=200, force_terminal=options.pop("colours", False))
        show_drafts = options.pop("show_drafts", False)
        given = {**parameters(), **options.pop("parameters", {})}
        has_thinking = options.pop("has_thinking", False)
        conversations = opened(script, **options)
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            TerminalChat(
                console, conversations, given, "some-model", show_drafts=show_drafts, has_thinking=has_thinking
            ).run()
        return shown.getvalue()

    return type_into


# --- conversations -------------------------------------------------------------------------------------------------


def said(conversations: Conversations, text: str) -> str:
    return "".join(answered.text for answered in conversations.say(text, parameters()))


def test_the_system_message_goes_before_the_first_message_only() -> None:
    conversations = opened(Script(short_answer), system="be brief")
    assert [said(conversations, text) for text in ("a", "b")] == ["yes!", "yes!"]
    assert conversations.current.session.content == "<system>be brief<user>ayes!<user>byes!"


def test_without_a_chat_template_messages_are_lines_of_one_text() -> None:
    conversations = opened(Script(short_answer), has_chat_template=False, system="Once")
    said(conversations, "a")
    said(conversations, "b")
    assert conversations.current.session.content == "Once\nayes!\nbyes!"


def test_a_fork_goes_its_own_way() -> None:
    conversations = opened(Script(short_answer))
    said(conversations, "a")
    copy = conversations.fork()
    said(conversations, "b")
    assert [turn.text for turn in copy.turns] == ["a", "yes!"]
    assert conversations.go_to(copy.number).session.content == "<user>ayes!"
    said(conversations, "c")
    assert conversations.branches[0].session.content == "<user>ayes!<user>byes!"
    assert copy.session.content == "<user>ayes!<user>cyes!"


def test_beginning_anew_keeps_the_old_conversation() -> None:
    conversations = opened(Script(short_answer))
    said(conversations, "a")
    assert conversations.begin("other").session.length == 0
    said(conversations, "b")
    assert conversations.current.session.content == "<system>other<user>byes!"
    assert conversations.branches[0].session.content == "<user>ayes!"


def test_a_refused_turn_leaves_the_conversation_as_it_was() -> None:
    script = Script(short_answer)
    conversations = opened(script, system="be brief")
    said(conversations, "a")
    before = conversations.current.session

    def fails(_: ScriptedSession) -> Iterator[Chunk]:
        yield chunk("half")
        raise invalid("max_tokens: too many")

    script.answer = fails
    with pytest.raises(TurnRefused, match="too many"):
        said(conversations, "b")
    assert before.closed  # type: ignore[attr-defined]
    assert [turn.text for turn in conversations.current.turns] == ["a", "yes!"]
    script.answer = short_answer
    said(conversations, "c")
    assert conversations.current.session.content == "<system>be brief<user>ayes!<user>cyes!"


def test_a_refused_turn_in_a_session_that_has_no_branch_left() -> None:
    script = Script(short_answer)
    conversations = opened(script)
    with pytest.raises(OutOfOrder):
        for _ in range(64):
            conversations.fork()
    for _ in range(2):
        script.answer = lambda _: failing()
        with pytest.raises(TurnRefused, match="too many"):
            said(conversations, "a")
        script.answer = short_answer
        said(conversations, "b")


THOUGHTFUL = '<|channel>thought\nHm.<channel|>Sure.<|tool_call>call:f{a:<|"|>é<|"|>}<tool_call|>'


def thoughtful_answer(_: ScriptedSession) -> Iterator[Chunk]:
    for piece in (THOUGHTFUL[:20], THOUGHTFUL[20:40]):
        yield chunk(piece)
    yield chunk(THOUGHTFUL[40:], finish_reason="stop", stats=END)


def test_a_refused_turn_after_which_thoughts_are_gone_is_said_anew() -> None:
    """The message that was refused had made the branch another one: it cannot just be cut."""
    script = Script(thoughtful_answer)
    conversations = opened(script, system="be brief", thinking=True)
    said(conversations, "a")
    before = conversations.current.session
    script.answer = lambda _: iter([chunk("half"), *failing()])
    with pytest.raises(TurnRefused, match="too many"):
        said(conversations, "b")
    assert before.closed  # type: ignore[attr-defined]
    assert [turn.text for turn in conversations.current.turns] == ["a", THOUGHTFUL]
    (restored,) = conversations.current.session.appended  # type: ignore[attr-defined]
    assert restored == Chat(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "Sure.",
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
                ],
            },
        ],
        enable_thinking=True,
    )
    script.answer = short_answer
    said(conversations, "c")
    assert conversations.current.session.content == "<system>be brief<user>a<assistant>Sure.<user>cyes!"


def failing() -> Iterator[Chunk]:
    raise invalid("max_tokens: too many")
    yield


def test_a_lost_session_is_not_a_refused_turn() -> None:
    script = Script(short_answer)
    conversations = opened(script)
    script.failure = unavailable()
    with pytest.raises(Unavailable):
        said(conversations, "a")


# --- through a pipe ------------------------------------------------------------------------------------------------


def test_lines_are_messages_and_answers_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    conversations = opened(Script(short_answer))
    answer_lines(conversations, parameters(), ["one\n", "\n", "/help is a message\n", "last"])
    assert capsys.readouterr().out == "yes!\nyes!\nyes!\n"
    assert [turn.text for turn in conversations.current.turns[::2]] == ["one", "/help is a message", "last"]


def test_thoughts_are_left_out_of_answers_and_calls_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    conversations = opened(Script(thoughtful_answer))
    answer_lines(conversations, {**parameters(), "special_tokens": True}, ["one\n", "two\n"])
    assert capsys.readouterr().out == 'Sure.\nf({"a": "é"})\n' * 2
    assert [turn.text for turn in conversations.current.turns] == ["one", THOUGHTFUL, "two", THOUGHTFUL]


def test_a_refusal_ends_the_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(short_answer)
    conversations = opened(script)

    def refuses(_: ScriptedSession) -> Iterator[Chunk]:
        raise invalid("seed: too large")
        yield

    script.answer = refuses
    with pytest.raises(CommandError, match="seed: too large"):
        answer_lines(conversations, parameters(), ["one\n", "two\n"])
    assert len(script.asked) == 1


# --- at a terminal -------------------------------------------------------------------------------------------------


def test_an_answer_and_what_it_cost(chat: Callable[..., str]) -> None:
    script = Script(short_answer)
    shown = chat("hello\r\x04", script)
    assert "yes!\n" in shown
    assert "5 tokens in 2 steps (2.50 per step)" in shown
    assert script.asked == [{**parameters(), "token_bytes": False}]


def test_alt_enter_is_a_new_line_and_a_space_hides_a_slash(chat: Callable[..., str]) -> None:
    contents = []

    def answer(session: ScriptedSession) -> Iterator[Chunk]:
        contents.append(session.appended[-1].messages[-1]["content"])
        return short_answer(session)

    chat("two\x1b\rlines\r /quit\r\x04", Script(answer))
    assert contents == ["two\nlines", "/quit"]


def test_commands_change_the_parameters(chat: Callable[..., str]) -> None:
    script = Script(short_answer)
    shown = chat("/seed 7\r/temperature 0.5\r/max-tokens 3\ra\r/seed\r/quit\rnever\r", script)
    assert script.asked == [{"seed": 7, "temperature": 0.5, "max_tokens": 3, "token_bytes": False}]
    assert "seed = 7\n" in shown
    assert "temperature = 0.5\n" in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nonsense", "there is no /nonsense: /help lists what there is"),
        ("/seed x", "/seed N: x is not a number from 0 to 18446744073709551615"),
        ("/seed -1", "/seed N: -1 is not a number"),
        ("/temperature hot", "/temperature T: hot is not a number from 0.001 to 100, or 0"),
        ("/temperature 0.0005", "/temperature T: 0.0005 is not a number from 0.001 to 100, or 0"),
        ("/temperature nan", "/temperature T: nan is not a number"),
        ("/max-tokens 0", "/max-tokens N: 0 is not a number from 1"),
        ("/branch 5", "/branch N: N is 0 to 0; /branches lists them"),
        ("/branch", "/branch N"),
        ("/drafts maybe", "/drafts on or /drafts off; now they are off"),
        ("/fork it", "/fork takes nothing after it"),
        ("/system", "/system TEXT"),
        ("/stats", "there is no answer yet"),
    ],
)
def test_a_wrong_command_is_one_line_and_nothing_is_sent(chat: Callable[..., str], command: str, message: str) -> None:
    script = Script(short_answer)
    shown = chat(f"{command}\r\x04", script).split("\n", 1)[1]
    assert message in shown
    assert shown.count("\n") == 1
    assert script.asked == []


def test_help_lists_every_command(chat: Callable[..., str]) -> None:
    shown = chat("/help\r\x04", Script(short_answer))
    for name in ("help", "fork", "branch", "branches", "seed", "temperature", "max-tokens", "system", "new", "history"):
        assert f"/{name}" in shown
    for name in ("stats", "quit", "drafts"):
        assert f"/{name}" in shown
    assert "Alt-Enter" in shown


def test_branches_and_history(chat: Callable[..., str]) -> None:
    shown = chat("/system be brief\ra\r/fork\rb\r/branches\r/branch 2\r/history\r/stats\r\x04", Script(short_answer))
    assert "branch 2 is a copy; you are still in branch 1" in shown
    assert "*  1" in shown
    assert "last: b" in shown
    assert "   2" in shown
    history = shown[shown.index("now in branch 2") :]
    assert "system: be brief\n> a\nyes!\n" in history
    assert "> b" not in history
    assert "9 tokens before the answer, 5 of them computed for it" in history


def test_ctrl_c_clears_a_line_and_ends_at_an_empty_one(chat: Callable[..., str]) -> None:
    script = Script(short_answer)
    chat("unsent\x03sent\r\x03never\r", script)
    assert len(script.asked) == 1


def test_ctrl_c_interrupts_the_answer_and_keeps_what_was_said(chat: Callable[..., str]) -> None:
    def interrupted(session: ScriptedSession) -> Iterator[Chunk]:
        yield chunk("half")
        signal.raise_signal(signal.SIGINT)
        assert session.script.interrupted.wait(30)
        yield chunk(" more")  # on its way already
        yield chunk("", token_ids=(), drafted=(), finish_reason="cancelled", stats=END)

    script = Script(interrupted)
    shown = chat("a\r/history\r\x04", script)
    assert "interrupted, 5 tokens in 2 steps" in shown
    assert shown.endswith("> a\nhalf more\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_token_is_not_lost(chat: Callable[..., str]) -> None:
    """The first interrupt may come before there is anything to interrupt; it is sent again."""

    def late(session: ScriptedSession) -> Iterator[Chunk]:
        signal.raise_signal(signal.SIGINT)
        assert session.script.interrupted.wait(30)
        session.script.interrupted.clear()  # it had no effect
        yield chunk("half")
        assert session.script.interrupted.wait(30)
        yield chunk("", token_ids=(), drafted=(), finish_reason="cancelled", stats=END)

    assert "interrupted" in chat("a\r\x04", Script(late))


def test_a_second_ctrl_c_does_not_wait_for_the_server(chat: Callable[..., str]) -> None:
    def deaf(_: ScriptedSession) -> Iterator[Chunk]:
        yield chunk("half")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one ends it")

    with pytest.raises(KeyboardInterrupt):
        chat("a\r", Script(deaf))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_refused_message_is_one_line_and_the_chat_goes_on(chat: Callable[..., str]) -> None:
    answers = iter([False, True])

    def answer(session: ScriptedSession) -> Iterator[Chunk]:
        if next(answers):
            return short_answer(session)
        raise invalid("the prompt is too long")

    shown = chat("a\rb\r\x04", Script(answer))
    assert "\nthe prompt is too long request id: r1 (the conversation is as it was before)\n" in shown
    assert "yes!" in shown


def test_a_lost_server_ends_the_chat(chat: Callable[..., str]) -> None:
    def gone(_: ScriptedSession) -> Iterator[Chunk]:
        yield chunk("half")
        raise unavailable()

    with pytest.raises(Unavailable):
        chat("a\rb\r", Script(gone))


def test_messages_are_remembered_for_the_user_only(chat: Callable[..., str], tmp_path: Path) -> None:
    chat("remember me\r\x04", Script(short_answer))
    history = tmp_path / "draftwerk/chat_history"
    assert "remember me" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0
    assert history.parent.stat().st_mode & 0o077 == 0


def test_a_home_that_cannot_be_written_to_is_no_obstacle(
    chat: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert "yes!" in chat("a\r\x04", Script(short_answer))


def test_what_a_model_writes_cannot_steer_the_terminal(chat: Callable[..., str]) -> None:
    def hostile(_: ScriptedSession) -> Iterator[Chunk]:
        yield chunk("a\x1b]0;title\x07\x9b2Jb\tc\n", finish_reason="stop", stats=END)

    shown = chat("x\r/history\r\x04", Script(hostile))
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    assert shown.count("b\tc\n") == 2


# --- thoughts and calls --------------------------------------------------------------------------------------------

MARKED = {"special_tokens": True}


def test_thoughts_are_dimmed_and_calls_stand_out(chat: Callable[..., str]) -> None:
    shown = chat("a\r/history\r\x04", Script(thoughtful_answer), parameters=MARKED, colours=True)
    answer = '\x1b[2;3mHm.\x1b[0m\nSure.\n\x1b[35mf({"a": "é"})\x1b[0m\n'
    shown = re.sub(r"(?<!\n)\x1b\[0m\x1b\[2;3m", "", shown)  # of thoughts that came in pieces
    assert shown.count(answer) == 2, "as it comes, and in the history"
    assert "<|channel>" not in shown


def test_an_answer_that_is_cut_off_in_its_thoughts_or_in_a_call(chat: Callable[..., str]) -> None:
    for text, expected in (
        ("<|channel>thought\nHm <", "Hm <\n"),
        ("So:<|tool_call>call:f{", "So:<|tool_call>call:f{\n"),
    ):

        def cut(_: ScriptedSession, text: str = text) -> Iterator[Chunk]:
            yield chunk(text)
            yield chunk("", token_ids=(), drafted=(), finish_reason="length", stats=END)

        assert expected in chat("a\r\x04", Script(cut), parameters=MARKED)


def test_without_markers_text_is_text(chat: Callable[..., str]) -> None:
    def spells(_: ScriptedSession) -> Iterator[Chunk]:
        yield chunk("<|channel>is its name", finish_reason="stop", stats=END)

    assert "<|channel>is its name\n" in chat("a\r\x04", Script(spells))


def test_draft_colours_are_those_of_all_tokens(chat: Callable[..., str]) -> None:
    shown = chat("a\r\x04", Script(thoughtful_answer), parameters=MARKED, show_drafts=True, colours=True)
    assert "channel" in re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_thinking_is_switched(chat: Callable[..., str]) -> None:
    sessions: list[ScriptedSession] = []

    def answer(session: ScriptedSession) -> Iterator[Chunk]:
        sessions.append(session)
        return short_answer(session)

    keys = "/thinking\ra\r/thinking on\rb\r/thinking off\rc\r\x04"
    shown = chat(keys, Script(answer), has_thinking=True)
    assert [one.enable_thinking for one in sessions[-1].appended] == [None, True, False]
    assert "/thinking on or /thinking off; now it is as the chat template has it" in shown
    assert "thinking is on\n" in shown
    assert "the chat template of some-model knows no thinking" in chat("/thinking on\r\x04", Script(answer))


# --- colours and status --------------------------------------------------------------------------------------------


def spans(text: Any) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_drafts_are_coloured(chat: Callable[..., str]) -> None:
    script = Script(short_answer)
    shown = chat("a\r\x04", script, show_drafts=True, colours=True)
    assert script.asked[0]["token_bytes"] is True
    assert "\x1b[1;32my" in shown
    assert "\x1b[33ms" in shown
    assert "drafted and accepted" in shown


def test_colours_follow_the_tokens_when_text_lags_behind() -> None:
    colours = DraftColours()
    assert spans(colours.coloured("a", [b"a", b"\xc3"], [True, False])) == [("a", DRAFTED)]
    assert spans(colours.coloured("éb", [b"\xa9", b"b"], [True, True])) == [("é", OWN), ("b", DRAFTED)]
    assert spans(colours.coloured("", [b"ha"], [True])) == []
    assert spans(colours.coloured("hay", [b"y"], [False])) == [("h", DRAFTED), ("a", DRAFTED), ("y", OWN)]


def test_bytes_that_are_no_text_do_not_shift_the_colours() -> None:
    colours = DraftColours()
    assert colours.coloured("\N{REPLACEMENT CHARACTER}a", [b"\xff\xfe", b"a"], [True, True]).plain[-1] == "a"
    assert spans(colours.coloured("b", [b"b"], [False])) == [("b", OWN)]


def test_the_status_line_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=40, height=10)
    with StatusLine(console) as status:
        status.show("1.0 tokens/s" + "x" * 100)
        status.show("too soon")
    controls = shown.getvalue()
    assert "\x1b[1;9r" in controls
    assert "\x1b[10;1H\x1b[2K\x1b[2m1.0 tokens/s" + "x" * 27 + "\x1b[0m" in controls
    assert "too soon" not in controls
    assert controls.endswith("\x1b[10;1H\x1b[2K\x1b[r\x1b8")


def test_a_terminal_that_cannot_has_no_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = io.StringIO()
    with StatusLine(Console(file=shown, force_terminal=True, width=40, height=10)) as status:
        status.show("1.0 tokens/s")
    assert shown.getvalue() == ""
