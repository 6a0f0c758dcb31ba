"""Chat templates: the environment transformers gives them, sandboxed."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest

import chat_templates
from draftwerk.loading import ChatTemplate, ChatTemplateError

# In the manner of Gemma 3's own template: a system message goes in front of the first user message.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b>&\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": [{"type": "text", "text": "Bye."}]},
]


def test_renders_a_conversation_as_gemma_was_trained() -> None:
    template = ChatTemplate(GEMMA, {"bos_token": "<bos>"})
    expected = (
        "<bos><start_of_turn>user\nBe brief.\n\nHi <b>&<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye.<end_of_turn>\n"
    )
    assert template.render(CONVERSATION, add_generation_prompt=False) == expected
    assert template.render(CONVERSATION) == expected + "<start_of_turn>model\n"


@pytest.mark.parametrize(
    "source",
    [
        GEMMA,
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U\n    {% endif %}\n{% endfor %}\nend\n",
        "{{ messages | tojson }} {{ tools | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% generation %}a{{ messages | length }}{% endgeneration %}b",
        "{{ flag }}{{ missing }}{{ tools is none }}",
    ],
)
def test_agrees_with_transformers(source: str) -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [{"type": "function", "function": {"name": "größe", "description": "<&>"}}]
    extra = {"bos_token": "<bos>", "flag": True}
    for given in (None, tools):
        (expected,), _ = chat.render_jinja_template(
            [CONVERSATION], tools=given, chat_template=source, add_generation_prompt=True, **extra
        )
        assert ChatTemplate(source, {"bos_token": "<bos>"}).render(CONVERSATION, tools=given, flag=True) == expected


def test_a_refused_conversation_says_why() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        ChatTemplate(GEMMA).render([{"role": "assistant", "content": "x"}])


# In the manner of Gemma 4's: other markers, a system turn of its own, any order of roles.
GEMMA_4 = """{{ bos_token }}
{%- for message in messages -%}
    {{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- message.content | trim + '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""


@pytest.mark.parametrize(
    ("source", "closing", "text"),
    [
        (GEMMA, "<end_of_turn>\n", "<start_of_turn>user\nBye.<end_of_turn>\n<start_of_turn>model\n"),
        (GEMMA_4, "<turn|>\n", "<|turn>user\nBye.<turn|>\n<|turn>model\n"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:", None, None),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "]", "[Bye.]"),
    ],
)
def test_what_follows_an_answer(source: str, closing: str | None, text: str | None) -> None:
    template = ChatTemplate(source, {"bos_token": "<bos>"})
    messages = [{"role": "user", "content": "Bye."}]
    if closing is None:  # it writes "assistant:" always, so what it wrote is not what a longer conversation begins with
        with pytest.raises(ChatTemplateError, match="changes what stands before"):
            template.after_answer(messages)
    else:
        assert template.after_answer(messages) == (closing, f"{closing}{text}")


def test_a_continued_conversation_is_the_whole_one() -> None:
    for source in (GEMMA, GEMMA_4):
        template = ChatTemplate(source, {"bos_token": "<bos>"})
        turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
        more = [*turns, {"role": "user", "content": " AnswerOfTheModel "}]
        assert template.render(turns[:1]) + "Two" + template.after_answer(more[2:])[1] == template.render(more)
        several = [{"role": "user", "content": "Three"}, *more[1:]]
        assert template.render(turns[:1]) + "Two" + template.after_answer(several)[1] == template.render(
            [*turns, *several]
        )


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ messages[-1].content }}", "changes what stands before"),  # the last message only
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "not write the model's answers"),
        ("{% for m in messages | reverse %}<{{ m.content }}>{% endfor %}", "changes what stands before"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "not write the model's answers"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "not write the model's answers"),
        # Thinking of all answers but the last is taken out, by a template that takes the answer for that.
        (
            "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "changes",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changes what stands before"),
        ("{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}", "one at a time"),
        (GEMMA.replace("'user'", "'guest'"), "roles must alternate"),
    ],
)
def test_a_template_that_rewrites_is_refused(source: str, why: str) -> None:
    with pytest.raises(ChatTemplateError, match=why):
        ChatTemplate(source).after_answer([{"role": "user", "content": "Bye."}])


def test_messages_that_belong_to_the_beginning_are_refused() -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bye."}]
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        ChatTemplate(GEMMA).after_answer(system)
    first = "{% for m in messages | sort(attribute='role', reverse=true) %}<{{ m.content }}>{% endfor %}"
    with pytest.raises(ChatTemplateError, match="changes what stands before"):
        ChatTemplate(first).after_answer([{"role": "z", "content": "Be brief."}])


def test_the_date_is_at_hand() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.datetime }}",
        "{{ messages.append(1) }}",
        "{{ 'x'.format.__self__.__class__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% nonsense %}", "{% for x in y %}", "{% generation %}"])
