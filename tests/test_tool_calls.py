"""Tools: how they reach a template and a peer, and how calls are found in what a model writes."""
# ruff: noqa: E501 - templates

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.canonical import decode, encode
from model.call_format import call_format
from model.errors import BadInput
from model.template import ChatTemplate, TakesNoTools
from model.tokens import Tokens
from node.engine_words import generation_request
from node.requester import OWN
from node.tool_calls import CALL_CHARS_MAX, CallReader, Reading, written
from node.tools import CALLS_MAX, TOOLS_MAX, Tool, ToolCall, Tooling
from node.work import (
    GENERATE,
    GENERATE_TOOLS,
    MESSAGES_MAX,
    WORK_LIMITS,
    Finished,
    GenerateWork,
    Message,
    Piece,
    Started,
    from_wire,
    to_wire,
)
from p2p.errors import RemoteProtocolError
from tests.fake_runtime import FakeRuntime
from tests.test_tokens import HANG_S, peak_bytes
from tests.tiny_models import CHAT, byte_tokenizer
from tests.tool_templates import ARGUMENTS, HERMES, LLAMA, TEMPLATES, WEATHER, WRITTEN

NAMES = frozenset({"weather", "put"})
TOOLING = Tooling(
    tools=(Tool(name="weather", description="d", parameters='{"type":"object"}'), Tool(name="put")), parallel=True
)
CALL = ToolCall(id="abcdefgh1", name="weather", arguments=ARGUMENTS)
TALK = (
    Message(role="user", content="Hi"),
    Message(role="assistant", content="", tool_calls=(CALL,)),
    Message(role="tool", content="21 C", tool_call_id="abcdefgh1"),
)


def work(**fields: Any) -> GenerateWork:
    return GenerateWork(request_id="q", **{"messages": TALK, "tools": TOOLING, **fields})


# the wire


def test_tools_and_calls_go_there_and_back() -> None:
    assert from_wire(decode(encode(to_wire(work())), WORK_LIMITS), GenerateWork) == work()


def test_who_asks_for_no_tools_sends_what_old_peers_know() -> None:
    plain = to_wire(GenerateWork(request_id="q", messages=(Message(role="user", content="Hi"),)))
    assert "tools" not in plain
    assert list(plain["messages"]) == [{"role": "user", "content": "Hi"}]
    assert "calls" not in to_wire(Started(served_by="p", model="m", revision="r", prompt_tokens=1))


def test_tools_and_calls_go_by_a_method_that_old_peers_do_not_have() -> None:
    assert work(messages=TALK[:1], tools=None).method == GENERATE
    assert work(messages=TALK[:1]).method == GENERATE_TOOLS
    assert work(tools=None).method == GENERATE_TOOLS
    assert work(messages=TALK[2:], tools=None).method == GENERATE_TOOLS


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("tools", "tools"), []),
        (("tools", "tools"), [{"name": "a"}] * (TOOLS_MAX + 1)),
        (("tools", "tools"), [{"name": "a b"}]),
        (("tools", "tools"), [{"name": "a", "more": 1}]),
        (("tools", "choice"), "maybe"),
        (("tools", "function"), "x" * 65),
        (("messages", 1, "tool_calls"), [{"id": "", "name": "a", "arguments": ""}]),
        (("messages", 1, "tool_calls"), [{"id": "i", "name": "a", "arguments": {}}]),
        (("messages", 1, "tool_calls"), [{"id": "i", "name": "a", "arguments": ""}] * (CALLS_MAX + 1)),
        (("messages", 2, "tool_call_id"), "x" * 65),
    ],
)
def test_bad_tools_of_a_peer_are_refused(place: tuple[str | int, ...], value: object) -> None:
    plain = to_wire(work())
    inner = plain
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    with pytest.raises(RemoteProtocolError):
        from_wire(plain, GenerateWork)


