"""What clients may send: every refusal names the field; every accepted request is work within its bounds."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import work
from node.errors import BadRequest, DeadlinePassed, NoRoom, NotReady, RequestError, TooLarge
from node.front import Route
from node.web.asker import deadline_s_of, route_of
from node.web.door import host_allowed, origin_allowed
from node.web.embeddings import bytes_of, floats_of
from node.web.errors import RETRY_AFTER_S_MAX, SlowBody, error_answer, retry_after_s, row_of
from node.web.schema import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    Generation,
    InferenceRequest,
    messages_of,
    parse,
    prompts_of,
    stops_of,
)

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: object) -> ChatRequest:
    return parse(json.dumps({"messages": HELLO, **fields}).encode(), ChatRequest)


def refusal(**fields: object) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": work.TOKENS_MAX + 1}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": 0}, "store"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, object], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert param.split(".")[-1] in error.message


def test_a_typo_in_a_name_is_told_by_the_name_that_came() -> None:
    with pytest.raises(BadRequest, match="the field 'messages' is missing, and 'mesages' is no field"):
        parse(b'{"mesages": []}', ChatRequest)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"null", b"{" * 3000, b'{"temperature": NaN}', b"\xff"])
def test_what_is_no_json_object_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(body, ChatRequest)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest, EmbeddingsRequest, InferenceRequest):
        try:
            parse(body, kind)
        except RequestError:
            pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_any_value_is_a_prompt_a_stop_a_message_or_a_refusal(value: object) -> None:
    for make in (
        lambda: prompts_of(value, "prompt", count_max=4),
        lambda: stops_of(value),
        lambda: messages_of(value if isinstance(value, list) else [value]),
    ):
        try:
            make()
        except RequestError:
            pass


def test_null_means_absent_and_neutral_values_ask_for_nothing() -> None:
    neutral = {key: values[0] for key, values in NEUTRAL.items() if values}
    asked = chat(temperature=None, stop=None, tools=None, **{k: v for k, v in neutral.items() if k != "tools"})
    assert asked.temperature == 1.0
    assert asked.stop is None


def test_the_alias_default_is_the_nodes_own_model() -> None:
    assert chat(model="default").model_asked() is None
    assert chat().model_asked() is None
    assert chat(model="fairy").model_asked() == "fairy"


def test_sampling_seeds_follow_the_index_and_stay_in_bounds() -> None:
    for seed in (0, 7, -1, (1 << 63) - 1, (1 << 64) - 1):
        samplings = [chat(seed=seed).sampling(index=i, seed=99, tokens_default=8) for i in range(3)]
        assert [s.seed for s in samplings] == [(seed + i) % (1 << 63) for i in range(3)]
        for sampling in samplings:
            msgspec.convert(msgspec.to_builtins(sampling), work.Sampling)
    assert chat().sampling(index=1, seed=99, tokens_default=8).seed == 100


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(-5, work.TOKENS_MAX + 5),
            "temperature": st.floats(),
            "top_p": st.floats(),
            "top_k": st.integers(),
            "min_p": st.floats(),
            "frequency_penalty": st.floats(),
            "repetition_penalty": st.floats(),
            "seed": st.integers(),
            "stop": JSON,
        },
    )
)
def test_what_the_schema_takes_the_wire_takes_too(fields: dict[str, object]) -> None:
    """The struct's own constructor checks nothing, so the schema's bounds must be as narrow as the wire's."""
    try:
        asked = parse(json.dumps({"text": "x", **fields}).encode(), InferenceRequest)
        sampling = asked.sampling(index=0, seed=1, tokens_default=16)
    except RequestError:
        return
    assert msgspec.convert(msgspec.to_builtins(sampling), work.Sampling) == sampling


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).tokens_max() == 9
    assert chat(max_tokens=5).tokens_max() == 5
    assert chat().tokens_max() is None


