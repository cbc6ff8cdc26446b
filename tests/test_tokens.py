"""Templates, encoding, and the text that is certain."""
# ruff: noqa: E501 - chat templates as their models have them

from __future__ import annotations

import time
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from model.errors import BadInput, BadModel
from model.template import TEMPLATE_CHARS_MAX, ChatTemplate
from model.text import HELD_TOKENS_MAX, TextStream
from model.tokens import ENCODE_CHARS_MAX, Tokens
from tests.tiny_models import CHAT, LINES, byte_tokenizer, sentencepiece_tokenizer

FAMILIES = {"bytes": Tokens(byte_tokenizer()), "spaced": Tokens(sentencepiece_tokenizer())}
TEXTS = (*LINES, "a 🙂🙂 b", "x\n\n  y", "\ufffd", "ä" * 40, "👩‍👩‍👧" * 6)
HANG_S = 20.0


def stream_all(stream: TextStream, ids: tuple[int, ...]) -> tuple[list[str], str]:
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, ""
    return pieces, stream.finish()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_whole_and_never_in_broken_characters(family: str, text: str) -> None:
    tokens = FAMILIES[family]
    prompt = tokens.encode("Once upon a time")
    ids = tokens.encode(text)
    pieces, rest = stream_all(tokens.stream(prompt), ids)
    whole = "".join(pieces) + rest
    assert whole.lstrip(" ") == text.lstrip(" ")
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        assert rest == ""


def test_a_space_before_the_first_word_is_kept() -> None:
    """A decoder of this family drops the space at the start of a text; an answer is not the start."""
    tokens = FAMILIES["spaced"]
    ids = tokens.encode("Once upon a king")
    for split in range(1, len(ids)):
        pieces, rest = stream_all(tokens.stream(ids[:split]), ids[split:])
        assert tokens.decode(ids[:split]) + "".join(pieces) + rest == "Once upon a king"


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    ids=st.lists(st.integers(1, 319), max_size=60),
    prompt=st.lists(st.integers(1, 319), min_size=1, max_size=9),
    stop=st.lists(st.sampled_from(["e", " a", "\ufffd", "ab", "aba", "ünd", "国王", "\n"]), max_size=3),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_text_law(family: str, ids: list[int], prompt: list[int], stop: list[str], data: st.DataObject) -> None:
    """Text given by one peer up to a split, and by a second one behind it, is the text of one peer alone."""
    tokens = FAMILIES[family]
    ids = [min(i, tokens.size - 1) for i in ids]
    prompt = [min(i, tokens.size - 1) for i in prompt]
    pieces, rest = stream_all(tokens.stream(prompt, tuple(stop)), tuple(ids))
    whole = "".join(pieces) + rest
    split = data.draw(st.integers(0, len(pieces)))
    given_text = "".join(pieces[:split])
    second, second_rest = stream_all(tokens.stream(prompt, tuple(stop), len(given_text)), tuple(ids))
    assert given_text + "".join(second) + second_rest == whole
    assert "".join(second[:split]) == "", "nothing is given out twice"
    for text in stop:
        assert text not in whole


@given(ids=st.lists(st.integers(1, 319), max_size=80))
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_stream_equals_decode_for_byte_level(ids: list[int]) -> None:
    tokens = FAMILIES["bytes"]
    prompt = tokens.encode("The king")
    pieces, rest = stream_all(tokens.stream(prompt), tuple(ids))
    assert "".join(pieces) + rest == tokens.decode(ids)


def char_stream(stop: tuple[str, ...], skip: int = 0) -> TextStream:
    return TextStream(lambda ids: "".join(map(chr, ids)), [ord("|")], stop, skip)


@pytest.mark.parametrize(
    ("stop", "text", "pieces"),
    [
        (("END",), "abENDcd", ["a", "b", "", "", ""]),
        (("END",), "abENcd", ["a", "b", "", "", "ENc", "d"]),
        (("aab",), "aaab", ["", "", "a", ""]),
        (("abc", "b"), "xab", ["x", "", "a"]),
        (("abcd", "bx"), "abcx", ["", "", "", "abcx"]),
        (("\n\n",), "a\n\nb", ["a", "", ""]),
    ],
)
def test_stop_strings_are_held_back_and_cut(stop: tuple[str, ...], text: str, pieces: list[str]) -> None:
    stream = char_stream(stop)
    got = []
    for char in text:
        got.append(stream.push(ord(char)))
        if stream.stopped:
            break
    assert got == pieces


