"""node/upstream_dialect.py: every field in each server's words, and what cannot be said or gone on with is refused."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from node.errors import BadRequest, PeerFailed
from node.tools import Tool, ToolCall, Tooling
from node.upstream_dialect import DIALECTS, LLAMA_CPP, LLAMA_CPP_PYTHON, OLLAMA, OPENAI, VLLM, Dialect, ask_of
from node.work import UNKNOWN_TOKEN, GenerateWork, Message, Sampling

CHAT = (Message(role="system", content="be brief"), Message(role="user", content="hi"))
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())


def work(**changes: Any) -> GenerateWork:
    return GenerateWork(**{"request_id": "q", "text": "hello", **changes})


def begun(said: str, count: int = 2, **changes: Any) -> GenerateWork:
    fields = {"delivered": (UNKNOWN_TOKEN,) * count, "delivered_chars": len(said), "delivered_text": said}
    return work(**fields, **changes)


@every_dialect
def test_what_every_server_gets(dialect: Dialect) -> None:
    sampling = Sampling(
        max_tokens=9, temperature=0.5, top_p=0.9, frequency_penalty=1.0, presence_penalty=-1.0, seed=5, stop=("a", "b")
    )
    ask = ask_of(work(sampling=sampling), dialect, "its/name")
    assert ask.path == "/v1/completions"
    wanted = {
        "model": "its/name",
        "prompt": "hello",
        "stream": True,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 1.0,
        "presence_penalty": -1.0,
        "seed": 5,
        "stop": ["a", "b"],
    }
    assert wanted.items() <= ask.body.items()
    chat = ask_of(work(text=None, messages=CHAT), dialect, "m")
    assert chat.path == "/v1/chat/completions"
    assert chat.body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert "prompt" not in chat.body


def sampled(dialect: Dialect, **changes: Any) -> dict[str, Any]:
    body = ask_of(work(sampling=Sampling(**changes)), dialect, "m").body
    names = ("top_k", "min_p", "repetition_penalty", "repeat_penalty")
    return {name: body[name] for name in names if name in body}


def test_extensions_have_each_servers_name() -> None:
    asked = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    assert sampled(VLLM, **asked) == asked
    for dialect in (LLAMA_CPP, LLAMA_CPP_PYTHON):
        assert sampled(dialect, **asked) == {"top_k": 7, "min_p": 0.1, "repeat_penalty": 1.2}
    assert sampled(OPENAI, **asked) == {**asked, "repeat_penalty": 1.2}


def test_neutral_values_are_said_where_the_defaults_are_not_neutral() -> None:
    assert sampled(VLLM) == {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    for dialect in (LLAMA_CPP, LLAMA_CPP_PYTHON):
        assert sampled(dialect) == {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
    assert sampled(OPENAI) == {}, "OpenAI itself refuses fields that it does not know"
    assert sampled(OLLAMA) == {}


@pytest.mark.parametrize("field", ["top_k", "min_p", "repetition_penalty"])
def test_what_a_server_has_no_word_for_is_refused_by_name(field: str) -> None:
    with pytest.raises(BadRequest, match=field) as caught:
        sampled(OLLAMA, **{field: {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}[field]})
    assert caught.value.param == field


@every_dialect
def test_seeds_fit_everywhere(dialect: Dialect) -> None:
    for seed in (0, (1 << 63) - 1, (1 << 31) - 1, 1 << 32):
        assert 0 <= ask_of(work(sampling=Sampling(seed=seed)), dialect, "m").body["seed"] < (1 << 31) - 1


def test_logprobs_have_each_routes_form() -> None:
    chat = work(text=None, messages=CHAT, sampling=Sampling(logprobs=0))
    assert ask_of(chat, VLLM, "m").body["logprobs"] is True
    assert ask_of(chat, VLLM, "m").body["top_logprobs"] == 0
    assert ask_of(work(sampling=Sampling(logprobs=0)), LLAMA_CPP, "m").body["logprobs"] == 1
    assert ask_of(work(sampling=Sampling(logprobs=5)), VLLM, "m").body["logprobs"] == 5
    assert "logprobs" not in ask_of(work(), VLLM, "m").body


def test_more_is_asked_of_those_that_tell_more() -> None:
    assert ask_of(work(), VLLM, "m").body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert ask_of(work(), LLAMA_CPP, "m").body["return_progress"] is True
    assert set(ask_of(work(), OPENAI, "m").body) <= {
        *("model", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed"),
        *("frequency_penalty", "presence_penalty"),
    }


def test_token_ids() -> None:
    tokens = work(text=None, tokens=(1, 2))
    assert ask_of(tokens, VLLM, "m").body["prompt"] == [1, 2]
    for dialect in (OLLAMA, LLAMA_CPP_PYTHON):
        with pytest.raises(BadRequest, match="no token ids"):
            ask_of(tokens, dialect, "m")
    asked = begun("ab", text=None, tokens=(1, 2))
    assert ask_of(asked, LLAMA_CPP, "m").body["prompt"] == [1, 2, "ab"]
    for dialect in (VLLM, OPENAI):
        with pytest.raises(PeerFailed, match="cannot go on after a prompt of token ids"):
            ask_of(asked, dialect, "m")


@every_dialect
def test_text_goes_on_after_what_was_delivered(dialect: Dialect) -> None:
    ask = ask_of(begun(" wor", 2, sampling=Sampling(max_tokens=9, seed=7)), dialect, "m")
    assert (ask.body["prompt"], ask.body["max_tokens"], ask.seam) == ("hello wor", 7, "")
    assert ask.body["seed"] == 9, "the rest must not draw what the beginning drew"


def test_a_chat_goes_on_where_the_server_can() -> None:
    asked = begun("yes, \n", text=None, messages=CHAT)
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    for dialect in (VLLM, LLAMA_CPP):
        ask = ask_of(asked, dialect, "m")
        assert ask.body["messages"][-1] == {"role": "assistant", "content": "yes,"}
        assert ask.seam == " \n", "templates cut it off, so the server is to make it again"
        assert fields.items() <= ask.body.items()
    for dialect in (OLLAMA, OPENAI, LLAMA_CPP_PYTHON):
        with pytest.raises(PeerFailed, match="cannot go on in the middle"):
            ask_of(asked, dialect, "m")


@every_dialect
def test_a_chat_of_which_nothing_was_delivered_begins_anew(dialect: Dialect) -> None:
    asked = begun("", 3, text=None, messages=CHAT, sampling=Sampling(max_tokens=9))
    ask = ask_of(asked, dialect, "m")
    assert len(ask.body["messages"]) == 2
    assert ask.body["max_tokens"] == 6, "what was thought and not said counts"


def test_a_chat_that_ends_with_an_assistant_is_not_gone_on_with() -> None:
    messages = (*CHAT, Message(role="assistant", content="so "))
    assert ask_of(work(text=None, messages=messages), VLLM, "m").body["messages"][-1]["content"] == "so "
    with pytest.raises(PeerFailed, match="where the answer begins"):
        ask_of(begun("far", text=None, messages=messages), VLLM, "m")


@every_dialect
def test_without_the_text_nothing_is_gone_on_with(dialect: Dialect) -> None:
    """A peer that knows ids only, or an older one, sends no text: the answer would begin anew, and come twice."""
    for lacking in (replace(begun("hello"), delivered_text=""), replace(begun("hello"), delivered_text="hell")):
        with pytest.raises(PeerFailed, match="are needed"):
            ask_of(lacking, dialect, "m")


TOOLING = Tooling(tools=(Tool(name="weather", description="d", parameters='{"type": "object"}'),))
CALL = ToolCall(id="c1", name="weather", arguments='{"a":1}')
CALLED = (
    *CHAT,
    Message(role="assistant", content="", tool_calls=(CALL,)),
    Message(role="tool", content="21", tool_call_id="c1"),
)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS.values() if d.takes_tools], ids=lambda d: d.name)
def test_tools_and_calls_are_passed_on(dialect: Dialect) -> None:
    body = ask_of(work(text=None, messages=CALLED, tools=replace(TOOLING, parallel=False)), dialect, "m").body
    function = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["parallel_tool_calls"] is False
    assert "tool_choice" not in body
    assert body["messages"][2:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}},
            ],
        },
        {"role": "tool", "content": "21", "tool_call_id": "c1"},
    ]
    assert "tools" not in ask_of(work(text=None, messages=CALLED), dialect, "m").body


def test_a_choice_is_sent_to_who_keeps_to_it() -> None:
    must, named = replace(TOOLING, choice="required"), replace(TOOLING, function="weather")
    for dialect in (VLLM, LLAMA_CPP, OPENAI):
        assert ask_of(work(text=None, messages=CHAT, tools=must), dialect, "m").body["tool_choice"] == "required"
    for dialect in (VLLM, OPENAI):
        body = ask_of(work(text=None, messages=CHAT, tools=named), dialect, "m").body
        assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    for dialect, tooling in ((OLLAMA, must), (OLLAMA, named), (LLAMA_CPP, named)):
        with pytest.raises(BadRequest, match="does not keep to this tool_choice") as caught:
            ask_of(work(text=None, messages=CHAT, tools=tooling), dialect, "m")
        assert caught.value.param == "tool_choice"


def test_tools_are_refused_where_nobody_knows_what_becomes_of_them() -> None:
    with pytest.raises(BadRequest, match="is not known to take tools") as caught:
        ask_of(work(text=None, messages=CHAT, tools=TOOLING), LLAMA_CPP_PYTHON, "m")
    assert caught.value.param == "tools"
