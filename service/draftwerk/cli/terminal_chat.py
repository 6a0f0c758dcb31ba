"""A chat at a terminal: the prompt, its commands, and answers as they come."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.segment import Segments
from rich.text import Text

from draftwerk.cli.answer_parts import AnswerParts
from draftwerk.cli.chat_branches import Branch, Conversations, TurnRefused
from draftwerk.cli.draft_colours import DraftColours, legend
from draftwerk.cli.generate import summary
from draftwerk.cli.status_line import StatusLine
from draftwerk_client import Chunk, DraftwerkError, GenerationStats, Unavailable

# Escape sequences in what a model writes must not reach the terminal.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_ENDINGS = {"length": "stopped at max-tokens", "cancelled": "interrupted"}


class _Wrong(Exception):
    """A command that cannot be done; says why."""


class TerminalChat:
    """Reads messages and commands until the user ends it.

    Args:
        console: where everything goes.
        conversations: what is chatted in.
        parameters: sampling parameters of the answers, by the names of the client; commands change them.
        model: the name of the model.
        show_drafts: whether answers are coloured by draft outcome.
        has_thinking: whether the model can be told to think.
    """

    def __init__(
        self,
        console: Console,
        conversations: Conversations,
        parameters: dict[str, Any],
        model: str,
        *,
        show_drafts: bool,
        has_thinking: bool = False,
    ) -> None:
        self._console = console
        self._conversations = conversations
        self._parameters = parameters
        self._model = model
        self._show_drafts = show_drafts
        self._has_thinking = has_thinking
        self._last_stats: GenerationStats | None = None
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "show this list", self._help),
            "/new": ("", "begin a new conversation; the old one stays a branch", self._new),
            "/system": ("TEXT", "begin a new conversation, with this said to the model before it", self._system),
            "/fork": ("", "keep a copy of the conversation as a branch", self._fork),
            "/branch": ("N", "go to branch N", self._branch),
            "/branches": ("", "list the branches", self._branches),
            "/history": ("", "show the conversation", self._history),
            "/seed": ("N", "from now on the noise of seed N; matters if the temperature is not 0", self._seed),
            "/temperature": ("T", "0 takes the most probable token", self._temperature),
            "/max-tokens": ("N", "most tokens of an answer", self._max_tokens),
            "/thinking": ("on|off", "whether the model thinks before it answers", self._thinking),
            "/drafts": ("on|off", "colour every token by whether it was drafted", self._drafts),
            "/stats": ("", "what the last answer cost", self._stats),
            "/quit": ("", "end; so do Ctrl-D, and Ctrl-C at an empty prompt", self._quit),
        }
        self._ended = False

    def run(self) -> None:
        """Chats until the user ends it.

        Raises:
            DraftwerkError: the session is lost.
        """
        self._say(f"{self._model}. /help lists commands, Ctrl-C interrupts an answer, Ctrl-D ends.")
        if self._show_drafts:
            self._console.print(legend())
        prompt: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(),
            key_bindings=_key_bindings(),
            completer=WordCompleter(list(self._commands), sentence=True),
            complete_while_typing=False,
        )
        while not self._ended:
            try:
                line = prompt.prompt()
            except (EOFError, KeyboardInterrupt):
                return
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._answer(line.removeprefix(" ") if line.startswith(" /") else line)

    # --- answers -----------------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        # Colours of drafts belong to tokens, and so to the text with all markers in it.
        colours = DraftColours() if self._show_drafts else None
        parts = AnswerParts(marked=self._parameters.get("special_tokens", False))
        ending = ""

        def interrupt() -> None:
            with suppress(DraftwerkError):  # the answer has ended, or ends with the same error
                self._conversations.interrupt()

        parameters = {**self._parameters, "token_bytes": self._show_drafts}
        try:
            with _interruptible(interrupt) as interrupted, StatusLine(self._console) as status:
                status.show("waiting for the first token")
                speed = _Speed()
                try:
                    for chunk in self._conversations.say(message, parameters):
                        if colours is not None and chunk.token_bytes is not None:
                            self._show(colours.coloured(chunk.text, chunk.token_bytes, chunk.drafted))
                        else:
                            self._show_parts(parts.push(chunk.text))
                        status.show(speed.after(chunk))
                        if chunk.stats is not None:
                            self._last_stats = chunk.stats
                            ending = _ENDINGS.get(chunk.finish_reason or "", "")
                        elif interrupted():
                            interrupt()  # the first time there may have been nothing to interrupt yet
                finally:
                    self._show_parts(parts.finish())
                    self._console.print()
        except TurnRefused as error:
            self._complain(f"{error} (the conversation is as it was before)")
            return
        if self._last_stats is not None:
            self._say(", ".join(filter(None, [ending, summary(self._last_stats)])))

    def _show_parts(self, parts: Iterable[tuple[str, str]]) -> None:
        for text, style in parts:
            self._show(Text(text, style=style))

    # --- commands ----------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        try:
            if name not in self._commands:
                raise _Wrong(f"there is no {name}: /help lists what there is; a space before / makes it a message")
            wanted, _, act = self._commands[name]
            argument = argument.strip()
            if argument and not wanted:
                raise _Wrong(f"{name} takes nothing after it")
            act(argument)
        except _Wrong as error:
            self._complain(str(error))
        except Unavailable:
            raise
        except DraftwerkError as error:
            self._complain(str(error))

    def _help(self, _: str) -> None:
        for name, (argument, what, _act) in self._commands.items():
            self._say(f"  {f'{name} {argument}'.rstrip():<18} {what}")
        self._say(f"  {'Alt-Enter':<18} a new line in the message")
        self._say(f"  {'Ctrl-C':<18} interrupt the answer; the conversation goes on")

    def _new(self, _: str) -> None:
        self._say_where(self._conversations.begin(None))

    def _system(self, text: str) -> None:
        if not text:
            raise _Wrong(f"/system TEXT: now it is {self._conversations.current.system!r}")
        self._say_where(self._conversations.begin(text))

    def _fork(self, _: str) -> None:
        copy = self._conversations.fork()
        self._say(f"branch {copy.number} is a copy; you are still in branch {self._conversations.current.number}")

    def _branch(self, argument: str) -> None:
        branches = self._conversations.branches
        if not argument.isdecimal() or int(argument) not in branches:
            raise _Wrong(f"/branch N: N is 0 to {len(branches) - 1}; /branches lists them")
        self._say_where(self._conversations.go_to(int(argument)))

    def _branches(self, _: str) -> None:
        for branch in self._conversations.branches.values():
            mark = "*" if branch is self._conversations.current else " "
            last = next((turn.text for turn in reversed(branch.turns) if turn.role == "user"), "")
            said = f"last: {_shortened(last)}" if last else "empty"
            self._say(f"{mark} {branch.number:>2}  {branch.session.length:>6} tokens  {said}")

    def _history(self, _: str) -> None:
        branch = self._conversations.current
        if branch.system:
            self._say(f"system: {branch.system}")
        for turn in branch.turns:
            if turn.role == "user":
                self._show(Text(f"> {turn.text}\n", style="bold"))
            else:
                parts = AnswerParts(marked=self._parameters.get("special_tokens", False))
                self._show_parts([*parts.push(turn.text), *parts.finish(), ("\n", "")])
        if not branch.turns:
            self._say("nothing was said yet")

    def _seed(self, argument: str) -> None:
        self._set_number("/seed N", "seed", argument, int, lambda seed: 0 <= seed < 2**64, f"from 0 to {2**64 - 1}")

    def _temperature(self, argument: str) -> None:
        self._set_number(
            "/temperature T",
            "temperature",
            argument,
            float,
            lambda t: t == 0 or 0.001 <= t <= 100,
            "from 0.001 to 100, or 0",
        )

    def _max_tokens(self, argument: str) -> None:
        self._set_number(
            "/max-tokens N", "max_tokens", argument, int, lambda n: 1 <= n < 2**31, f"from 1 to {2**31 - 1}"
        )

    def _set_number(
        self,
        usage: str,
        name: str,
        argument: str,
        kind: Callable[[str], float],
        is_allowed: Callable[[float], bool],
        allowed: str,
    ) -> None:
        try:
            value = kind(argument) if argument else self._parameters[name]
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise _Wrong(f"{usage}: {argument} is not a number {allowed}")
        self._parameters[name] = value
        self._say(f"{name} = {value}")

    def _drafts(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise _Wrong(f"/drafts on or /drafts off; now they are {'on' if self._show_drafts else 'off'}")
        self._show_drafts = argument == "on"
        self._console.print(legend() if self._show_drafts else Text("no colours", style="dim"))

    def _thinking(self, argument: str) -> None:
        if not self._has_thinking:
            raise _Wrong(f"the chat template of {self._model} knows no thinking")
        if argument not in ("on", "off"):
            now = {True: "on", False: "off", None: "as the chat template has it"}[self._conversations.thinking]
            raise _Wrong(f"/thinking on or /thinking off; now it is {now}")
        self._conversations.thinking = argument == "on"
        self._say(f"thinking is {argument}")

    def _stats(self, _: str) -> None:
        if self._last_stats is None:
            raise _Wrong("there is no answer yet")
        stats = self._last_stats
        computed = stats.prompt_tokens - stats.cached_tokens
        self._say(summary(stats))
        self._say(f"{stats.prompt_tokens} tokens before the answer, {computed} of them computed for it")

    def _quit(self, _: str) -> None:
        self._ended = True

    # --- what is shown -----------------------------------------------------------------------------------------

    def _say_where(self, branch: Branch) -> None:
        self._say(f"now in branch {branch.number}, {branch.session.length} tokens")

    def _say(self, text: str) -> None:
        self._show(Text(f"{text}\n", style="dim"))

    def _complain(self, text: str) -> None:
        line = " ".join(text.split())
        self._show(Text(f"{line}\n", style="red"))

    def _show(self, text: Text) -> None:
        text.plain = text.plain.translate(_CONTROLS)
        text.stylize_before(text.style)  # Text.render leaves out the style of a text without spans
        # As segments: rich would wrap the text and turn its tabs into spaces.
        self._console.print(Segments(text.render(self._console)), soft_wrap=True)


class _Speed:
    """Tokens per second of an answer so far."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # when the first step came, with how many tokens
        self._tokens = 0

    def after(self, chunk: Chunk) -> str:
        """The status after one more chunk."""
        self._tokens += len(chunk.token_ids)
        if self._first is None:
            self._first = (chunk.received_at, self._tokens)
        seconds = chunk.received_at - self._first[0]
        speed = f"{(self._tokens - self._first[1]) / seconds:.1f} tokens/s, " if seconds > 0 else ""
        return f"{speed}{self._tokens} tokens  (Ctrl-C interrupts)"


@contextmanager
def _interruptible(interrupt: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C call `interrupt`, and a second Ctrl-C raise KeyboardInterrupt.

    Yields:
        Whether it was pressed.
    """
    pressed = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        # Not here: a signal may come while this thread holds a lock that the call needs.
        threading.Thread(target=interrupt, daemon=True).start()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _history() -> History:
    """Earlier messages, in a file that only the user may read, where the XDG base directory specification has it."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        path = (state if state.is_absolute() else Path.home() / ".local/state") / "draftwerk/chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # no home directory to write to: this chat's own messages are all there are
        return InMemoryHistory()
    return FileHistory(str(path))


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return bindings


def _shortened(text: str, width: int = 50) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
