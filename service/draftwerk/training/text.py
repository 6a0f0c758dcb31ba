"""The target writes the text that its drafter learns from, with the engine that will serve it.

A text is determined by the model, its prompt, its sampling and its seed alone: that is the engine's promise. So which
texts are computed together, and when, makes no difference to them, and a run that was killed goes on with the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from draftwerk.in_flight import keep_in_flight
from draftwerk.requests import SamplingParams
from draftwerk.training.atomic_file import atomic_file, remove_leftovers
from draftwerk.training.errors import TrainingError
from draftwerk.training.openings import Openings
from draftwerk.training.prompts import PromptsFile, TextPrompt, check_prompts, encode_prompt
from draftwerk.training.repetition import LoopWatch
from draftwerk.training.sampling import Sampling
from draftwerk.training.shards import ENDS, Shard, Text, count_shards, write_shard

if TYPE_CHECKING:
    from draftwerk.engine import Engine

_FORMAT = 2  # in the first one, prompts that came again were set aside and written from
_MANIFEST = "text.json"
_LONG_SHARE = 1 / 8  # of the texts may become _LONG times as long, so that the drafter sees what lies beyond windows
_LONG = 3


@dataclass(frozen=True)
class SamplingKind:
    """A way to sample that some texts have.

    Attributes:
        share: of the texts, 0 to 1.
        sampling: how.
    """

    share: float
    sampling: Sampling


_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
_WARM = Sampling(temperature=0.7, top_k=0, top_p=1.0)

# The surer a model is of itself, the sooner it goes round in circles and is cut: of 1,280 texts of gemma-3-270m a third
# were greedy (some prompts had been continued so before), and they held 11% of the 254,384 tokens.
KINDS = (
    SamplingKind(0.4, _GREEDY),
    SamplingKind(0.25, _WARM),
    SamplingKind(0.25, Sampling()),
    SamplingKind(0.1, Sampling(temperature=1.0, top_k=0, top_p=1.0)),
)


def kinds_of_texts(served: Sampling | None) -> tuple[SamplingKind, ...]:
    """How texts are sampled.

    Args:
        served: how the model will be; None: nobody knows, and usual ways take turns.

    Returns:
        With a kind that is not greedy behind one that is: see planned_texts().
    """
    if served is None:
        return KINDS
    if served.temperature == 0.0:
        return (SamplingKind(1.0, _GREEDY), SamplingKind(0.0, _WARM))
    return (SamplingKind(1.0, served),)


@dataclass(frozen=True)
class TextOptions:
    """How text is written.

    Attributes:
        seed: of everything that is chosen by chance, 0 to 2**63 - 1.
        max_tokens: most tokens that are generated for a text; one of eight may have three times as many.
        texts_per_shard: texts in a file. What is lost when a run is killed is at most one file's.
        streams: texts that are written at the same time. Makes no difference to them.
        served: how the model will be sampled from, and texts are therefore; None: by KINDS in turn.
    """

    seed: int = 0
    max_tokens: int = 512
    texts_per_shard: int = 256
    streams: int = 32
    served: Sampling | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seed", 0, 2**63 - 1),
            ("max_tokens", 1, 1 << 20),
            ("texts_per_shard", 1, 1 << 16),
            ("streams", 1, 1024),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise TrainingError(f"{name} = {value}: must be {least} to {most}")


@dataclass(frozen=True)
class PlannedText:
    """A text before it is written.

    Attributes:
        prompt_ids: what it begins with.
        kind: how it is sampled, an index into what kinds_of_texts() gives.
        params: the same as the engine takes it.
    """

    prompt_ids: tuple[int, ...]
    kind: int
    params: SamplingParams


def planned_texts(engine: Engine, options: TextOptions, prompts: PromptsFile | None = None) -> Iterator[PlannedText]:
    """Every text of a run, in order and without end.

    Prompts from a file come in an order of chance, and again in another one when all had their turn. A prompt is
    continued greedily once: a second time would give the same text.

    Raises:
        TrainingError: a prompt is too long for the model, or it has no chat template and prompts are chat messages.
    """
    source = _from_openings(options.seed, engine.has_chat_template) if prompts is None else _from_file(options, prompts)
    kinds = kinds_of_texts(options.served)
    shares = np.cumsum([kind.share for kind in kinds])
    greedy: set[tuple[int, ...]] = set()
    for index, prompt in enumerate(source):
        random = np.random.default_rng([options.seed, index, 1])
        kind = min(int(np.searchsorted(shares, random.random() * shares[-1], side="right")), len(kinds) - 1)
        length = options.max_tokens * (_LONG if random.random() < _LONG_SHARE else 1)
        seed = int(random.integers(2**63))
        prompt_ids = encode_prompt(engine, prompt, prompts)
        if kinds[kind].sampling == _GREEDY:
            # With nothing before it the model would write one and the same text.
            if len(prompt_ids) == 1 or prompt_ids in greedy:
                kind += 1
            greedy.add(prompt_ids)
        most = min(length, engine.info.max_context - len(prompt_ids))
        params = dataclasses.replace(kinds[kind].sampling.params, max_tokens=most, seed=seed)
        yield PlannedText(prompt_ids, kind, params)


def _from_openings(seed: int, chat: bool) -> Iterator[TextPrompt]:
    openings = Openings()
    index = 0
    while True:
        yield openings.draw(np.random.default_rng([seed, index, 0]), chat=chat)
        index += 1


def _from_file(options: TextOptions, prompts: PromptsFile) -> Iterator[TextPrompt]:
    turn = 0
    while True:
        for index in np.random.default_rng([options.seed, turn, 2]).permutation(len(prompts.prompts)):
            yield prompts.prompts[index]
        turn += 1


@dataclass(frozen=True)
class TextProgress:
    """How far the writing of a shard is: texts that are done, of how many, and tokens generated so far."""

    texts: int
    of: int
    tokens: int


class TextWriter:
    """Writes the texts of a run to a directory, shard by shard; goes on where an earlier one stopped.

    Args:
        engine: of the target.
        directory: made if need be.
        options: have to be those with which the text in the directory was begun, `streams` aside.
        prompts: what the texts begin with; None: the built-in openings.

    Raises:
        TrainingError: the directory holds other text; a prompt cannot be used.
        OSError: the directory cannot be written.
    """

    def __init__(
        self, engine: Engine, directory: Path, options: TextOptions, prompts: PromptsFile | None = None
    ) -> None:
        if not engine.has_tokenizer:
            raise TrainingError(f"{engine.info.model} has no tokenizer, and writing text needs one")
        self._engine = engine
        self._directory = directory
        self._options = options
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        if prompts is not None:
            check_prompts(engine, prompts)
        self.identity = self._settle_manifest(prompts)
        """Digest of all that determines the text."""
        self.shards = count_shards(directory)
        """How many shards there are."""
        self._plan = planned_texts(engine, options, prompts)
        for _ in range(self.shards * options.texts_per_shard):
            next(self._plan)

    def write_shard(
        self,
        on_progress: Callable[[TextProgress], None] = lambda _: None,
        on_texts: Callable[[Shard], None] = lambda _: None,
        write: Callable[[Callable[[], object]], object] = lambda writes: writes(),
    ) -> None:
        """Writes the next shard.

        Args:
            on_progress: told how far it is.
            on_texts: told of the texts when they are done, before there is a file of them.
            write: calls what writes that file; may do so again if it fails.

        Raises:
            OSError: the disk is full, for instance; the shards before it stay.
        """
        plans = [next(self._plan) for _ in range(self._options.texts_per_shard)]
        shard = Shard.of(asyncio.run(self._generate_all(plans, on_progress)))
        on_texts(shard)
        write(partial(write_shard, self._directory, self.shards, shard))
        self.shards += 1

    async def _generate_all(self, plans: list[PlannedText], on_progress: Callable[[TextProgress], None]) -> list[Text]:
        self._engine.deliver_on(asyncio.get_running_loop())
        texts: dict[int, Text] = {}
        # Those first that will take longest: a long text that is left over at the end has the machine to itself.
        order = sorted(range(len(plans)), key=lambda i: (-plans[i].params.max_tokens, -plans[i].kind))
        tokens: Counter[int] = Counter()

        async def write(index: int) -> None:
            texts[index] = await _generate(self._engine, plans[index])
            tokens[index] = len(texts[index].token_ids) - texts[index].prompt_length
            on_progress(TextProgress(len(texts), len(plans), tokens.total()))

        await keep_in_flight(min(self._options.streams, len(plans)), order, write)
        return [texts[index] for index in range(len(plans))]

    def _settle_manifest(self, prompts: PromptsFile | None) -> str:
        """Writes down what determines the text, or makes sure that it is what it was; its digest."""
        manifest = {
            "format": _FORMAT,
            "model": self._engine.info.model,
            "fingerprint": f"{self._engine.info.fingerprint:016x}",
            "seed": self._options.seed,
            "max_tokens": self._options.max_tokens,
            "texts_per_shard": self._options.texts_per_shard,
            "openings_sha256": Openings().sha256 if prompts is None else None,
            "prompts_sha256": None if prompts is None else prompts.sha256,
            "kinds": [
                {"name": str(kind.sampling), "share": kind.share, **asdict(kind.sampling)}
                for kind in kinds_of_texts(self._options.served)
            ],
        }
        data = json.dumps(manifest, indent=2).encode() + b"\n"
        digest = hashlib.sha256(data).hexdigest()
        path = self._directory / _MANIFEST
        if not path.exists():
            with atomic_file(path) as file:
                file.write(data)
            return digest
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise TrainingError(f"{path} is damaged ({error}): begin in another directory") from None
        for name, value in manifest.items():
            there = before.get(name) if isinstance(before, dict) else None
            if there != value:
                arithmetic = self._engine.info.backend.partition(",")[0]
                of = f" (of the model's weights, --weights and the instruction set: {arithmetic} here)"
                raise TrainingError(
                    f"{self._directory} holds text that was written with {name} = {there}, not {value}"
                    f"{of if name == 'fingerprint' else ''}: "
                    "go on with what it was begun with, or begin in another directory"
                )
        return digest


async def _generate(engine: Engine, plan: PlannedText) -> Text:
    watch = LoopWatch()
    generated: list[int] = []
    end = "length"
    generation = engine.submit(plan.prompt_ids, plan.params)
    try:
        async for chunk in generation:
            for token in chunk.token_ids:
                generated.append(token)
                kept = watch.push(token)
                if kept is not None:
                    return _text(plan, generated[:kept], "loop")
            if chunk.finish_reason == "stop":
                end = "end token"
    finally:
        generation.cancel()
    return _text(plan, generated, end)


def _text(plan: PlannedText, generated: list[int], end: str) -> Text:
    token_ids = np.array([*plan.prompt_ids, *generated], dtype=np.int32)
    return Text(token_ids, len(plan.prompt_ids), plan.kind, ENDS.index(end))