def test_the_longest_chat_of_calls_fits_a_frame() -> None:
    half = tuple(msgspec.structs.replace(each, content="x" * 50) for each in TALK[1:]) * (MESSAGES_MAX // 2)
    tools = Tooling(tools=(Tool(name="a" * 64, description="d" * 700, parameters="{}"),) * TOOLS_MAX, function="a")
    longest = work(messages=half, tools=tools)
    assert from_wire(decode(encode(to_wire(longest)), WORK_LIMITS), GenerateWork) == longest


# what models write


def merged(found: list[Any]) -> list[Any]:
    told: list[Any] = []
    for part in found:
        if isinstance(part, str) and told and isinstance(told[-1], str):
            told[-1] += part
        else:
            told.append(part)
    return told


def read(form: str | None, text: str, cuts: tuple[int, ...] = ()) -> list[Any]:
    reader, found = CallReader(form, NAMES), []
    for begin, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        found += reader.feed(text[begin:end])
    return merged(found + reader.end())


W = ("weather", ARGUMENTS)
CASES: list[tuple[str | None, str, list[Any]]] = [
    ("hermes", WRITTEN["hermes"], [W]),
    ("hermes", f"Let me see.\n{WRITTEN['hermes']}\n{WRITTEN['hermes']}\n", ["Let me see.", W, W]),
    ("hermes", WRITTEN["hermes"].removesuffix("\n</tool_call>"), [W]),  # the end came first
    ("hermes", '<tool_call>{"name": "new", "parameters": {}}</tool_call>', [("new", "{}")]),
    ("hermes", '<tool_call>{"name": "put"}</tool_call>', [("put", "{}")]),
    ("hermes", '<tool_call>{"name": "put", "arguments": null}</tool_call>', [("put", "{}")]),
    ("hermes", '<tool_call>{"name": "put", "arguments": {"a"}</tool_call> so ', None),
    ("hermes", '<tool_call>{"name": "put", "arguments": [1]}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "a b"}</tool_call>', None),
    ("hermes", "<tool_call>" + "[" * 5_000 + "</tool_call>", None),
    ("hermes", '<tool_call>{"name": "put", "argum', None),
    (
        "hermes",
        '<tool_call>{"name": "put", "arguments": {"a": "</tool_call>\\""}}</tool_call>',
        [("put", '{"a": "</tool_call>\\""}')],
    ),
    ("hermes", "<tool_call> is what it writes </tool_call>", None),
    ("hermes", "1 <2 <tool_ca  ", None),
    ("hermes", " \n", None),
    ("llama", WRITTEN["llama"], [W]),
    ("llama", f"\n{WRITTEN['llama']}; {WRITTEN['llama']}\nso", [W, W, "so"]),
    ("llama", f"<|python_tag|>{WRITTEN['llama']}", [W]),
    ("llama", f"I look. <|python_tag|>{WRITTEN['llama']}", ["I look.", W]),
    ("llama", '{"type": "function", "name": "put", "parameters": {"a": "}\\"{"}}', [("put", '{"a": "}\\"{"}')]),
    ("llama", f"So: {WRITTEN['llama']}", None),
    ("llama", '{"name": "Ann", "parameters": {}}', None),
    ("llama", '{"town": "Ulm"} is JSON', None),
    ("llama", '{"name": "put", "parame', None),
    ("llama", "<|python_tag|>print(1)", None),
    ("mistral", WRITTEN["mistral"], [W]),
    ("mistral", f"[TOOL_CALLS] {WRITTEN['mistral']}", [W]),
    ("mistral", f"Now.[TOOL_CALLS]{WRITTEN['mistral'][:-1]}, {WRITTEN['mistral'][1:]}", ["Now.", W, W]),
    ("mistral", "[1, 2] is a list", None),
    ("mistral", '[{"name": "Ann"}]', None),
    ("mistral", "[TOOL_CALLS] none", None),
    ("mistral", "[TOOL_CALLS] []", None),
    ("new-format", WRITTEN["hermes"], None),
    (None, WRITTEN["hermes"], None),
]


@pytest.mark.parametrize(("form", "text", "wanted"), CASES)
def test_calls_are_found_and_all_else_is_text(form: str | None, text: str, wanted: list[Any] | None) -> None:
    whole = read(form, text)
    assert whole == ([text] if wanted is None else wanted)
    for size in (1, 2, 3, 7):
        assert read(form, text, tuple(range(size, len(text), size))) == whole


PARTS = st.sampled_from(
    [*WRITTEN.values(), "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "}", "[", "]", '"', "\\",
     '{"name"', ": ", "put", "x y", " ", "\n", ";", "ä", "<tool", '"arguments": {}'],
)  # fmt: skip


