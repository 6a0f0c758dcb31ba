"""`draftwerk train-drafter`: a drafter for a model, trained on what the model writes."""

from __future__ import annotations

import errno
import shlex
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.failures import CommandError, file_error, reports_failures, usage_error
from draftwerk.cli.training_display import TrainingDisplay
from draftwerk.cli.training_extra import naming_options, reports_training_failures

if TYPE_CHECKING:
    from draftwerk.training.prompts import PromptsFile
    from draftwerk.training.run_options import RunOptions

EPILOG = """
[bold]Examples[/]

  draftwerk train-drafter --model gemma-3-270m --out my-drafter --hours 4

  draftwerk train-drafter --model ./gemma-3-1b-it --out my-drafter --tokens 5000000 --prompts prompts.jsonl

  draftwerk train-drafter --model ./gemma-4-E2B-it --from google/gemma-4-E2B-it-assistant --out tuned --hours 8

  draftwerk train-drafter --out my-drafter --resume

  draftwerk serve --model gemma-3-270m --drafter my-drafter/drafter

  draftwerk export-drafter my-drafter/drafter --gguf my-drafter.gguf
"""

# What a run that is gone on with was told at its beginning, by the names of RunOptions and of the command line.
_SETTLED = {
    "model": "model",
    "prompts": "prompts",
    "chat": "chat",
    "start_from": "from_drafter",
    "hours": "hours",
    "tokens": "tokens",
    "seed": "seed",
    "layers": "layers",
    "draft_vocab_size": "draft_vocabulary",
    "clusters": "clusters",
    "chosen_clusters": "chosen_clusters",
    "learning_rate": "learning_rate",
    "length": "length",
    "accumulate": "accumulate",
    "weights": "weights",
    "precision": "precision",
}
# The same of RunOptions.text.served.
_SERVED = ("temperature", "top_k", "top_p")
# What is told whenever a run is gone on with: it is of the machine.
_OF_MACHINE = ("device", "threads")
# Options by the names that training has for them.
_OPTIONS = {**_SETTLED, **{name: name for name in (*_SERVED, *_OF_MACHINE)}}
_TOKENS_PER_BATCH = 2048
_LEARNING_RATE = 5e-4
_FINE_TUNING_RATE = 1e-4


