"""Chat templates: the environment transformers gives them, sandboxed."""

from __future__ import annotations

import datetime

import pytest

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
