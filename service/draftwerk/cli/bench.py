"""`draftwerk bench`: speed on a file of prompts; `draftwerk bench rows`: the time of one pass by its rows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.failures import file_error, reports_failures, reports_server_failures, usage_error
from draftwerk.cli.json_file import JsonFile, check_writable, print_and_write
from draftwerk.cli.target import TlsCa, TlsCertificate, TlsKey, credentials_for

if TYPE_CHECKING:
    import grpc

    from draftwerk.engine import Engine
    from draftwerk.measurement import BenchPrompt, StreamRecord, TokenStream
    from draftwerk.requests import SamplingParams

EPILOG = """
[bold]Examples[/]

  draftwerk bench --prompts prompts.jsonl --limit 20 --drafter lookup

  draftwerk bench --prompts prompts.jsonl --drafter none --concurrency 16 --json none.json

  draftwerk bench --prompts prompts.jsonl --concurrency 16 --target 127.0.0.1:50051

  draftwerk bench rows --model gemma-3-270m
"""

ROWS_EPILOG = """
[bold]Examples[/]

  draftwerk bench rows --threads 2 --json rows.json
"""

# What a server that runs already has settled.
_ENGINE_OPTIONS = (
    "model",
    "drafter",
    "no_lookup",
    "full_head",
    "draft_length",
    "weights",
    "device",
    "threads",
    "kv_memory",
    "no_prefix_cache",
)
_PARAMETERS = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
_POSITIONS = 8  # in a draft, that are printed
# Touches weights and clocks; under another salt, so that no prompt starts from a warm prefix cache.
_WARM_UP: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "salt": "warm-up"}

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode="rich",
    epilog=EPILOG,
    help="Measure speed on a file of prompts, or (with [bold]rows[/]) the time of one pass of the model.",
)


@app.callback()
@reports_failures
def bench(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    drafter: options.Drafter = "auto",
    no_lookup: options.NoLookup = False,
    full_head: options.FullHead = False,
    prompts: Annotated[
        Optional[Path],
        typer.Option(
            "--prompts",
            help='JSON lines: {"question_id", "category", "turns": ["..."]}; first turns are used.',
            metavar="FILE",
        ),
    ] = None,
    limit: Annotated[
        Optional[int], typer.Option("--limit", min=1, help="Only the first N prompts.", metavar="N")
    ] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Requests in flight.", metavar="C")
    ] = 1,
    ignore_eos: options.IgnoreEos = False,
    chat: options.Chat = False,
    draft_length: options.DraftLength = None,
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    kv_memory: options.KvMemory = None,
    no_prefix_cache: options.NoPrefixCache = False,
    target: Annotated[
        Optional[str],
        typer.Option(
            "--target",
            help="Measure through the server at HOST:PORT or unix:PATH instead of in this process.",
            metavar="ADDRESS",
        ),
    ] = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    json_file: JsonFile = None,
) -> None:
    """Measure speed on a file of prompts."""
    if context.invoked_subcommand is not None:
        options.refuse_beside(context, context.invoked_subcommand, "it has its own options, behind it", *context.params)
        return
    from draftwerk.measurement import figures, read_prompts
    from draftwerk.requests import SamplingParams

    if target is not None:
        options.refuse_beside_target(context, *_ENGINE_OPTIONS)
    credentials = credentials_for(target, tls_ca, tls_certificate, tls_key)
    if prompts is None:
        raise usage_error("--prompts FILE is missing (draftwerk bench --help)")
    try:
        bench_prompts = read_prompts(prompts, limit)
    except OSError as error:
        raise usage_error(f"--prompts: {file_error(error)}") from None
    except UnicodeDecodeError as error:
        raise usage_error(f"--prompts: {prompts} is not UTF-8 text: {error}") from None
    check_writable(json_file)
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, ignore_eos=ignore_eos
    )
    workload = _Workload(bench_prompts, params, concurrency, chat)
    if target is not None:
        with reports_server_failures():
            run = asyncio.run(_run_at(target, credentials, workload))
    else:
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
            prefix_cache=not no_prefix_cache,
        ) as engine:
            run = asyncio.run(_run_in(engine, workload, draft_length))
    report = {
        **figures(run.records, run.seconds, run.peak_memory),
        "drafters": run.drafters,
        "settings": {"target": target, **run.model, **_settings(params, concurrency)},
        "engine": run.engine,
    }
    print_and_write(partial(_print_report, report), report, json_file)


@app.command("rows", epilog=ROWS_EPILOG)
@reports_failures
def rows(
    model: options.Model = options.DEFAULT_MODEL,
    most_rows: Annotated[int, typer.Option("--max-rows", min=1, max=64, help="Time 1 to N rows.", metavar="N")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Passes for each count; the median counts.")] = 30,
    context: Annotated[int, typer.Option("--context", min=0, help="Positions before the rows.", metavar="N")] = 64,
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    full_head: options.FullHead = False,
    json_file: JsonFile = None,
) -> None:
    """Time one pass of the model at 1 to 16 rows: what verifying drafts costs."""
    from draftwerk.devices import find_gpu
    from draftwerk.measurement import time_rows
    from draftwerk.weights import load_model, open_model

    check_writable(json_file)
    with options.loading_progress(model) as progress:
        core_model = load_model(
            open_model(model, progress),
            weights=weights,
            gpu=find_gpu(device),
            threads=threads,
            full_head=full_head,
            progress=progress,
        )
    time_rows(core_model, most_rows, 2, context)  # warms caches and clocks
    with options.messages.status("timing passes"):
        measured = time_rows(core_model, most_rows, repeats, context)
    table = Table("rows", "ms", "relative to 1 row", "tokens/s if all accepted")
    for count, ms in measured.items():
        table.add_row(str(count), f"{ms:.2f}", f"{ms / measured[1]:.2f}", f"{count / ms * 1e3:.0f}")
    rows_ms = {str(count): ms for count, ms in measured.items()}
    print_and_write(lambda console: console.print(table), {"rows": rows_ms}, json_file)


@dataclass(frozen=True)
class _Workload:
    """What is measured, wherever it runs."""

    prompts: Sequence[BenchPrompt]
    params: SamplingParams
    concurrency: int
    chat: bool

    def prompt(self, index: int) -> str | list[dict[str, str]]:
        text = self.prompts[index].text
        return [{"role": "user", "content": text}] if self.chat else text


@dataclass(frozen=True)
class _Run:
    """What came of it."""

    records: Sequence[StreamRecord]
    seconds: float
    peak_memory: int
    """Bytes that the process with the model had resident at most."""
    model: dict[str, Any]
    engine: dict[str, Any]
    drafters: dict[str, dict[str, Any]]
    """See measurement.drafter_figures()."""


async def _run_in(engine: Engine, workload: _Workload, draft_length: int | None) -> _Run:
    """The workload in an engine of this process."""
    from draftwerk.measurement import drafter_figures
    from draftwerk.memory import peak_resident_bytes

    logging.getLogger("draftwerk.acceptance").addHandler(logging.NullHandler())  # the report has its warning
    engine.deliver_on(asyncio.get_running_loop())
    token_ids = [engine.encode_prompt(workload.prompt(i)) for i in range(len(workload.prompts))]
    await engine.submit(token_ids[0], replace(workload.params, **_WARM_UP)).aresult()
    before = engine.stats()["drafters"]
    records, seconds = await _measure(lambda ids: engine.submit(ids, workload.params), workload, token_ids)
    info = engine.info
    model = {
        "model": info.model,
        "backend": info.backend,
        "weight_bytes": info.weight_bytes,
        "kv_memory_bytes": info.kv_memory_bytes,
        "drafter": info.drafter,
        "draft_length": draft_length,
    }
    stats = engine.stats()
    after = {
        name: {**figures, "warning": figures["warning"] and figures["warning"]["text"]}
        for name, figures in stats["drafters"].items()
    }
    return _Run(records, seconds, peak_resident_bytes(), model, stats, drafter_figures(before, after))


async def _run_at(target: str, credentials: grpc.ChannelCredentials | None, workload: _Workload) -> _Run:
    """The workload at a server."""
    from draftwerk.measurement import drafter_figures
    from draftwerk_client import AsyncClient

    params: dict[str, Any] = {name: getattr(workload.params, name) for name in _PARAMETERS}
    async with AsyncClient(target, credentials=credentials) as client:
        info = await client.model()
        token_ids = [(await client.tokenize(workload.prompt(i))).token_ids for i in range(len(workload.prompts))]
        await client.generate(token_ids[0], **{**params, **_WARM_UP})
        before = await client.stats()
        records, seconds = await _measure(lambda ids: client.stream(ids, **params), workload, token_ids)
        stats = await client.stats()
    model = {
        "model": info.name,
        "backend": info.backend,
        "weight_bytes": info.weight_bytes,
        "kv_memory_bytes": stats.cache.budget_bytes,
        "drafter": info.drafter,
        "server_version": info.server_version,
    }
    of_drafters = [{drafter.name: asdict(drafter) for drafter in looked.drafters} for looked in (before, stats)]
    return _Run(records, seconds, stats.peak_resident_bytes, model, asdict(stats), drafter_figures(*of_drafters))


async def _measure(
    start: Callable[[Sequence[int]], TokenStream], workload: _Workload, token_ids: Sequence[Sequence[int]]
) -> tuple[list[StreamRecord], float]:
    from draftwerk.measurement import run_prompts

    with _progress() as bar:
        task = bar.add_task("prompts", total=len(token_ids))
        prompts = list(zip(workload.prompts, token_ids, strict=True))
        return await run_prompts(start, prompts, workload.concurrency, lambda: bar.advance(task))


def _settings(params: SamplingParams, concurrency: int) -> dict[str, Any]:
    return {
        **{name: getattr(params, name) for name in _PARAMETERS},
        "concurrency": concurrency,
    }


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=options.messages,
        refresh_per_second=4,  # it shares the machine with what it measures
        transient=True,
        disable=not options.messages.is_terminal,
    )


def _print_report(report: dict[str, Any], console: Console) -> None:
    settings = report["settings"]
    title = f"{settings['model']}, {settings['backend']}, drafter {settings['drafter']}"
    if settings["target"] is not None:
        title += f", at {settings['target']}"
    table = Table("category", "tokens", "steps", "tokens/step", "accepted", "tokens/s", title=Text(title))
    for category, values in report["per_category"].items():
        table.add_row(Text(category or "-"), *_speculation_cells(values))
    table.add_section()
    table.add_row("all", *_speculation_cells(report), style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    ttft, gap = report["time_to_first_token_ms"], report["inter_token_latency_ms"]
    console.print(
        f"aggregate {report['aggregate_tokens_per_second']:.1f} tokens/s, "
        f"prefill {report['prefill_tokens_per_second']:.0f} tokens/s, "
        f"first token p50 {ttft['p50']:.0f} ms p99 {ttft['p99']:.0f} ms, "
        f"between tokens p50 {gap['p50']:.1f} ms p99 {gap['p99']:.1f} ms, "
        f"peak memory {report['peak_rss_mb']:.0f} MiB",
        highlight=False,
    )
    for name, drafts in report["drafters"].items():
        shares = drafts["acceptance_by_position"]
        console.print(
            f"drafter {name}: drafted in {sum(drafts['drafted_by_position'][:1])} steps, accepted by position "
            + (" ".join(f"{share:.0%}" for share in shares[:_POSITIONS]) or "-")
            + (" ..." if len(shares) > _POSITIONS else ""),
            highlight=False,
        )
    console.print(f"output sha256 {report['output_sha256']}", style="dim", highlight=False)
    for drafts in report["drafters"].values():
        if drafts["warning"] is not None:
            options.messages.print(Text(f"warning: {drafts['warning']}", style="yellow"), soft_wrap=True)


def _speculation_cells(values: dict[str, Any]) -> list[str]:
    return [
        str(values["tokens"]),
        str(values["steps"]),
        f"{values['tokens_per_step']:.2f}",
        f"{values['acceptance_rate']:.0%}" if values["drafted"] else "-",
        f"{values['decode_tokens_per_second']:.1f}",
    ]
