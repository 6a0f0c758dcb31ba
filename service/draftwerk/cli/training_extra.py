"""What the commands about training share: the extra that they need, and their failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer

from draftwerk.cli import options
from draftwerk.cli.failures import CommandError, usage_error

_NEEDED = ("gguf", "safetensors", "torch", "transformers")


@contextmanager
def reports_training_failures() -> Iterator[None]:
    """Turns what training raises into the one line that ends a command.

    Raises:
        CommandError: what training needs is not installed, or it raised a TrainingError.
    """
    from draftwerk.training.errors import TrainingError

    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        raise CommandError(
            f'{error.name} is missing, which training needs: pip install ./client ".[train]", from a checkout'
        ) from None
    except TrainingError as error:
        raise usage_error(str(error)) from None


@contextmanager
def naming_options(context: typer.Context, parameters: Mapping[str, str]) -> Iterator[None]:
    """Has errors name options as they are on the command line; training has its own names, such as draft_vocab_size.

    Args:
        parameters: its name of a value to the name of the command's parameter.

    Raises:
        CommandError: an option is out of range.
    """
    from draftwerk.training.errors import TrainingError

    try:
        yield
    except TrainingError as error:
        name, is_value, rest = str(error).partition(" = ")
        if not is_value or name not in parameters:
            raise
        raise usage_error(f"{options.flags(context)[parameters[name]].opts[0]} {rest}") from None