@reports_failures
def train_drafter(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the run; the drafter is DIR/drafter.", metavar="DIR")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    prompts: Annotated[
        Optional[Path],
        typer.Option(
            "--prompts",
            help='What texts begin with: lines of text, or JSON lines with "prompt", "messages" or "turns", and '
            '"category". Default: built-in openings.',
            metavar="FILE",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Lines of --prompts are a user's messages, for the model's chat template.", metavar=""
        ),
    ] = False,
    temperature: Annotated[
        Optional[float],
        typer.Option(
            "--temperature",
            help="What the model will be served with: texts are sampled and the drafter is evaluated like that. "
            "0: greedily. Default: four usual ways to sample take turns.",
            metavar="T",
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option("--top-k", help="With --temperature: keep the K most probable tokens; 0 keeps all.", metavar="K"),
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="With --temperature: keep this probability mass; 1 keeps all.", metavar="P")
    ] = 1.0,
    from_drafter: Annotated[
        Optional[str],
        typer.Option(
            "--from",
            help="Go on from this drafter, a directory, GGUF file or hub name, instead of the model's last layers.",
            metavar="D",
        ),
    ] = None,
    hours: Annotated[
        Optional[float],
        typer.Option(
            "--hours",
            help="How long to write text and train; the evaluation, some minutes, comes on top. "
            "Either this or --tokens is needed.",
            metavar="H",
        ),
    ] = None,
    tokens: Annotated[
        Optional[int],
        typer.Option("--tokens", help="Tokens to train on, instead of --hours.", metavar="N", show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in DIR, which has its own options; they are not repeated.", metavar=""
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="With --tokens, the same seed and --threads give the same drafter on processors of one kind.",
            metavar="S",
        ),
    ] = 0,
    layers: Annotated[int, typer.Option("--layers", help="Layers of the drafter.", metavar="N")] = 2,
    draft_vocabulary: Annotated[
        int, typer.Option("--draft-vocabulary", help="Tokens that can be drafted.", metavar="N")
    ] = 16_384,
    clusters: Annotated[
        Optional[int],
        typer.Option(
            "--clusters",
            help="Clusters of these tokens; a draft looks at some of them, instead of at every token. 0: none. "
            "Default: of 32 tokens each, if there are 8,192 or more.",
            metavar="N",
        ),
    ] = None,
    chosen_clusters: Annotated[
        int, typer.Option("--chosen-clusters", help="Clusters that a draft looks at.", metavar="N")
    ] = 64,
    learning_rate: Annotated[
        Optional[float],
        typer.Option(
            "--learning-rate",
            help=f"At its peak. Default: {_LEARNING_RATE:g}, with --from {_FINE_TUNING_RATE:g}.",
            metavar="R",
        ),
    ] = None,
    length: Annotated[
        int,
        typer.Option(
            "--length",
            help="Longest sequence of a batch, in tokens: longer texts are cut, and long prompts to half of it.",
            metavar="N",
        ),
    ] = 1024,
    accumulate: Annotated[
        int,
        typer.Option(
            "--accumulate",
            help=f"Batches (of {_TOKENS_PER_BATCH:,} tokens, or --length) whose gradients make a step.",
            metavar="N",
        ),
    ] = 1,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            help="auto, int8, int4, fp8, f32, f16 or bf16: how to hold float weights where text is written and the "
            "drafter evaluated, as they will be served.",
            metavar="TYPE",
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="auto, bf16 or f32: what training computes in. auto: bf16 where the device multiplies it by itself.",
            metavar="TYPE",
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda: what trains. Text is written on the CPU.", metavar="D")
    ] = "auto",
    threads: options.Threads = 0,
) -> None:
    """Train a drafter for a model, on text that the model writes itself.

    It can be stopped at any time: DIR/drafter is the drafter as far as it has come, and --resume goes on. At the end
    the drafter is evaluated, and DIR/report.html says what it is worth.
    """
    with reports_training_failures(), naming_options(context, _OPTIONS), ExitStack() as held:
        from draftwerk.training.conclusion import conclude
        from draftwerk.training.evaluation import EvaluationOptions
        from draftwerk.training.prompts import read_prompts
        from draftwerk.training.run import Run
        from draftwerk.training.run_directory import RunDirectory
        from draftwerk.training.run_options import RunOptions, begin, read_options
        from draftwerk.training.sampling import Sampling
        from draftwerk.training.text import TextOptions

        directory = RunDirectory(out)
        if resume:
            options.refuse_beside(context, "--resume", "the run has its own", *_SETTLED.values(), *_SERVED)
            held.enter_context(directory.held())
            told = read_options(directory)
        else:
            if (hours is None) == (tokens is None):
                raise usage_error("give either --hours H or --tokens N (draftwerk train-drafter --help)")
            if chat and prompts is None:
                raise usage_error("--chat is for --prompts: the built-in openings use a chat template anyway")
            if from_drafter is not None:
                own = ("layers", "draft_vocabulary", "clusters", "chosen_clusters")
                options.refuse_beside(context, "--from", "that drafter has its own", *own)
            if temperature is None and (top_k, top_p) != (0, 1.0):
                raise usage_error("--top-k and --top-p are for --temperature: by default ways to sample take turns")
            if learning_rate is None:
                learning_rate = _LEARNING_RATE if from_drafter is None else _FINE_TUNING_RATE
            told = RunOptions(
                model=model,
                prompts=None if prompts is None else str(prompts),
                chat=chat,
                start_from=from_drafter,
                hours=hours,
                tokens=tokens,
                seed=seed,
                layers=layers,
                draft_vocab_size=draft_vocabulary,
                clusters=clusters,
                chosen_clusters=chosen_clusters,
                learning_rate=learning_rate,
                length=length,
                tokens_per_batch=max(_TOKENS_PER_BATCH, length),
                accumulate=accumulate,
                weights=weights,
                precision=precision,
                text=TextOptions(served=None if temperature is None else Sampling(temperature, top_k, top_p)),
            )
        # What is wrong with prompts is told before a model is fetched.
        given = None if resume or prompts is None else read_prompts(prompts, chat=chat)
        with options.loading_progress(told.model) as progress:
            from draftwerk.weights import open_model

            checkpoint = open_model(told.model, progress)
        with TrainingDisplay() as display, _stopping(display) as stop:
            if not resume:
                held.enter_context(directory.held(new=True))
                begin(directory, told, given)
                told = read_options(directory)
                if given is not None:
                    display.say(_how_read(given))
            with _saying_how_to_go_on(context):
                run = Run(directory, told, checkpoint, display, stop=stop.is_set, device=device, threads=threads)
                done = run.train() and conclude(
                    directory,
                    told,
                    checkpoint,
                    display,
                    command=_command(context, told),
                    stop=stop.is_set,
                    threads=threads,
                    evaluation=EvaluationOptions(weights=told.weights, device="cpu" if device == "cpu" else "auto"),
                )
    if not done:
        raise CommandError(f"stopped; go on with: {_going_on(context)}", exit_code=130)
    options.messages.print(Text(f"the drafter is {directory.drafter}, and what it is worth is in {directory.report}"))