def test_a_held_start_of_a_stop_string_comes_at_the_end() -> None:
    stream = char_stream(("END",))
    assert [stream.push(ord(c)) for c in "aEN"] == ["a", "", ""]
    assert stream.finish() == "EN"


def test_broken_bytes_without_end_are_not_held_for_ever() -> None:
    stream = TextStream(lambda ids: "\ufffd" * len(ids), [], ())
    got = [stream.push(1) for _ in range(3 * HELD_TOKENS_MAX)]
    assert sum(map(len, got)) + len(stream.finish()) == 3 * HELD_TOKENS_MAX
    assert any(got[: HELD_TOKENS_MAX + 1])


def test_the_window_stays_short() -> None:
    sizes = []

    def decode(ids: Any) -> str:
        sizes.append(len(ids))
        return "".join(map(chr, ids))

    stream = TextStream(decode, [97] * 9)
    for _ in range(500):
        stream.push(97)
    assert max(sizes) < 2 * 16 + 6


# encoding


def test_encode_is_bounded_and_total() -> None:
    tokens = FAMILIES["bytes"]
    assert tokens.encode("") == (0,), "an empty text is the begin token"
    assert tokens.decode(tokens.encode("König 王 🙂")) == "König 王 🙂"
    with pytest.raises(BadInput, match=r"1,048,577 characters; at most 1,048,576"):
        tokens.encode("a" * (ENCODE_CHARS_MAX + 1))


@pytest.mark.slow
def test_a_tokenizer_that_panics_is_bad_input() -> None:
    """A Rust panic is no Exception: it would end the whole node."""
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    evil = Tokens(transformers.PreTrainedTokenizerFast(tokenizer_object=core))
    assert evil.encode("b") == (1,)
    with pytest.raises(BadInput, match="gave up"):
        evil.encode("a" * 40 + "b")


def test_render_uses_the_models_template() -> None:
    tokens = FAMILIES["bytes"]
    ids = tokens.render([("system", "Be kind."), ("user", "Hi")])
    assert tokens.decode(ids) == "<system>Be kind.\n<user>Hi\n<assistant>"


def test_without_a_template_the_contents_are_the_prompt() -> None:
    plain = byte_tokenizer()
    plain.chat_template = None
    assert Tokens(plain).decode(Tokens(plain).render([("user", "One"), ("assistant", "Two")])) == "One\n\nTwo\n\n"


# templates