@given(form=st.sampled_from(sorted(TEMPLATES)), parts=st.lists(PARTS, max_size=12), data=st.data())
@settings(max_examples=100, deadline=None)
def test_how_the_text_is_cut_changes_nothing(form: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    told = read(form, text, tuple(cuts))
    assert told == read(form, text)
    if not any(isinstance(part, tuple) for part in told):
        assert "".join(told) == text, "where nothing was called the text is what the model wrote"


def test_text_goes_on_at_once_and_only_what_may_be_a_call_waits() -> None:
    reader = CallReader("hermes", NAMES)
    assert reader.feed("It is a < b") == ["It is a < b"]
    assert reader.feed(", so <tool") == [", so"]
    assert reader.feed("box>") == [" <toolbox>"]
    bare = CallReader("llama", NAMES)
    assert bare.feed('{"na') == []
    assert bare.feed("tion") == ['{"nation']


@pytest.mark.parametrize("opening", ["<tool_call>", '<tool_call>{"name": "', "[TOOL_CALLS][{", '{"name": "'])
def test_a_call_without_end_is_text_at_its_bound(opening: str) -> None:
    for form in TEMPLATES:
        reader, told = CallReader(form, NAMES), []
        text = opening + "x" * 2 * CALL_CHARS_MAX
        for begin in range(0, len(text), 50_000):
            told += reader.feed(text[begin : begin + 50_000])
            assert len(reader._buffer) <= CALL_CHARS_MAX + 50_000
        assert "".join([*told, *reader.end()]) == text


def test_a_call_as_text_is_read_as_it_was() -> None:
    for arguments in (ARGUMENTS, "{", '"</tool_call>', ""):
        assert read("hermes", written("put", arguments)) == [("put", arguments)]


def items(reading: Reading, text: str, form: str = "hermes") -> list[Any]:
    told: list[Any] = []
    for item in (
        Started(served_by="p", model="m", revision="r", prompt_tokens=1, calls=form),
        *(Piece(tokens=(n,), text=text[n : n + 9]) for n in range(0, len(text), 9)),
        Finished(reason="stop", prompt_tokens=1, completion_tokens=len(text)),
    ):
        told += reading.take(item)
    return told


def test_calls_have_ids_of_their_own_and_every_token_is_told() -> None:
    text = f"So. {WRITTEN['hermes']}{WRITTEN['hermes']}"
    told = items(Reading(work()), text)
    calls = [item for item in told if isinstance(item, ToolCall)]
    assert [(call.name, call.arguments) for call in calls] == [W, W]
    assert len({call.id for call in calls}) == 2
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls), "Mistral's templates want that"
    assert calls[0].id != items(Reading(work(tools=TOOLING, messages=TALK[:1])), text)[0]
    pieces = [item for item in told if isinstance(item, Piece)]
    assert sum(len(piece.tokens) for piece in pieces) == len(range(0, len(text), 9))
    assert "".join(piece.text for piece in pieces) == "So."


def test_one_call_when_parallel_ones_are_not_wanted() -> None:
    one = msgspec.structs.replace(TOOLING, parallel=False)
    told = items(Reading(work(tools=one)), f"{WRITTEN['hermes']} and {WRITTEN['hermes']}")
    assert [item.name for item in told if isinstance(item, ToolCall)] == ["weather"]
    many = items(Reading(work()), WRITTEN["hermes"] * (CALLS_MAX + 1))
    assert sum(isinstance(item, ToolCall) for item in many) == CALLS_MAX


# templates


