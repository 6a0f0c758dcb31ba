"""From exceptions to what a person at a terminal sees: one line on stderr and an exit code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from typing_extensions import ParamSpec

EXIT_FAILURE = 1
EXIT_USAGE = 2  # also: a model file that cannot be used
EXIT_INTERRUPTED = 130

_P = ParamSpec("_P")
_R = TypeVar("_R")


class CommandError(Exception):
    """Ends a command with this message and exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def usage_error(message: str) -> CommandError:
    """For arguments that are wrong."""
    return CommandError(message, EXIT_USAGE)


def file_error(error: OSError) -> str:
    """What went wrong with which file."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{error.filename}: {reason}"


@contextmanager
def reports_server_failures() -> Iterator[None]:
    """Turns what the client raises into the one line that ends a command. Imports the client, which takes its time.

    Raises:
        CommandError: the client raised a DraftwerkError.
    """
    from draftwerk_client import DraftwerkError, InvalidRequest

    try:
        yield
    except InvalidRequest as error:
        raise usage_error(str(error)) from None
    except DraftwerkError as error:
        raise CommandError(str(error)) from None


def reports_failures(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a command: expected failures end in one line and their exit code, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(EXIT_FAILURE) from None  # the reader of our output went away: no one to tell
        except CommandError as error:
            _say(str(error))
            raise typer.Exit(error.exit_code) from None
        except ValueError as error:  # CheckpointError, RequestError, and engine options out of range
            _say(str(error))
            raise typer.Exit(EXIT_USAGE) from None
        except OSError as error:
            _say(file_error(error))
            raise typer.Exit(EXIT_FAILURE) from None
        except (RuntimeError, MemoryError) as error:
            if not _is_expected(error):
                raise
            _say(str(error) or type(error).__name__)
            raise typer.Exit(EXIT_FAILURE) from None

    return wrapped


def _is_expected(error: Exception) -> bool:
    from draftwerk.requests import EngineClosed, EngineFailed, QueueFull
    from draftwerk.results import GenerationError

    return isinstance(error, (GenerationError, EngineClosed, EngineFailed, QueueFull, MemoryError))


def _say(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(line)}")
