"""`draftwerk tokenize`: from text to token ids and back."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.failures import reports_failures, usage_error
from draftwerk.cli.generate import parse_token_ids

if TYPE_CHECKING:
    from draftwerk.loading import Tokenizer

EPILOG = """
[bold]Examples[/]

  draftwerk tokenize "The history of the steam engine"

  draftwerk tokenize --no-bos --json "naïve café"

  draftwerk tokenize --ids 2,818,4083
"""


@reports_failures
def tokenize(
    text: Annotated[
        Optional[str], typer.Argument(metavar="TEXT", help="The text; - reads stdin.", show_default=False)
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    ids: Annotated[Optional[str], typer.Option("--ids", help="Token ids to turn into text.", metavar="IDS")] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Do not put <bos> first.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the tokens of a text, or the text of tokens."""
    from draftwerk.loading import open_checkpoint

    if (text is None) == (ids is None):
        raise usage_error("give a text, or token ids with --ids")
    tokenizer = open_checkpoint(model).tokenizer
    if tokenizer is None:
        raise usage_error(f"{model} has no tokenizer")
    if ids is not None:
        token_ids = parse_token_ids(ids, "--ids")
        for token in token_ids:
            if not 0 <= token < tokenizer.vocab_size:
                raise usage_error(f"--ids: {token} is not in the vocabulary, 0 to {tokenizer.vocab_size - 1}")
        text = tokenizer.decode(token_ids)
    else:
        text = sys.stdin.read() if text == "-" else text
        assert text is not None
        token_ids = tokenizer.encode(text, add_bos=not no_bos)
    if json_output:
        print(json.dumps({"text": text, "token_ids": token_ids}, ensure_ascii=False))
    elif ids is not None:
        print(text)
    else:
        table = Table("id", "text", title="1 token" if len(token_ids) == 1 else f"{len(token_ids)} tokens")
        for token in token_ids:
            table.add_row(str(token), Text(_shown(tokenizer, token)))
        Console().print(table)


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's bytes as text where they are text, in quotes, so that spaces show; a control token's name."""
    token_bytes = tokenizer.token_bytes(token)
    if not token_bytes:
        return f"{tokenizer.piece_of(token)} (control token)"
    text = token_bytes.decode("utf-8", errors="backslashreplace")
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(token_bytes)[1:]