def test_a_text_that_is_no_template(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        ChatTemplate(source)


# --- thinking and tools --------------------------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "Weather in Oslo?"}
CALLING = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Ask.",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
CALL_TEXT = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
RESULT_TEXT = '<|tool_response>response:weather{value:<|"|>rain<|"|>}<tool_response|>'


def gemma_4() -> ChatTemplate:
    return ChatTemplate(chat_templates.GEMMA_4, {"bos_token": "<bos>"})


def test_the_variables_that_a_template_reads() -> None:
    everywhere = {"messages", "add_generation_prompt", "bos_token"}
    assert everywhere <= ChatTemplate(GEMMA).variables
    assert not {"enable_thinking", "tools", "raise_exception", "message"} & ChatTemplate(GEMMA).variables
    assert gemma_4().variables == {*everywhere, "enable_thinking", "tools"}
    assert ChatTemplate("{% set x = 1 %}{{ x }}{{ raise_exception('a') if y }}{{ range(3) | list }}").variables == {"y"}


def test_a_template_is_told_to_think_or_not() -> None:
    begin, question = "<bos>", "<|turn>user\nWeather in Oslo?<turn|>\n<|turn>model\n"
    assert gemma_4().render([QUESTION]) == f"{begin}{question}<|channel>thought\n<channel|>"
    assert gemma_4().render([QUESTION], enable_thinking=True) == f"{begin}<|turn>system\n<|think|>\n<turn|>\n{question}"


def test_a_call_and_its_result_are_one_turn() -> None:
    rendered = gemma_4().render([QUESTION, CALLING, RESULT], tools=[chat_templates.WEATHER], enable_thinking=True)
    assert "<|tool>weather{description:" in rendered
    assert rendered.endswith(f"<|turn>model\n<|channel>thought\nAsk.\n<channel|>{CALL_TEXT}{RESULT_TEXT}")
    answered = [QUESTION, CALLING, RESULT, {"role": "assistant", "content": "Rain."}]
    rendered = gemma_4().render([*answered, QUESTION], enable_thinking=True)
    assert f"<|turn>model\n{CALL_TEXT}{RESULT_TEXT}Rain.<turn|>\n<|turn>user" in rendered, "thoughts are dropped"


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"function": {"name": "weather", "arguments": {"city": "Oslo"}}},
    ],
)
def test_arguments_may_be_json_text_as_with_openai(call: dict[str, Any]) -> None:
    rendered = gemma_4().render([QUESTION, {**CALLING, "tool_calls": [call]}, RESULT])
    assert f"{CALL_TEXT}{RESULT_TEXT}" in rendered


@pytest.mark.parametrize("arguments", ["no json", "[1]", "[" * 100_000, None, 5])
def test_arguments_that_are_no_json_object_are_the_templates_business(arguments: object) -> None:
    source = "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments }}{% endfor %}"
    call = {"function": {"name": "f", "arguments": arguments}}
    assert ChatTemplate(source).render([{**CALLING, "tool_calls": [call]}]) == str(arguments)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("read", ["reasoning", "reasoning_content"])
def test_thoughts_have_two_names(key: str, read: str) -> None:
    assert ChatTemplate(f"{{{{ messages[0].{read} }}}}").render([{"role": "assistant", key: "Hm."}]) == "Hm."


# In the manner of the first templates of Gemma 4: what a function returned is a part of the message that called it.
RESPONSES_IN_MESSAGE = """{%- for m in messages -%}
    {{- '[' + m.role + (':' + m.tool_calls[0].function.name if m.tool_calls else '') -}}
    {%- for r in m.tool_responses or [] -%}{{ '|' + r.name + '=' + r.response | string }}{%- endfor -%}
    {{- '|' + (m.content or '') + ']' -}}
{%- endfor -%}"""


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([QUESTION, CALLING, RESULT], "[assistant:weather|weather=rain|]"),
        ([QUESTION, CALLING, {**RESULT, "tool_call_id": "c2"}], "[assistant:weather|weather=rain|]"),
        ([QUESTION, CALLING, {"role": "tool", "content": {"t": 5}}], "[assistant:weather|unknown={'t': 5}|]"),
        ([QUESTION, CALLING, {**RESULT, "name": "of the call"}], "[assistant:weather|weather=rain|]"),
        ([QUESTION, CALLING, RESULT, RESULT], "[assistant:weather|weather=rain|weather=rain|]"),
        # The answer is part of the turn.
        ([CALLING, RESULT, {"role": "assistant", "content": "Rain."}], "[assistant:weather|weather=rain|Rain.]"),
        ([CALLING, RESULT, CALLING], "[assistant:weather|weather=rain|][assistant:weather|]"),
        (
            [{**CALLING, "content": "Look:"}, RESULT, {"role": "assistant", "content": "Rain."}],
            "[assistant:weather|weather=rain|Look:][assistant|Rain.]",
        ),
        ([CALLING, RESULT, QUESTION], "[assistant:weather|weather=rain|][user|Weather in Oslo?]"),
        # Nothing to move.
        (
            [{**CALLING, "tool_responses": [{"name": "f", "response": 1}]}, RESULT],
            "[assistant:weather|f=1|][tool|rain]",
        ),
        ([QUESTION, RESULT], "[tool|rain]"),
    ],
)
def test_results_are_put_where_the_template_looks_for_them(messages: list[dict[str, Any]], expected: str) -> None:
    given = copy.deepcopy(messages)
    rendered = ChatTemplate(RESPONSES_IN_MESSAGE).render(messages)
    assert rendered.removeprefix("[user|Weather in Oslo?]") == expected
    assert messages == given, "the messages are the caller's"


def test_a_template_that_knows_messages_of_tools_gets_them_unless_they_are_structured() -> None:
    both = RESPONSES_IN_MESSAGE + "{# tool_call_id #}"
    assert ChatTemplate(both).render([CALLING, RESULT]) == "[assistant:weather|][tool|rain]"
    structured = {**RESULT, "content": {"t": 5}}
    assert ChatTemplate(both).render([CALLING, structured]) == "[assistant:weather|weather={'t': 5}|]"
    # This one would not find them anywhere else.
    assert ChatTemplate(GEMMA_4).render([{**CALLING, "content": "x"}, RESULT], add_generation_prompt=False) == (
        "<|turn>model\nx<turn|>\n<|turn>tool\nrain<turn|>\n"
    )