@pytest.mark.parametrize("family", TEMPLATES)
def test_templates_with_tools_render_as_transformers_does(family: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[family]
    tokens = Tokens(tokenizer)
    seen: list[Any] = []

    class Noting(FakeRuntime):
        def render(self, messages: Any, tools: Any = None) -> tuple[int, ...]:
            seen.append((messages, tools))
            return (1,)

    chat = (*TALK, Message(role="user", content="And now?"))
    spoken = Tooling(
        tools=(
            Tool(
                name="weather",
                description=WEATHER["function"]["description"],
                parameters=json.dumps(WEATHER["function"]["parameters"]),
            ),
        )
    )
    generation_request(Noting(), "k", work(messages=chat, tools=spoken), OWN)
    rows, tools = seen[0]
    assert tools == [WEATHER]
    wanted = tokenizer.apply_chat_template(rows, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
    assert "town" in wanted
    assert "Köln" in wanted
    assert tokens.decode(tokens.render(rows, tools)) == tokens.decode(tokens.encode(wanted))
    assert tokens.calls == family == call_format(TEMPLATES[family])


def test_a_template_that_shows_no_tools_is_said_to() -> None:
    for source in (CHAT, None):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = source
        with pytest.raises(TakesNoTools) as caught:
            Tokens(tokenizer).render([("user", "x")], [WEATHER])
        assert caught.value.param == "tools"
        assert Tokens(tokenizer).render([("user", "x")], [])


def test_a_template_of_its_own_for_tools_is_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHAT, "tool_use": HERMES}
    tokens = Tokens(tokenizer)
    assert tokens.decode(tokens.render([("user", "Hi")])).startswith("<user>Hi")
    assert "# Tools" in tokens.decode(tokens.render([("user", "Hi")], [WEATHER]))
    assert tokens.calls == "hermes"


def test_formats_that_are_not_read_here_are_not_claimed() -> None:
    for source in (CHAT, "<tool_call><function=x>", "[TOOL_CALLS]name[ARGS]{}"):
        assert call_format(source) is None


HUGE = {"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 300_000, "b": [10**4000] * 50}}}
TOOL_BOMBS = {
    "a loop of JSON": "{% for i in range(9999) %}{% set x = tools|tojson %}{% endfor %}",
    "JSON in JSON": "{% set ns = namespace(x=tools) %}{% for i in range(40) %}{% set ns.x = ns.x|tojson %}{% endfor %}{{ ns.x }}",
    "long numbers": "{% for i in range(9999) %}{% set x = tools[0].function.parameters.b|tojson %}{% endfor %}",
    "nested tools": "{% set ns = namespace(x=tools) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "compare": "{% for i in range(9999) %}{% if tools == [tools] or 'z' in tools[0].function.parameters.a %}{% endif %}{% endfor %}",
    "as text": "{% for i in range(9999) %}{% set x = tools|string %}{% endfor %}",
    "joined": "{% for i in range(9999) %}{% set x = tools ~ tools %}{% endfor %}",
    "keys": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in tools[0].function %}{% endfor %}{% endfor %}{% endfor %}",
    "indented": "{% for i in range(9999) %}{{ tools|tojson(indent=16) }}{% endfor %}",
    "changes them": "{% for t in tools %}{% set x = t.update({'a': t}) %}{% endfor %}{{ tools }}",
    "its class": "{{ tools.__class__.__mro__ }}",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOL_BOMBS)
def test_template_bombs_with_tools_end_soon_in_a_clear_error(name: str) -> None:
    begin, before = time.monotonic(), peak_bytes()
    with pytest.raises(BadInput, match="chat template"):
        ChatTemplate(TOOL_BOMBS[name], {}).render([("user", "x")], [HUGE])
    assert time.monotonic() - begin < HANG_S
    assert peak_bytes() - before < 200 << 20


def test_hundreds_of_kilobytes_of_tools_fit_the_budget() -> None:
    tools = [{"type": "function", "function": {"name": f"f{n}", "description": "d" * 1_500}} for n in range(TOOLS_MAX)]
    for source in (HERMES, LLAMA):
        assert len(ChatTemplate(source, {"eos_token": ""}).render([("user", "x")], tools)) > 190_000


# the engine


def test_what_the_engine_cannot_promise_is_refused() -> None:
    runtime = FakeRuntime()
    for tooling in (
        msgspec.structs.replace(TOOLING, choice="required"),
        msgspec.structs.replace(TOOLING, function="put"),
    ):
        with pytest.raises(BadInput, match="nothing makes tale call") as caught:
            generation_request(runtime, "k", work(tools=tooling), OWN)
        assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("text", ["[]", "{", '"x"', "[" * 3_000])
def test_what_is_no_object_of_json_is_said(text: str) -> None:
    runtime = FakeRuntime()
    bad = ToolCall(id="i", name="put", arguments=text)
    with pytest.raises(BadInput, match="the arguments of i are"):
        generation_request(
            runtime, "k", work(messages=(Message(role="assistant", content="", tool_calls=(bad,)),)), OWN
        )
    with pytest.raises(BadInput, match="the parameters of put are"):
        generation_request(runtime, "k", work(tools=Tooling(tools=(Tool(name="put", parameters=text),))), OWN)