def test_top_logprobs_needs_logprobs() -> None:
    with pytest.raises(BadRequest) as caught:
        chat(top_logprobs=3).logprobs_asked()
    assert caught.value.param == "top_logprobs"
    assert chat(logprobs=True).logprobs_asked() == 0
    assert chat(logprobs=True, top_logprobs=3).logprobs_asked() == 3
    assert chat().logprobs_asked() is None


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    made = messages_of([{"role": "developer", "content": "x"}, {"role": "user", "content": parts, "name": "n"}])
    assert [(m.role, m.content) for m in made] == [("system", "x"), ("user", "ab")]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages.0"),
        ({"role": "king", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content"),
        ({"role": "user", "content": []}, "messages.0.content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages.0.tool_calls.0.id"),
    ],
)
def test_a_bad_message_is_named(message: object, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        messages_of([message])
    assert caught.value.param == param


def test_large_inputs_are_too_large() -> None:
    long = "a" * (work.PROMPT_CHARS_MAX + 1)
    with pytest.raises(TooLarge):
        messages_of([{"role": "user", "content": long}])
    with pytest.raises(TooLarge):
        prompts_of(long, "prompt", count_max=4)
    with pytest.raises(TooLarge):
        prompts_of([long[: work.PROMPT_CHARS_MAX // 2 + 1]] * 2, "prompt", count_max=4)
    with pytest.raises(TooLarge):
        prompts_of(["a"] * 5, "input", count_max=4)
    with pytest.raises(TooLarge):
        prompts_of([1] * (work.TOKENS_MAX + 1), "input", count_max=4)
    with pytest.raises(TooLarge):
        messages_of([{"role": "user", "content": ""}] * (work.MESSAGES_MAX + 1))


def test_prompts() -> None:
    assert prompts_of("a", "prompt", count_max=4) == ("a",)
    assert prompts_of(["a", "b"], "prompt", count_max=4) == ("a", "b")
    assert prompts_of([1, 2], "prompt", count_max=4) == ((1, 2),)
    assert prompts_of([[1], [2, 3]], "prompt", count_max=4) == ((1,), (2, 3))
    assert prompts_of("", "prompt", count_max=4, empty_allowed=True) == ("",)
    wrongs: list[object] = ["", [], [[]], [""], [-1], [1 << 31], [True], 5, {}, ["a", None]]
    for wrong in wrongs:
        with pytest.raises(BadRequest):
            prompts_of(wrong, "prompt", count_max=4)


def test_stops() -> None:
    assert stops_of(None) == ()
    assert stops_of("x") == ("x",)
    assert stops_of(["x", "y"]) == ("x", "y")
    for wrong in ("", ["x"] * 9, [""], ["x" * 257], 5, [5]):
        with pytest.raises(BadRequest):
            stops_of(wrong)


def test_route_and_deadline_headers() -> None:
    assert route_of({}).route is Route.AUTO
    assert route_of({"x-route": "remote", "x-peer": "12D3KooWabc"}).peer == "12D3KooWabc"
    assert deadline_s_of({}) == 120.0
    assert deadline_s_of({"x-timeout-s": "2.5"}) == 2.5
    for wrong in ({"x-route": "moon"}, {"x-peer": "../../etc"}, {"x-peer": "a" * 129}):
        with pytest.raises(BadRequest):
            route_of(wrong)
    for text in ("0", "-1", "nan", "inf", "soon", "86401"):
        with pytest.raises(BadRequest):
            deadline_s_of({"x-timeout-s": text})


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (None, True),
        ("localhost:8765", True),
        ("LOCALHOST", True),
        ("node.localhost:1", True),
        ("127.0.0.1:8765", True),
        ("[::1]:8765", True),
        ("192.168.1.7:8765", True),
        ("mine.example", True),
        ("evil.example:8765", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("evil-localhost", False),
        ("", False),
        ("[", False),
        ("127.1:80", False),
    ],
)
def test_a_host_that_dns_can_rebind_is_foreign(host: str | None, allowed: bool) -> None:
    assert host_allowed(host, frozenset({"mine.example"})) is allowed


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "127.0.0.1:8765", True),
        ("http://127.0.0.1:8765", "127.0.0.1:8765", True),
        ("http://localhost:8765", "127.0.0.1:8765", False),
        ("http://127.0.0.1:9999", "127.0.0.1:8765", False),
        ("https://evil.example", "127.0.0.1:8765", False),
        ("null", "127.0.0.1:8765", False),
        ("file://", "127.0.0.1:8765", False),
        ("https://chat.example", "127.0.0.1:8765", True),
        ("http://[", "127.0.0.1:8765", False),
        ("http://x", None, False),
    ],
)
def test_a_page_of_another_site_is_foreign(origin: str | None, host: str | None, allowed: bool) -> None:
    assert origin_allowed(origin, host, frozenset({"https://chat.example"})) is allowed


def test_every_kind_of_error_has_its_row() -> None:
    from node.errors import REQUEST_ERRORS

    statuses = {code: row_of(kind("x")).status for code, kind in REQUEST_ERRORS.items()}
    assert statuses == {
        "bad_request": 400,
        "context_length_exceeded": 400,
        "too_large": 413,
        "unknown_model": 404,
        "no_room": 503,
        "too_many": 429,
        "not_ready": 503,
        "deadline": 408,
        "peer_failed": 503,
        "internal": 500,
    }
    assert row_of(SlowBody("x")).status == 408


def test_retry_after_is_whole_bounded_seconds() -> None:
    assert retry_after_s(NoRoom("full")) == 1
    assert retry_after_s(NotReady("loading", retry_after_s=2.1)) == 3
    assert retry_after_s(NotReady("loading", retry_after_s=float("inf"))) == RETRY_AFTER_S_MAX
    assert retry_after_s(NotReady("loading", retry_after_s=-4)) == 1
    assert retry_after_s(DeadlinePassed("late")) is None


def test_the_error_shape_is_openais() -> None:
    status, headers, body = error_answer(NoRoom("full", retry_after_s=2), "req-1", "/v1/models")
    assert (status, headers["retry-after"]) == (503, "2")
    assert json.loads(body) == {
        "error": {
            "type": "overloaded_error",
            "code": "no_room",
            "message": "full",
            "param": None,
            "request_id": "req-1",
            "retryable": True,
        }
    }


def test_fewer_dimensions_are_unit_length() -> None:
    vector = bytes_of(floats_of(b"\x00\x00\x80\x3f" * 4, None))
    assert len(vector) == 16
    assert sum(x * x for x in floats_of(vector, 2)) == pytest.approx(1.0)
    assert list(floats_of(bytes(16), 2)) == [0.0, 0.0]
    assert list(floats_of(vector, 9)) == [1.0] * 4


def test_generation_fields_are_all_read() -> None:
    """A field that is taken and not used would be a silent lie to the client."""
    unread = {"model", "user", "max_tokens", "seed", "stop", "n"}  # read by methods of their own, or told nobody
    sampled = set(work.Sampling.__struct_fields__)
    assert set(Generation.model_fields) - unread <= sampled
