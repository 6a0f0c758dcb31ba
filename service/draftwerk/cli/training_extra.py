"""What the commands about training share: the extra that they need, and their failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        raise CommandError(f'{error.name} is missing, which training needs: pip install "draftwerk[train]"') from None
    except TrainingError as error:
        raise usage_error(str(error)) from None
