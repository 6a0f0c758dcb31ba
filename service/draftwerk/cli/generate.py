"""`draftwerk generate`: text from one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from draftwerk.cli import options
from draftwerk.cli.failures import file_error, reports_failures, usage_error

if TYPE_CHECKING:
    from draftwerk.engine import Engine
    from draftwerk.measurement import Stats
    from draftwerk.requests import Prompt, SamplingParams
    from draftwerk.results import Completion

EPILOG = """
[bold]Examples[/]

  draftwerk generate --prompt "The history of the steam engine begins"

  draftwerk generate -m ./gemma-3-1b-it --chat --prompt "What is a page table?" --temperature 1 --top-k 64

  draftwerk generate --prompt-file notes.txt --max-tokens 500 --drafter lookup

  draftwerk generate --prompt-ids 2,818,4083 --max-tokens 8 --json | jq .token_ids
"""


@reports_failures
def generate(
    model: options.Model = options.DEFAULT_MODEL,
    prompt: Annotated[Optional[str], typer.Option("--prompt", "-p", help="The prompt's text.", metavar="TEXT")] = None,
    prompt_ids: Annotated[
        Optional[str], typer.Option("--prompt-ids", help="The prompt as token ids, e.g. 2,818,4083.", metavar="IDS")
    ] = None,
    prompt_file: Annotated[
        Optional[Path], typer.Option("--prompt-file", help="Read the prompt from a file; - is stdin.", metavar="FILE")
    ] = None,
    chat: options.Chat = False,
    max_tokens: options.MaxTokens = 256,
    min_tokens: Annotated[int, typer.Option("--min-tokens", help="No end token before this many.", metavar="N")] = 0,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    stop_token_id: Annotated[
        Optional[list[int]], typer.Option("--stop-token-id", help="End with this token. May be repeated.", metavar="ID")
    ] = None,
    logprobs: Annotated[
        Optional[int],
        typer.Option("--logprobs", help="With --json: log-probabilities, and of the N best.", metavar="N"),
    ] = None,
    ignore_eos: options.IgnoreEos = False,
    drafter: options.Drafter = "auto",
    no_lookup: options.NoLookup = False,
    full_head: options.FullHead = False,
    draft_length: options.DraftLength = None,
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    kv_memory: options.KvMemory = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Generate text from a prompt, streamed as it comes."""
    from draftwerk.requests import SamplingParams

    read_prompt = _read_prompt(prompt, prompt_ids, prompt_file, chat)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        logprobs=logprobs,
        ignore_eos=ignore_eos,
    )
    with options.open_engine(
        model,
        drafter=drafter,
        no_lookup=no_lookup,
        full_head=full_head,
        draft_length=draft_length,
        device=device,
        threads=threads,
        kv_memory=kv_memory,
        weights=weights,
        prefix_cache=False,  # one request: nothing could be shared
    ) as engine:
        if json_output:
            print(json.dumps(_as_json(engine.generate(read_prompt, params)), ensure_ascii=False))
        else:
            _print_stream(engine, read_prompt, params)


def parse_token_ids(text: str, option: str) -> list[int]:
    """Token ids separated by commas or spaces; `option` is named if they are not."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise usage_error(f"{option}: {text!r} is not a list of integers such as 2,818,4083") from None


def _read_prompt(text: str | None, ids: str | None, file: Path | None, chat: bool) -> Prompt:
    if sum(source is not None for source in (text, ids, file)) != 1:
        raise usage_error("give exactly one of --prompt, --prompt-ids and --prompt-file")
    if ids is not None:
        if chat:
            raise usage_error("--chat needs text, not --prompt-ids")
        return parse_token_ids(ids, "--prompt-ids")
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise usage_error(f"--prompt-file: {file} is not UTF-8 text: {error}") from None
        except OSError as error:
            raise usage_error(f"--prompt-file: {file_error(error)}") from None
    assert text is not None
    return [{"role": "user", "content": text}] if chat else text


def _as_json(completion: Completion) -> dict[str, Any]:
    values: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "drafted": list(completion.drafted),
        "prompt_token_ids": list(completion.prompt_token_ids),
        "stats": completion.stats.as_dict(),
    }
    if completion.logprobs is not None:
        values["logprobs"] = [
            {"logprob": entry.logprob, "top": [{"id": token, "logprob": p} for token, p in entry.top]}
            for entry in completion.logprobs
        ]
    return values


def _print_stream(engine: Engine, prompt: Prompt, params: SamplingParams) -> None:
    stats = None
    for chunk in engine.stream(prompt, params):
        # A checkpoint without a tokenizer has ids only.
        piece = chunk.text if engine.has_tokenizer else "".join(f"{token} " for token in chunk.token_ids)
        sys.stdout.write(piece)
        sys.stdout.flush()
        stats = chunk.stats
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stats is not None:
        options.messages.print(summary(stats), style="dim", highlight=False)


def summary(stats: Stats) -> str:
    """One line about what a generation cost."""
    line = (
        f"{stats.generated_tokens} tokens in {stats.steps} steps "
        f"({stats.tokens_per_step:.2f} per step), {stats.decode_tokens_per_second:.1f} tokens/s, "
        f"first after {stats.time_to_first_token * 1000:.0f} ms"
    )
    if stats.drafted:
        line += f", {stats.accepted} of {stats.drafted} drafts accepted"
    return line