LLAMA3 = """{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content }}{{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
MACRO = """{% macro line(role, items) %}{{ role | title }}: {{ items | join(', ') | upper }}{{ {'a': [1, 2], 'b': role} | tojson }}{% endmacro %}{% for m in messages if m.role != 'x' %}{{ line(m.role, m.content.split(' ')) }}{% if loop.last %}.{% elif loop.index > 2 %}{% break %}{% else %};{% endif %}{% endfor %}{{ '%s-%03d' % ('n', 7) }}{{ messages | map(attribute='role') | list | length }}{{ '{}!'.format(messages[-1].role) }}{{ 3 * 'ab' }}{{ messages | selectattr('role', 'equalto', 'user') | list | last | tojson }}"""
CHATS = (
    [("user", "a <b> & 'c'")],
    [("user", "Hi"), ("assistant", "<think>x</think>\n yes "), ("user", "über 王 🙂")],
)


@pytest.mark.parametrize(
    "source", [CHAT, LLAMA3, QWEN3, MISTRAL, MACRO], ids=["chat", "llama3", "qwen3", "mistral", "macro"]
)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "three"])
def test_templates_render_as_transformers_does(source: str, chat: list[tuple[str, str]]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    rows = [{"role": role, "content": content} for role, content in chat]
    expected = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, dict(tokenizer.special_tokens_map)).render(chat) == expected


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(BadInput, match="Only user and assistant roles are supported") as caught:
        ChatTemplate(MISTRAL, {"bos_token": "", "eos_token": ""}).render([("user", "x"), ("robot", "x")])
    assert caught.value.param == "messages"


GROW = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = GROWN %}{% endfor %}"
BIG = "{% set a = 'x' * 900000 %}"
BOMBS = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    "string times": "{{ 'a' * 2000000000 }}",
    "list times": "{{ ([1] * 2000000000)|length }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "number": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "concat": GROW.replace("GROWN", "ns.x ~ ns.x"),
    "add": GROW.replace("GROWN", "ns.x + ns.x"),
    "replace": GROW.replace("GROWN", "ns.x.replace('a', 'aaaa')"),
    "replace filter": GROW.replace("GROWN", "ns.x|replace('a', 'aaaa')"),
    "replace at once": "{% set a = 'a' * 30000 %}{{ a.replace('a', a) }}",
    "replace filter at once": "{% set a = 'a' * 30000 %}{{ a|replace('a', a) }}",
    "join at once": "{% set a = 'a' * 30000 %}{{ a.join(a) }}",
    "join filter at once": "{% set a = 'a' * 30000 %}{{ a|join(a) }}",
    "join list at once": "{% set a = 'a' * 30000 %}{{ ([a] * 9999)|join }}",
    "indent at once": "{% set a = '\\n' * 90000 %}{{ a|indent(9999, true, true) }}",
    "format at once": "{% set a = 'a' * 90000 %}{{ ('%s' * 9999) % (([a] * 9999)) }}{{ ('{0}' * 9999).format(a) }}",
    "concat at once": "{% set a = ([('a' * 90000)] * 9999) %}{{ a ~ a }}",
    "long range": "{{ range(99999)|list|length }}",
    "join": GROW.replace("GROWN", "[ns.x, ns.x]|join"),
    "join method": GROW.replace("GROWN", "ns.x.join([ns.x, ns.x])"),
    "format": GROW.replace("GROWN", "'{}{}'.format(ns.x, ns.x)"),
    "percent": GROW.replace("GROWN", "'%s%s' % (ns.x, ns.x)"),
    "nested list": GROW.replace("GROWN", "[ns.x, ns.x]") + "{{ ns.x }}",
    "nested tuple": GROW.replace("GROWN", "(ns.x, ns.x)") + "{{ ns.x == ns.x }}",
    "nested dict": GROW.replace("GROWN", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}",
    "nested call": GROW.replace("GROWN", "dict(a=ns.x, b=ns.x)") + "{{ ns.x|string }}",
    "wide percent": "{{ '%2000000000d' % 1 }}",
    "star percent": "{{ '%*d' % (2000000000, 1) }}",
    "wide format": "{{ '{:2000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 2000000000) }}",
    "indent": "{{ 'a'|indent(2000000000, true) }}",
    "center": "{{ 'a'|center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "json indent": "{{ messages|tojson(indent=2000000000) }}",
    "macro": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(400) }}",
    "halving macro": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "compare": BIG + "{% for i in range(9999) %}{% if 'z' in a %}{% endif %}{% endfor %}",
    "compare in a chain": BIG + "{% for i in range(9999) %}{% if '' < 'b' != a %}{% endif %}{% endfor %}",
    "test in": BIG + "{% for i in range(9999) %}{% if 'z' is in(a) %}{% endif %}{% endfor %}",
    "test by name": BIG + "{% for i in range(9999) %}{% if 'z' is in(seq=a) %}{% endif %}{% endfor %}",
    "select in": BIG + "{{ range(9999)|map('string')|select('in', a)|list|length }}",
    "reject in": BIG + "{{ range(9999)|map('string')|reject('in', a)|list|length }}",
    "select attribute in": BIG + "{{ ([{'k': 'z'}] * 9999)|selectattr('k', 'in', a)|list|length }}",
    "reject attribute in": BIG + "{{ ([{'k': 'z'}] * 9999)|rejectattr('k', 'in', a)|list|length }}",
    "slices": "{% set a = 'x' * 900000 %}{% for i in range(9999) %}{% if a[1:] %}{% endif %}{% endfor %}",
    "output": "{% for i in range(9999) %}" + "0123456789" * 100 + "{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "random": "{{ range(10)|random }}",
}  # fmt: skip


def peak_bytes() -> int:
    resource = pytest.importorskip("resource", reason="the peak of memory is read with a POSIX call")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_template_bombs_end_soon_in_a_clear_error(name: str) -> None:
    begin, before = time.monotonic(), peak_bytes()
    with pytest.raises((BadInput, BadModel), match="chat template"):
        ChatTemplate(BOMBS[name], {}).render([("user", "x")])
    assert time.monotonic() - begin < HANG_S
    assert peak_bytes() - before < 200 << 20


def test_a_huge_or_broken_template_is_a_bad_model() -> None:
    with pytest.raises(BadModel, match=r"65,537 characters, over 65,536"):
        ChatTemplate("x" * (TEMPLATE_CHARS_MAX + 1), {})
    with pytest.raises(BadModel, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_long_chats_fit_the_budget() -> None:
    chat = [("user" if i % 2 == 0 else "assistant", f"message {i} " * 30) for i in range(1_001)]
    for source in (CHAT, LLAMA3, QWEN3):
        assert len(ChatTemplate(source, {}).render(chat)) > 300_000