def _going_on(context: typer.Context) -> str:
    """The command that goes on with a run on this machine."""
    return shlex.join([*_beginning(context), "--resume", *_words(context, _OF_MACHINE, context.params)])


def _how_read(prompts: PromptsFile) -> str:
    """What became of the prompts of a file: what was meant to be something else is noticed."""
    count = len(prompts.prompts)
    return f"{count:,} prompt{'s' * (count != 1)} of {prompts.path}, read as {prompts.form}"


def _command(context: typer.Context, told: RunOptions) -> str:
    """The command that begins such a run, without what is as it is by default."""
    settled = {name: getattr(told, field) for field, name in _SETTLED.items()}
    words = [*_beginning(context), "--model", settled.pop("model"), *_words(context, settled, settled)]
    if told.text.served is not None:
        words += _words(context, _SERVED, asdict(told.text.served))
    return shlex.join([*words, *_words(context, _OF_MACHINE, context.params)])


def _beginning(context: typer.Context) -> list[str]:
    return ["draftwerk", "train-drafter", "--out", str(context.params["out"])]


def _words(context: typer.Context, names: Iterable[str], values: Mapping[str, Any]) -> list[str]:
    """The options of these names as they are given on the command line, without what is as it is by default."""
    flags, words = options.flags(context), []
    for name in names:
        if values[name] not in (None, flags[name].default):
            words += [flags[name].opts[0], *([] if values[name] is True else [f"{values[name]}"])]
    return words


@contextmanager
def _saying_how_to_go_on(context: typer.Context) -> Iterator[None]:
    """Turns what ends the command into one line: what the run had written before is still there.

    Raises:
        CommandError: a file cannot be written or read, or the user interrupts at once.
    """
    from draftwerk.training.errors import WriteError

    try:
        yield
    except BrokenPipeError:
        raise  # no file of the run
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; go on with: {_going_on(context)}", exit_code=130) from None
    except (OSError, WriteError) as error:
        what = str(error) if isinstance(error, WriteError) else file_error(error)
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        raise CommandError(f"{what}; {remedy} and go on with: {_going_on(context)}") from None


@contextmanager
def _stopping(display: TrainingDisplay) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, or the SIGTERM of a scheduler; the next one ends the command at once."""
    stop = threading.Event()

    def ask(_: int, __: FrameType | None) -> None:
        stop.set()
        restore()
        display.say("stopping as soon as what was done can be gone on with (Ctrl-C again: at once)")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
