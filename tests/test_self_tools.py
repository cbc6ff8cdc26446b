"""The self-report in chats: made of records, the same as the memory's own, and told to nobody who may not read them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from node.api_keys import KeyScope
from node.errors import NoRoom
from node.front import Route
from node.self_report import EVENT_CHARS_MAX, RECALL, RECALL_EVENTS, REPORT, recalled, report, shown
from node.web.app import build_app
from node.web.gate import GateConfig
from node.web.self_tools import ROUNDS_MAX
from node.web.settings import WebConfig
from node.work import GenerateWork, Piece, Started
from tests.fake_front import PEER, FakeFront, Step, finished
from tests.fake_self import FakeSelf, measured
from tests.test_web_itself import keys
from tests.test_web_routes import CHAT, error_of
from tests.test_web_tools import events
from tests.tool_templates import WEATHER

REPORTING = {**CHAT, "tools": [{"type": "function", "function": {"name": REPORT}}]}
FORCED = {**REPORTING, "tool_choice": {"type": "function", "function": {"name": REPORT}}}
RECALLING = {**CHAT, "tools": [{"type": "function", "function": {"name": RECALL}}]}
MOODS = re.compile(
    r"\b(feel|feels|feeling|happy|sad|mood|conscious|aware|alive|suffer|enjoy|afraid|level|phi|sentient)\b", re.I
)


class Bench:
    def __init__(
        self, folder: Path, client: str = "127.0.0.1", gate: GateConfig | None = None, *, is_on: bool = True
    ) -> None:
        self.front = FakeFront()
        self.itself = FakeSelf(folder).live()
        self.front.itself = self.itself
        config = WebConfig(gate=gate or GateConfig(), self_report=is_on)
        self.app = build_app(self.front, Random(7), config)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False, client=(client, 50_000))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765")

    async def chat(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    async def said(self, body: dict[str, Any]) -> str:
        response = await self.chat(body)
        assert response.status_code == 200, response.text
        content = response.json()["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    async with bench.http:
        yield bench
    bench.itself.close()


def answer(text: str) -> list[Step]:
    start = Started(served_by=PEER, model="fairy", revision="r", prompt_tokens=3, calls="hermes")
    return [start, *(Piece(tokens=(n,), text=letter) for n, letter in enumerate(text)), finished(len(text), "stop")]


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def in_turn(*texts: str | Callable[[GenerateWork], str]) -> Callable[[GenerateWork], list[Step]]:
    """A model that says these, one answer after the other; a function makes its text of the request."""
    left = list(texts)

    def script(work: GenerateWork) -> list[Step]:
        text = left.pop(0)
        return answer(text if isinstance(text, str) else text(work))

    return script


def result_of(work: GenerateWork) -> str:
    """What the node said last, as a model that repeats it."""
    assert work.messages is not None
    assert work.messages[-1].role == "tool"
    return work.messages[-1].content


def figures_in(text: str) -> dict[str, str]:
    """The `path = value unit` lines of a report."""
    return dict(re.findall(r"^([a-z_.0-9]+) = (\S+)", text, re.M))


# --- the report is what the memory has ---


async def test_what_is_your_state_is_answered_by_what_stands_in_the_memory(bench: Bench) -> None:
    text = await bench.said({**FORCED, "messages": [{"role": "user", "content": "What is your state?"}]})
    told = figures_in(text)
    figures, words = measured(bench.itself)
    assert len(figures) > 50
    for path, value in figures.items():
        assert float(told[path]) == pytest.approx(value, rel=1e-5), path
    for path, word in words.items():
        if path.startswith("learning.rejected."):
            assert f"{path.rsplit('.')[-1]}: {word}" in text
        elif path != "calibration.gaps":
            assert told[path] == word
    gaps = [float(each) for each in words["calibration.gaps"].split()]
    assert re.search(r"^calibration.gaps = (.*) tokens$", text, re.M)
    shown_gaps = [float(each) for each in re.findall(r"^calibration.gaps = (.*) tokens$", text, re.M)[0].split()]
    assert shown_gaps == pytest.approx(gaps, rel=1e-5)
    head = bench.itself.store.statistics()
    assert f"The last event in its memory is {head.head_id}, of hash {head.head_hash}." in text
    [kept] = bench.itself.store.recent("prediction", 1)
    foretold: Any = kept.body
    for name in ("latency_s", "active_requests", "live_peers", "loss_nats"):
        found = re.search(rf"{name} = (\S+), most likely (\S+) to (\S+)$", text, re.M)
        assert found is not None
        wanted = [foretold.figures[f"{name}{end}"] for end in ("", ".low", ".high")]
        assert [float(each) for each in found.groups()] == pytest.approx(wanted, rel=1e-5)
    assert bench.front.works == [], "no model was asked"
    assert not MOODS.search(text)


async def test_a_figure_that_moves_moves_in_the_report(bench: Bench) -> None:
    from tests.facts_world import CHANGES

    before = figures_in(await bench.said(FORCED))
    bench.itself.live(CHANGES[2:])
    after = figures_in(await bench.said(FORCED))
    assert (before["load.loop_lag_ms"], after["load.loop_lag_ms"]) == ("3.5", "4.5")
    assert after["memory.head_id"] != before["memory.head_id"]


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    itself = FakeSelf(tmp_path)
    text = report(itself.told())
    assert figures_in(text) == {}
    assert "Not measured: identity.peer_id, identity.model" in text
    itself.close()


def test_values_are_shown_as_they_are() -> None:
    assert [shown(value) for value in (3, 2.0, 0.1 + 0.2, 1e-9, 12345678.25, "a", (1.5, 2), {"b": 1, "a": 2})] == [
        "3", "2", "0.3", "1e-09", "1.23457e+07", "a", "1.5 2", "a: 2, b: 1",
    ]  # fmt: skip


async def test_the_forced_report_says_who_and_streams(bench: Bench) -> None:
    response = await bench.chat(FORCED)
    told = response.json()
    assert (told["model"], told["system_fingerprint"], response.headers["x-served-by"]) == (REPORT, "records", PEER)
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    streamed = (await bench.chat({**FORCED, "stream": True})).text
    assert "data: [DONE]" in streamed
    text = "".join(each["choices"][0]["delta"].get("content") or "" for each in events(streamed))
    assert text == told["choices"][0]["message"]["content"]


# --- a model that calls it ---


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_calls_it_goes_on_with_the_report(bench: Bench, stream: bool) -> None:
    bench.front.script = in_turn(f"I look. {call(REPORT)}", result_of)
    response = await bench.chat({**REPORTING, "stream": stream, "max_tokens": 9_000, "temperature": 0})
    if stream:
        chunks = [each["choices"][0] for each in events(response.text)]
        text = "".join(each["delta"].get("content") or "" for each in chunks)
        assert not any("tool_calls" in each["delta"] for each in chunks)
        assert [each["finish_reason"] for each in chunks if each["finish_reason"]] == ["stop"]
    else:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == 6, "of both answers"
    assert text == f"I look.{report(bench.itself.told())}"
    first, second = bench.front.works
    assert first.tools is not None
    assert first.tools.tools[0].description is not None
    assert second.messages is not None
    said, told = second.messages[-2:]
    assert (said.role, said.content, said.tool_calls[0].name) == ("assistant", "I look.", REPORT)
    assert (told.role, told.tool_call_id) == ("tool", said.tool_calls[0].id)
    assert second.sampling.max_tokens == 9_000 - len(f"I look. {call(REPORT)}")
    assert {hint.route for hint in bench.front.hints} == {Route.LOCAL}
    assert not any(work.keep for work in bench.front.works)


async def test_one_field_alone_and_broken_arguments(bench: Bench) -> None:
    bench.front.script = in_turn(call(REPORT, about="load"), result_of)
    text = await bench.said({**REPORTING, "max_tokens": 9_000})
    assert set(figures_in(text)) == {each for each in figures_in(text) if each.startswith("load.")}
    assert "load.loop_lag_ms" in figures_in(text)
    for about in ("mood", 3, None):
        bench.front.script = in_turn(call(REPORT, about=about), result_of)
        assert len(figures_in(await bench.said({**REPORTING, "max_tokens": 9_000}))) > 50


async def test_a_model_that_calls_for_ever_is_ended(bench: Bench) -> None:
    bench.front.script = in_turn(*[call(REPORT)] * ROUNDS_MAX, "enough")
    assert await bench.said({**REPORTING, "max_tokens": 9_000}) == "enough"
    assert [work.tools is None for work in bench.front.works] == [False] * ROUNDS_MAX + [True]
    assert len({work.request_id for work in bench.front.works}) == ROUNDS_MAX + 1
    bench.front.script = in_turn(*[call(REPORT)] * (ROUNDS_MAX + 1))
    both = {**REPORTING, "tools": [*REPORTING["tools"], WEATHER], "max_tokens": 9_000}  # type: ignore[misc]
    choice = (await bench.chat(both)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


async def test_an_answer_that_has_no_token_left_ends(bench: Bench) -> None:
    bench.front.script = in_turn(call(REPORT), "never asked")
    choice = (await bench.chat({**REPORTING, "max_tokens": 5})).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(bench.front.works) == 1


async def test_the_clients_own_functions_are_the_clients(bench: Bench) -> None:
    both = {**REPORTING, "tools": [*REPORTING["tools"], WEATHER]}  # type: ignore[misc]
    bench.front.script = in_turn(call("weather", town="Ulm"))
    choice = (await bench.chat(both)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [each["function"]["name"] for each in choice["message"]["tool_calls"]] == ["weather"]
    bench.front.script = in_turn(call(REPORT) + call("weather", town="Ulm"))
    mixed = (await bench.chat(both)).json()["choices"][0]["message"]["tool_calls"]
    assert [each["function"]["name"] for each in mixed] == ["weather"]
    bench.front.script = in_turn(call(REPORT), call("weather", town="Ulm"))
    later = (await bench.chat({**both, "max_tokens": 900})).json()["choices"][0]
    assert [each["function"]["name"] for each in later["message"]["tool_calls"]] == ["weather"]


async def test_errors_of_the_model_are_the_requests(bench: Bench) -> None:
    turns: list[list[Step]] = [answer(call(REPORT)), [NoRoom("all slots are taken")]]
    bench.front.script = lambda work: turns.pop(0)
    assert error_of(await bench.chat(REPORTING), 503)["code"] == "no_room"


async def test_who_leaves_cancels_the_model(bench: Bench, autojump_clock: MockClock) -> None:
    bench.front.script = lambda work: [*answer("a")[:1], 1e6]
    with trio.move_on_after(10):
        await bench.chat(REPORTING)
    assert (bench.front.running, bench.front.cancelled) == (0, 1)


# --- recall ---


async def test_the_operators_chat_recalls(bench: Bench) -> None:
    await bench.itself.note("the heron stands in the reeds", "birds")
    bench.front.script = in_turn(call(RECALL, query="heron"), result_of)
    text = await bench.said({**RECALLING, "max_tokens": 9_000})
    assert '"text":"the heron stands in the reeds"' in text
    for arguments in ({}, {"query": ""}, {"query": 7}, {"query": "a" * 1_001}):
        bench.front.script = in_turn(call(RECALL, **arguments), result_of)
        assert "Nothing was asked" in await bench.said({**RECALLING, "max_tokens": 9_000})
    bench.front.script = in_turn(call(RECALL, query="walrus"), result_of)
    assert "Nothing is remembered" in await bench.said({**RECALLING, "max_tokens": 9_000})
    error = error_of(
        await bench.chat({**RECALLING, "tool_choice": {"type": "function", "function": {"name": RECALL}}}), 400
    )
    assert error["param"] == "tool_choice"


def test_what_is_recalled_is_bounded() -> None:
    event = {"id": 1, "ts_ms": 2, "kind": "note", "hash": "", "body": {"text": "a" * 9_000}}
    text = recalled([event] * 50)
    assert len(text.splitlines()) == RECALL_EVENTS
    assert len(text) < RECALL_EVENTS * (EVENT_CHARS_MAX + 100)
    assert "(cut: 9011 characters)" in text


# --- who may ---


async def test_without_the_operators_word_it_is_a_function_like_any(tmp_path: Path) -> None:
    bench = Bench(tmp_path, is_on=False)
    bench.front.script = in_turn(call(REPORT))
    async with bench.http:
        choice = (await bench.chat(REPORTING)).json()["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == REPORT
        assert bench.front.works[0].tools is not None
        assert bench.front.works[0].tools.tools[0].description is None
    bench.itself.close()


async def test_a_chat_that_does_not_name_it_is_left_alone(bench: Bench) -> None:
    bench.front.script = in_turn("hello", "hello")
    assert await bench.said(CHAT) == "hello"
    assert await bench.said({**FORCED, "tool_choice": "none"}) == "hello"
    assert [work.tools for work in bench.front.works] == [None, None]


@pytest.mark.parametrize(
    ("scopes", "report_status", "recall_status"),
    [((KeyScope.INFER,), 403, 403), ((KeyScope.INFER, KeyScope.METRICS), 200, 403), ((KeyScope.ADMIN,), 200, 200)],
    ids=str,
)
async def test_it_is_told_to_who_may_read_it_over_http(
    tmp_path: Path, scopes: tuple[KeyScope, ...], report_status: int, recall_status: int
) -> None:
    gate, secret = keys(tmp_path, *scopes)
    bench = Bench(tmp_path, client="203.0.113.9", gate=gate)
    bench.front.script = lambda work: answer("nothing")
    async with bench.http:
        header = {"authorization": f"Bearer {secret}"}
        for body in (REPORTING, FORCED):
            response = await bench.chat(body, **header)
            assert response.status_code == report_status, response.text
            assert report_status == 200 or ("loop_lag" not in response.text and "scope metrics" in response.text)
        state = await bench.http.get("/api/v1/self", headers=header)
        assert (state.status_code == 200) == (report_status == 200)
        assert (await bench.chat(RECALLING, **header)).status_code == recall_status
    assert all(work.tools is not None for work in bench.front.works)
    bench.itself.close()


async def test_on_an_open_node_memory_is_recalled_from_this_machine_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, client="203.0.113.9")
    async with bench.http:
        assert "127.0.0.1" in error_of(await bench.chat(RECALLING), 403)["message"]
    assert bench.front.works == []
    bench.itself.close()


@pytest.mark.parametrize("headers", [{"x-route": "remote"}, {"x-peer": PEER}], ids=str)
async def test_the_records_go_to_no_peer(bench: Bench, headers: dict[str, str]) -> None:
    assert error_of(await bench.chat(REPORTING, **headers), 400)["param"] == "x-route"
    assert bench.front.works == []


async def test_a_node_without_memory_says_so(bench: Bench) -> None:
    bench.front.itself = None
    assert "keeps no memory" in error_of(await bench.chat(FORCED), 404)["message"]
