"""The engine as Python sees it: load a model, generate from many prompts at once, stream, cancel."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

from draftwerk import _core
from draftwerk.acceptance import MODEL_DRAFTERS, AcceptanceWatch
from draftwerk.acceptance_causes import Evidence, quantisation, turn_marker
from draftwerk.conversation import Conversation
from draftwerk.devices import find_gpu
from draftwerk.dispatcher import Dispatcher
from draftwerk.drafters import Drafter, choose_drafters
from draftwerk.generation import Generation, Stream
from draftwerk.loading import ChatTemplate, ChatTemplateError, Checkpoint, Tokenizer, shipped_drafter
from draftwerk.memory import available_memory, parse_size
from draftwerk.output_text import OutputText
from draftwerk.requests import (
    Chat,
    Message,
    Prompt,
    RequestError,
    SamplingParams,
    native_request,
    stop_bytes,
    template_variables,
    token_id_list,
    unread_limit,
)
from draftwerk.results import Chunk, Completion
from draftwerk.weights import Progress, fingerprint, load_model, open_model

_GREEDY = SamplingParams()
_GIB = 1 << 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineInfo:
    """What was loaded, and onto what."""

    model: str
    architecture: str
    backend: str
    """Such as "cpu avx512, 2 threads"."""
    drafter: str
    """Such as "lookup", "mtp+lookup" or "none"."""
    weight_bytes: int
    """Of the model and its drafter, in memory."""
    kv_memory_bytes: int
    max_context: int
    max_draft_length: int
    """Most drafts per step and sequence: a step brings one token more, if all are accepted."""
    vocab_size: int
    end_token_ids: tuple[int, ...]
    """Generation ends at any of them, unless a request ignores them."""
    fingerprint: int
    """64 bits that identify the model as it computes: where it is equal, equal requests have equal outputs. Made from
    samples of the weights; see draftwerk.weights.fingerprint."""


class Engine:
    """Generates text with one model. Safe to use from many threads and tasks at once.

    Args:
        model: a directory in Hugging Face form, a GGUF file, a built-in name, or an opened checkpoint.
        drafter: "auto" (the MTP drafter next to the model or of a built-in one, if there is one, and lookup),
            "lookup", "none", "random" (for tests: drafts are noise), or the directory, GGUF file or hub name of an MTP
            drafter. Never changes the output, only the speed.
        lookup: whether an MTP drafter has lookup beside it.
        device: where it computes: "cpu", "cuda" (the first GPU), "cuda:N", or "auto" (the first GPU if there is one).
        threads: kernel threads of the processor; 0 uses every core this process may run on.
        kv_memory: most bytes for the KV cache, or a size such as "512MiB"; the processor's memory is taken as the cache
            fills. Default: 1 GiB, or a quarter of the free memory if that is less; on a GPU what `gpu_memory_fraction`
            leaves.
        gpu_memory_fraction: share of a GPU's memory that may be in use, weights, KV cache and other processes together.
        weights: "auto" keeps the checkpoint's types; "int8", "int4", "fp8", "f32", "f16", "bf16" convert float matrices
            on loading, those of an MTP drafter too.
        draft_length: drafts per step; None lets the measured costs decide.
        max_draft_length: at most this many drafts per step and sequence.
        max_sequences: sequences that run at the same time; more wait in the queue.
        max_step_rows: most rows (prompt tokens, last tokens and drafts) of one pass of the model.
        prefill_chunk: most prompt tokens of one pass; default: max_step_rows.
        max_queued_tokens: prompt tokens that may wait; beyond that submit() raises QueueFull.
        max_context: longest sequence; default: the model's.
        full_head: compute all logits of every step. By default those that cannot be chosen are left out on the
            processor, where nothing but temperature, top_k, top_p and min_p matters; the tokens are the same.
        prefix_cache: keep the keys and values of finished prompts for requests that begin alike.
        progress: called while loading with (what, bytes done, bytes in all).

    Raises:
        CheckpointError: the model cannot be loaded; says which file, which tensor and why.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Checkpoint,
        *,
        drafter: Drafter = "auto",
        lookup: bool = True,
        device: str = "auto",
        threads: int = 0,
        kv_memory: int | str | None = None,
        gpu_memory_fraction: float = 0.9,
        weights: str = "auto",
        draft_length: int | None = None,
        max_draft_length: int = 16,
        max_sequences: int = 64,
        max_step_rows: int = 512,
        prefill_chunk: int | None = None,
        max_queued_tokens: int = 1 << 20,
        max_context: int | None = None,
        full_head: bool = False,
        prefix_cache: bool = True,
        progress: Progress | None = None,
    ) -> None:
        if draft_length is not None and not 0 <= draft_length <= max_draft_length:
            raise ValueError(f"draft_length = {draft_length}: must be 0 to max_draft_length = {max_draft_length}")
        gpu = find_gpu(device)
        checkpoint = model if isinstance(model, Checkpoint) else open_model(model, progress)
        self._tokenizer = checkpoint.tokenizer
        self._chat_template = checkpoint.chat_template
        # Before the weights are read: what does not fit fails at once.
        drafters = choose_drafters(drafter, checkpoint, lookup=lookup)
        core_model = load_model(
            checkpoint,
            weights=weights,
            gpu=gpu,
            threads=threads,
            max_step_rows=max_step_rows,
            full_head=full_head,
            progress=progress,
        )
        mtp = drafters.load(checkpoint, core_model, weights=weights, progress=progress)
        model_fingerprint = fingerprint(checkpoint, weights, core_model.description.partition(",")[0])

        options = _core.EngineOptions()
        options.drafters = list(drafters.names)
        options.draft_length = -1 if draft_length is None else draft_length
        options.max_draft_length = max_draft_length
        options.kv_memory_bytes = _kv_memory_bytes(kv_memory, core_model.memory, gpu_memory_fraction)
        if core_model.memory is None:  # on a GPU it is allocated, and that fails
            _warn_of_kv_memory(options.kv_memory_bytes, available_memory())
        options.max_sequences = max_sequences
        options.prefill_chunk = prefill_chunk or max_step_rows
        options.max_queued_tokens = max_queued_tokens
        options.max_context = max_context or checkpoint.config.max_position_embeddings
        options.prefix_cache = prefix_cache
        options.eos_token_ids = list(checkpoint.eos_token_ids)

        token_bytes = None if self._tokenizer is None else self._tokenizer.token_bytes_table()
        native = _core.Engine(core_model, options, token_bytes, mtp=mtp, synthetic=drafters.native_synthetic())
        self._dispatcher = Dispatcher(native)
        # Runs at garbage collection or at exit: the native threads must not outlive the interpreter.
        self._finalizer = weakref.finalize(self, self._dispatcher.close)
        self.info = EngineInfo(
            model=checkpoint.name,
            architecture=checkpoint.config.architecture,
            backend=core_model.description,
            drafter=drafters.description,
            weight_bytes=core_model.weight_bytes + (0 if mtp is None else mtp.weight_bytes),
            kv_memory_bytes=options.kv_memory_bytes,
            max_context=options.max_context,
            max_draft_length=max_draft_length,
            vocab_size=checkpoint.config.vocab_size,
            end_token_ids=tuple(checkpoint.eos_token_ids),
            fingerprint=model_fingerprint,
        )
        evidence = None
        if drafters.assistant is not None and not set(MODEL_DRAFTERS).isdisjoint(drafters.names):
            made_for_these_weights = shipped_drafter(checkpoint.path) == Path(drafters.assistant.path)
            evidence = Evidence(
                target=checkpoint.name,
                drafter=drafters.assistant.name,
                made_for=drafters.assistant.base_model,
                quantised=None if made_for_these_weights else quantisation(weights, checkpoint.weight_types),
                turn_marker=turn_marker(self, checkpoint.bos_token_id),
            )
        self._acceptance = AcceptanceWatch(
            lambda: cast("Mapping[str, Any]", native.stats()["drafters"]), evidence, draft_length=draft_length
        )

    # --- generating --------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams = _GREEDY,
        *,
        conversation: Conversation | None = None,
        continues: bool = False,
        max_unread_tokens: int | None = None,
    ) -> Generation:
        """Starts one request and returns at once.

        Args:
            conversation: starts from what its last request left, where the prompt begins with the same tokens.
            continues: it goes on with what was accepted before, and is not refused because too much is waiting.
            max_unread_tokens: the request pauses once more than this many tokens were delivered and not read yet, and
                goes on when all are read. None: it never pauses.

        Raises:
            RequestError: the request names something out of range.
            QueueFull: too much is waiting already.
            EngineClosed: the engine was closed.
            EngineFailed: see `failure`.
        """
        prompt_ids = self.encode_prompt(prompt)
        request = native_request(prompt_ids, params)
        if conversation is not None:
            if conversation.closed or not conversation.belongs_to(self._dispatcher):
                raise RequestError("conversation", conversation, "an open one of this engine")
            request.conversation = conversation.id
        request.continues = continues
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", list(params.stop), "empty: this checkpoint has no tokenizer")
        text = None
        if self._tokenizer is not None:
            text = OutputText(self._tokenizer, stop_bytes(params.stop), special_tokens=params.special_tokens)
        on_end = self._acceptance.request_ended if params.drafting else None
        generation = Generation(self._dispatcher, tuple(request.prompt), text, unread_limit(max_unread_tokens), on_end)
        self._dispatcher.submit(request, generation)
        if params.drafting:
            self._acceptance.request_submitted(prompt_ids, params.temperature)
        return generation

    def conversation(self) -> Conversation:
        """Opens a conversation: requests submitted with it, one after the other, compute only what is new.

        Raises:
            EngineClosed: the engine was closed.
        """
        return Conversation(self._dispatcher)

    @overload
    def generate(
        self, prompt: str | Sequence[int] | Sequence[Message] | Chat, params: SamplingParams = ...
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[list[Message]] | list[Chat] | list[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = ...,
    ) -> list[Completion]: ...

    def generate(
        self, prompt: Any, params: SamplingParams | Sequence[SamplingParams] = _GREEDY
    ) -> Completion | list[Completion]:
        """Generates from one prompt, or from a list of prompts at the same time.

        Args:
            prompt: text, token ids or chat messages (a list of them, or a Chat); or a list of these.
            params: for all prompts, or one for each.
        """
        if not _is_batch(prompt):
            return self._wait([self.submit(prompt, cast(SamplingParams, params))])[0]
        return self._wait(self._submit_all(prompt, params))

    def stream(self, prompt: Prompt, params: SamplingParams = _GREEDY) -> Stream:
        """Generates from one prompt, step by step. Leaving the loop early cancels the request."""
        return Stream(self.submit(prompt, params))

    async def agenerate(self, prompt: Prompt, params: SamplingParams = _GREEDY) -> Completion:
        """generate() of one prompt, for asyncio. Cancelling the task cancels the request."""
        return await self.submit(prompt, params).aresult()

    async def astream(self, prompt: Prompt, params: SamplingParams = _GREEDY) -> AsyncIterator[Chunk]:
        """stream() for asyncio. Cancelling the task or leaving the loop cancels the request."""
        generation = self.submit(prompt, params)
        try:
            async for chunk in generation:
                yield chunk
        finally:
            generation.cancel()

    # --- tokens ------------------------------------------------------------------------------------------------

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint came with one; without it prompts are token ids and completions have no text."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be chat messages."""
        return self._tokenizer is not None and self._chat_template is not None

    @property
    def has_thinking(self) -> bool:
        """Whether the chat template knows Chat.enable_thinking."""
        return self._template_reads("enable_thinking")

    @property
    def has_tools(self) -> bool:
        """Whether the chat template knows Chat.tools."""
        return self._template_reads("tools")

    def tokenize(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of a text, <bos> first unless `add_bos` is False."""
        tokenizer = self._tokenizer_for("prompt", repr(text[:40]))
        try:
            return tokenizer.encode(text, add_bos=add_bos)
        except ValueError as error:
            raise RequestError("prompt", repr(text[:40]), f"valid Unicode text: {error}") from None

    def detokenize(self, token_ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of token ids; control tokens have none, or with `special_tokens` their names."""
        tokenizer = self._tokenizer_for("token_ids", "given", "absent")
        return tokenizer.decode(token_id_list("token_ids", token_ids), skip_special_tokens=not special_tokens)

    def token_bytes(self, token_ids: Sequence[int], *, special_tokens: bool = False) -> list[bytes]:
        """For each token the bytes that it stands for: of control tokens none, or with `special_tokens` their names."""
        tokenizer = self._tokenizer_for("token_ids", "given", "absent")
        ids = token_id_list("token_ids", token_ids)
        if not special_tokens:
            return list(map(tokenizer.token_bytes, ids))
        special = tokenizer.special_ids
        return [tokenizer.piece_of(i).encode() if i in special else tokenizer.token_bytes(i) for i in ids]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for."""
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if isinstance(prompt, Chat):
            return self._encode_chat("prompt", prompt)
        if isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            return self._encode_chat("prompt", Chat(cast("Sequence[Message]", prompt)), messages="prompt")
        return token_id_list("prompt", prompt)

    def render_chat(self, chat: Chat) -> str:
        """The text that the chat template writes for a chat; encode_prompt() gives its tokens.

        Raises:
            RequestError: there is no chat template, or it refuses the chat, or has no use for part of it.
        """
        return self._render_chat("prompt", chat, "prompt.messages")

    def continue_chat(self, token_ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """The tokens to append to a sequence that is no chat, so that these messages follow.

        They are as the chat template writes them behind an answer of the model, which the end of the sequence is taken
        for. It is closed first, as far as it is not closed already (an answer that ended with <end_of_turn> has that
        token), and the beginning of the next answer comes last. What is a chat from its beginning is better encoded
        anew, with the answer as a message: templates may write earlier turns otherwise than they were generated.

        Args:
            token_ids: the sequence so far. Empty: `messages` begin a chat.
            messages: at least one.

        Raises:
            RequestError: there is no chat template, or it does not write these messages behind what was said before.
        """
        chat = Chat(messages)
        if len(token_ids) == 0 or len(messages) == 0:
            return self._encode_chat("messages", chat, messages="messages")
        template = self._template("messages")
        try:
            closing, text = template.after_answer(_plain("messages", messages))
        except ChatTemplateError as error:
            raise RequestError("messages", "given", f"such that they can follow an answer: {error}") from None
        following, closing_ids = self.tokenize(text, add_bos=False), self.tokenize(closing, add_bos=False)
        for there in range(len(closing_ids), 0, -1):
            if following[:there] == closing_ids[:there] == list(token_ids[-there:]):
                return following[there:]
        return following

    def _template(self, field: str) -> ChatTemplate:
        if self._chat_template is None:
            raise RequestError(field, "chat messages", "text or token ids: this checkpoint has no chat template")
        self._tokenizer_for(field, "chat messages")
        return self._chat_template

    def _template_reads(self, variable: str) -> bool:
        return self._chat_template is not None and variable in self._chat_template.variables

    def _encode_chat(self, field: str, chat: Chat, *, messages: str | None = None) -> list[int]:
        text = self._render_chat(field, chat, messages or f"{field}.messages")
        return self.tokenize(text, add_bos=False)  # the template writes <bos> itself

    def _render_chat(self, field: str, chat: Chat, messages: str) -> str:
        """What the chat template writes.

        Args:
            field: where the chat is, for errors.
            messages: where its messages are.
        """
        template = self._template(field)
        if isinstance(chat.messages, (str, bytes)) or not isinstance(chat.messages, Sequence) or not chat.messages:
            raise RequestError(messages, repr(chat.messages), "at least one message")
        variables = template_variables(field, chat, template.variables, template.special_tokens)
        try:
            return template.render(
                _plain(messages, chat.messages), tools=list(map(dict, chat.tools)) or None, **variables
            )
        except ChatTemplateError as error:
            raise RequestError(messages, "chat messages", f"as the chat template wants it: {error}") from None

    def _tokenizer_for(self, field: str, value: str, instead: str = "token ids") -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(field, value, f"{instead}: this checkpoint has no tokenizer")
        return self._tokenizer

    # --- the engine itself -------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Figures of the engine since it was started: steps, rows, drafts, pages, prefix hits, time per phase.

        Of each drafter ("drafters", by name) also "recent", figures of its last 512 to 1,023 rounds, or of all if there
        were fewer (a round is what it drafts for one sequence in one step), and "warning": None, or why it is of no use
        (draftwerk.acceptance.AcceptanceWarning.as_dict()).
        """
        stats = self._dispatcher.core.stats()
        warnings = self._acceptance.look(stats["drafters"])
        for name, figures in stats["drafters"].items():
            figures["warning"] = warnings[name].as_dict() if name in warnings else None
        return stats

    def deliver_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Lets an event loop take the engine's events itself: one wake-up per engine step, and no thread in between.

        To be called on that loop, which has to run from then on for as long as requests do; other threads may go on
        submitting and waiting. On the loop's own thread only `async for` and `aresult` can wait. Once the loop was
        closed, the next submit() goes on without it.

        Raises:
            RuntimeError: called from elsewhere.
            EngineClosed: the engine was closed.
        """
        self._dispatcher.deliver_on(loop)

    @property
    def failure(self) -> str:
        """Why the device computes nothing any more; empty as long as it does.

        What was running then ends with GenerationError, and what is submitted afterwards with EngineFailed.
        """
        return self._dispatcher.core.failure()

    @property
    def step_seconds(self) -> float:
        """Seconds since the step began that is being made; 0 while none is. It keeps growing where a device hangs."""
        return self._dispatcher.core.step_seconds()

    def when_failed(self, tell: Callable[[str], None] | None) -> None:
        """Calls `tell` with that reason once there is one: on the event loop or thread that brings the tokens, or at
        once if the device has failed already. None: nobody is told."""
        self._dispatcher.when_failed(tell)

    def close(self) -> None:
        """Stops the engine and frees its memory. Requests that still run end with EngineClosed."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Generation]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError("params", f"{len(each)} values", f"one value, or one for each of {len(prompts)} prompts")
        generations: list[Generation] = []
        try:
            for prompt, its_params in zip(prompts, each, strict=True):
                generations.append(self.submit(prompt, its_params))
        except BaseException:
            _cancel_all(generations)
            raise
        return generations

    def _wait(self, generations: list[Generation]) -> list[Completion]:
        try:
            return [generation.result() for generation in generations]
        except BaseException:  # also Ctrl-C: nobody will read the others
            _cancel_all(generations)
            raise


def _cancel_all(generations: list[Generation]) -> None:
    for generation in generations:
        generation.cancel()


def _plain(field: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"{field}[{i}]", repr(message), "a chat message: a mapping with role and content")
    return [dict(message) for message in messages]


def _is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts: its first element is a prompt, not a token id or a message."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) == 0 or isinstance(prompt[0], (str, Sequence, Chat))


def _kv_memory_bytes(kv_memory: int | str | None, of_gpu: tuple[int, int] | None, fraction: float) -> int:
    """Bytes of the KV cache. `of_gpu`: (free, total) bytes of a GPU's memory, with the weights in it."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"gpu_memory_fraction = {fraction}: must be more than 0 and at most 1")
    if kv_memory is None:
        if of_gpu is None:
            return min(1 << 30, available_memory() // 4)
        free, total = of_gpu
        left = free - int((1.0 - fraction) * total)
        if left <= 0:
            raise ValueError(
                f"gpu_memory_fraction = {fraction}: with the weights loaded, {(total - free) / 1e9:.1f} of the GPU's "
                f"{total / 1e9:.1f} GB are in use, which leaves nothing for a KV cache"
            )
        return left
    size = parse_size(kv_memory) if isinstance(kv_memory, str) else int(kv_memory)
    if size <= 0:
        raise ValueError(f"kv_memory = {kv_memory}: must be more than 0 bytes")
    return size


def _warn_of_kv_memory(size: int, available: int) -> None:
    """Says that a KV cache of `size` bytes does not fit into what is available with the weights loaded.

    No error: the memory is only taken as the cache fills, so who knows that it never will may promise more.
    """
    if size > available:
        _log.warning(
            "the KV cache may grow to %.1f GiB, and with the weights loaded %.1f GiB of memory are available: as it "
            "fills, the process may be ended for lack of memory; kv_memory = %.1fGiB fits",
            size / _GIB,
            available / _GIB,
            math.floor(available / _GIB * 10) / 10,
        )
