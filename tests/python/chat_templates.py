"""A chat template with the features of Gemma 4's, and a checkpoint of bytes that knows its control tokens.

Like Gemma 4's it has a turn for the system, which declares functions and switches thinking on; drops the thoughts of
answers but for those of a turn that is not over; writes calls of functions and what they returned into the turn of the
model; and, where the model is not to think, begins the answer with an empty thought that later turns do not have.
"""

from __future__ import annotations

import numpy as np

from draftwerk.loading import ChatTemplate
from fake_checkpoint import BOS, ByteTokenizer, Config, FakeCheckpoint

GEMMA_4 = """
{%- macro data(value) -%}
    {%- if value is string -%}{{ '<|"|>' + value + '<|"|>' }}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key in value | sort -%}{{ key + ':' + data(value[key]) + ('' if loop.last else ',') }}{%- endfor -%}
        {{- '}' -}}
    {%- elif value is iterable -%}
        {{- '[' -}}
        {%- for item in value -%}{{ data(item) + ('' if loop.last else ',') }}{%- endfor -%}
        {{- ']' -}}
    {%- else -%}{{ value | tojson }}
    {%- endif -%}
{%- endmacro -%}
{%- macro without_thoughts(text) -%}
    {%- for part in text.split('<|channel>') -%}
        {{- part if loop.first else part.split('<channel|>')[1:] | join('<channel|>') -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set now = namespace(last_question=-1, in_turn=false) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set now.last_question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{ bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if system or tools or enable_thinking -%}
    {{- '<|turn>system\\n' + ('<|think|>\\n' if enable_thinking else '') + system | trim -}}
    {%- for tool in tools or [] -%}{{ '<|tool>' + tool.function.name + data(tool.function) + '<tool|>' }}{%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|tool_response>response:' + (message.name or 'unknown') + '{value:' + data(message.content) + '}' -}}
        {{- '<tool_response|>' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '' if now.in_turn else '<|turn>model\\n' -}}
        {%- if message.reasoning and message.tool_calls and loop.index0 > now.last_question -%}
            {{- '<|channel>thought\\n' + message.reasoning + '\\n<channel|>' -}}
        {%- endif -%}
        {{- without_thoughts(message.content or '') | trim -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<|tool_call>call:' + call.function.name + data(call.function.arguments) + '<tool_call|>' -}}
        {%- endfor -%}
        {%- set now.in_turn = message.tool_calls is defined -%}
        {{- '' if now.in_turn else '<turn|>\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- ('<turn|>\\n' if now.in_turn else '') + '<|turn>' + message.role + '\\n' + message.content | trim }}
        {{- '<turn|>\\n' -}}
        {%- set now.in_turn = false -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not now.in_turn -%}
    {{- '<|turn>model\\n' + ('' if enable_thinking else '<|channel>thought\\n<channel|>') -}}
{%- endif -%}
"""
"""tool_call_id is not read: messages of tools have to say their name."""

CONTROLS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>'),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
)
EOS, END_OF_TURN, TOOL_RESPONSE = (CONTROLS.index(name) for name in ("<eos>", "<turn|>", "<|tool_response>"))

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class ControlTokenizer(ByteTokenizer):
    """A token for each of CONTROLS, then one for each byte."""

    special_ids = frozenset(range(len(CONTROLS)))
    vocab_size = len(CONTROLS) + 256

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        ids = [BOS] * add_bos
        while text:
            name = next((name for name in CONTROLS if text.startswith(name)), None)
            ids += [len(CONTROLS) + byte for byte in text[0].encode()] if name is None else [CONTROLS.index(name)]
            text = text[len(name or " ") :]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - len(CONTROLS)]) if token_id >= len(CONTROLS) else b""

    def token_bytes_table(self) -> tuple[np.ndarray, bytes]:
        offsets = np.array([0] * len(CONTROLS) + list(range(257)), dtype=np.uint32)
        return offsets, bytes(range(256))

    def piece_of(self, token_id: int) -> str:
        return CONTROLS[token_id] if token_id < len(CONTROLS) else f"<0x{token_id - len(CONTROLS):02X}>"


def chats_like_gemma_4(checkpoint: FakeCheckpoint) -> None:
    """Gives a checkpoint all that makes Gemma 4 chat."""
    checkpoint.tokenizer = ControlTokenizer()
    checkpoint.chat_template = ChatTemplate(GEMMA_4, {"bos_token": "<bos>"})
    checkpoint.eos_token_ids = (EOS, END_OF_TURN, TOOL_RESPONSE)
    checkpoint.config = Config(vocab_size=ControlTokenizer.vocab_size)
