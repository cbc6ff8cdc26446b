"""Who asks at the HTTP door, over ASGI: keys, signatures, wallets, limits, pages of elsewhere; each refusal counted."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import h11
import httpx
import msgspec
import pytest
import trio
from coincurve import PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.routing import Route
from trio.testing import MockClock

from crypto.wallet import WalletAddress
from node.api_key_file import KEYS_FILE, KeyFile, changing_keys
from node.api_keys import ApiKey, KeyScope
from node.config import NodeConfig, load_config
from node.errors import BadRequest, ConfigError, NoRoom
from node.web.app import build_app
from node.web.caller import Need, need_of
from node.web.door import BODY_BYTES_MAX, DoorConfig
from node.web.gate import GateConfig
from node.web.ollama import OPERATORS
from node.web.serve import AGAIN_S, serve
from node.web.settings import WebConfig, door_config, gate_config
from tests.fake_front import PEER, FakeFront, finished, started, tale
from tests.test_api_keys import made
from tests.test_signed import client as signing
from tests.test_wallets import ADDRESS, OTHER_WALLET, WALLET, address_of, personal_sign

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
URL = "http://127.0.0.1:8765"
ELSEWHERE = "203.0.113.9"  # for documentation: no subnet, as a private one


class Bench:
    """A front behind door and gate, and clients of it from any address."""

    def __init__(self, folder: Path, *keys: ApiKey, door: DoorConfig | None = None, **config: Any) -> None:
        self.front = FakeFront()
        self.path = folder / KEYS_FILE
        self.keep(*keys)
        given = {"keys": KeyFile(self.path), "required": True, "audience": PEER, **config}
        self.app = build_app(self.front, Random(7), WebConfig(door=door or DoorConfig(), gate=GateConfig(**given)))

    def keep(self, *keys: ApiKey) -> None:
        with changing_keys(self.path) as kept:
            kept[:] = keys

    async def ask(
        self, method: str, path: str, *, host: str = "127.0.0.1", body: bytes = b"", **headers: str
    ) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, client=(host, 4711), raise_app_exceptions=False)
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx.AsyncClient(transport=transport, base_url=URL) as http:
            return await http.request(method, path, content=body, headers=told)

    async def chat(self, **more: Any) -> httpx.Response:
        return await self.ask("POST", "/v1/chat/completions", body=json.dumps(CHAT).encode(), **more)

    @property
    def drops(self) -> dict[str, int]:
        return dict(self.app.counts.drops)


def error_of(response: httpx.Response, status: int, type: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == type
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert ("retry-after" in response.headers) == (status == 429)
    return error


def signed(
    key: Ed25519PrivateKey, path: str = "/v1/chat/completions", body: bytes | None = None, **how: Any
) -> dict[str, str]:
    """The headers of a signed chat."""
    raw = json.dumps(CHAT).encode() if body is None else body
    method, audience = how.pop("method", "POST"), how.pop("audience", PEER)
    told: dict[str, str] = signing().signed_headers(key, method, URL + path, raw, audience, **how)
    return told


async def test_a_key_opens_what_it_is_for(tmp_path: Path) -> None:
    rights = {
        KeyScope.INFER: (200, 403, 403, 403),
        KeyScope.METRICS: (403, 200, 403, 403),
        KeyScope.TRAIN: (403, 403, 200, 403),
        KeyScope.ADMIN: (200, 200, 200, 404),
    }
    keys = {scope: made(f"{number:012x}", scopes=(scope,)) for number, scope in enumerate(rights)}
    bench = Bench(tmp_path, *(key for key, _ in keys.values()))
    for scope, statuses in rights.items():
        header = {"authorization": f"Bearer {keys[scope][1]}"}
        answers = [
            await bench.chat(**header),
            await bench.ask("GET", "/api/v1/status", **header),
            await bench.ask("POST", "/api/v1/training/pause", host=ELSEWHERE, **header),
            await bench.ask("POST", "/brand-new", **header),
        ]
        assert tuple(answer.status_code for answer in answers) == statuses, scope
    assert bench.front.hints[0].account == f"key:{keys[KeyScope.INFER][0].id}"
    error = error_of(await bench.chat(x_api_key=keys[KeyScope.TRAIN][1]), 403, "permission_error")
    assert (error["code"], error["message"]) == ("lacks_scope", "this wants the scope infer, and yours is train")
    assert bench.drops["lacks_scope"] == 10


async def test_every_route_but_the_public_ones_wants_a_key(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path)
    for path in ("/healthz", "/readyz"):
        assert (await bench.ask("GET", path)).status_code == 200
    for path in ("/v1/models", "/metrics", "/api/v1/status", "/api/v1/peers", "/api/v1/training", "/nowhere"):
        error = error_of(await bench.ask("GET", path), 401, "authentication_error")
        assert error["code"] == "missing_key"
        assert "keys create" in error["message"]
    error_of(await bench.chat(), 401, "authentication_error")
    error_of(await bench.chat(authorization="Basic abc"), 401, "authentication_error")
    assert bench.drops["missing_key"] == 8
    assert bench.front.works == []


def test_every_route_is_for_somebody_and_not_by_chance(tmp_path: Path) -> None:
    """A route that caller.py does not name wants ADMIN: what is meant to is listed here."""
    routes = [route for route in Bench(tmp_path).app._app._app.routes if isinstance(route, Route)]  # type: ignore[attr-defined]
    needs = {(method, route.path): need_of(method, route.path) for route in routes for method in route.methods or ()}
    assert needs["POST", "/v1/messages"] == needs["POST", "/v1/responses"] == needs["POST", "/api/chat"] == Need.INFER
    assert needs["GET", "/api/v1/events"] == needs["GET", "/api/v1/metrics/model"] == Need.METRICS
    assert {path for (_, path), need in needs.items() if need is Need.NOTHING} == {
        "/",
        "/chat",
        "/healthz",
        "/openapi.json",
        "/readyz",
        "/static/{name}",
    }
    operators = {f"/api/{name}" for name in OPERATORS} | {"/api/v1/memory", "/api/v1/memory/verify"}
    assert {path for (_, path), need in needs.items() if need is Need.ADMIN} == operators


async def test_each_fault_of_a_key_has_its_sentence_and_none_quotes_it(tmp_path: Path) -> None:
    now = int(time.time())
    texts = {
        "revoked_key": made("0" * 12, revoked_s=now),
        "expired_key": made("1" * 12, expires_s=now),
    }
    bench = Bench(tmp_path, *(key for key, _ in texts.values()))
    asked = {**{code: text for code, (_, text) in texts.items()}, "unknown_key": made("2" * 12)[1]}
    for code, text in asked.items():
        for header in ({"authorization": f"Bearer {text}"}, {"x_api_key": text}):
            response = await bench.chat(**header)
            assert error_of(response, 401, "authentication_error")["code"] == code
            assert text.partition(".")[2] not in response.text
        assert bench.drops[code] == 2
    sentences = {(await bench.chat(x_api_key=text)).json()["error"]["message"] for text in asked.values()}
    assert len(sentences) == 3


async def test_a_key_that_is_made_or_revoked_is_known_within_a_second(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bench = Bench(tmp_path)
    key, text = made()
    assert (await bench.chat(x_api_key=text)).status_code == 401
    bench.keep(key)
    await trio.sleep(1)
    assert (await bench.chat(x_api_key=text)).status_code == 200
    bench.keep(made(revoked_s=1)[0])
    await trio.sleep(1)
    assert (await bench.chat(x_api_key=text)).status_code == 401


async def test_without_api_keys_this_machine_may_all_and_a_key_still_counts(tmp_path: Path) -> None:
    key, text = made(requests_per_s=0.001, burst=1.0)
    bench = Bench(tmp_path, key, required=False)
    for _ in range(30):
        assert (await bench.chat()).status_code == 200
        assert (await bench.chat(authorization="Bearer sk-whatever-a-client-must-send")).status_code == 200
    assert (await bench.ask("GET", "/api/v1/status")).status_code == 200
    assert (await bench.chat(x_api_key=text)).status_code == 200
    error_of(await bench.chat(x_api_key=text), 429, "rate_limit_error")
    error_of(await bench.chat(x_api_key=made("9" * 12)[1]), 401, "authentication_error")
    error_of(await bench.ask("GET", "/metrics", x_api_key=made("9" * 12)[1]), 401, "authentication_error")


async def test_a_key_has_its_rate_and_what_it_is_told_to_wait_is_enough(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    (key, text), (_, other) = made(requests_per_s=0.5, burst=2.0), (pair := made("a" * 12))
    bench = Bench(tmp_path, key, pair[0])
    answers = [await bench.chat(x_api_key=text) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    error = error_of(answers[-1], 429, "rate_limit_error")
    assert (error["code"], error["retryable"]) == ("rate_limited", True)
    assert "the API key 0123456789ab may ask 0.5 times a second and 2 times at once: wait 2 s" in error["message"]
    assert (await bench.chat(x_api_key=other)).status_code == 200
    await trio.sleep(float(answers[-1].headers["retry-after"]))
    assert (await bench.chat(x_api_key=text)).status_code == 200
    assert bench.drops["limited_account"] == 2


async def test_a_wait_is_true_however_long_it_is(tmp_path: Path, autojump_clock: MockClock) -> None:
    key, text = made(requests_per_s=1 / 3600, burst=1.0)
    bench = Bench(tmp_path, key)
    assert [(await bench.chat(x_api_key=text)).status_code for _ in range(2)] == [200, 429]
    assert (await bench.chat(x_api_key=text)).headers["retry-after"] == "3600"
    await trio.sleep(3599)
    assert (await bench.chat(x_api_key=text)).status_code == 429
    await trio.sleep(1)
    assert (await bench.chat(x_api_key=text)).status_code == 200


async def test_a_refusal_reads_nothing_of_the_body(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path, made(requests_per_s=0.001, burst=1.0)[0])

    async def receive() -> Any:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    for headers in ([], [(b"x-api-key", b"oa_nothing")], [(b"signature", b"x"), (b"content-length", b"0")]):
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
        }
        await bench.app(scope, receive, send)
    assert [message["status"] for message in sent if "status" in message] == [401, 401, 401]


async def test_answers_under_way_are_few_and_tokens_are_settled(tmp_path: Path, autojump_clock: MockClock) -> None:
    key, text = made(tokens_per_min=600, concurrent=1, burst=100.0, requests_per_s=100.0)
    bench = Bench(tmp_path, key)
    bench.front.script = lambda work: tale(["x"] * 4, step_s=1.0)
    body = json.dumps({**CHAT, "max_tokens": 500}).encode()

    async def ask(max_tokens: int = 500) -> httpx.Response:
        body = json.dumps({**CHAT, "max_tokens": max_tokens}).encode()
        return await bench.ask("POST", "/v1/chat/completions", body=body, x_api_key=text)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await bench.front.until(lambda front: front.running == 1)
        busy = error_of(await ask(), 429, "rate_limit_error")
        assert "1 requests under way" in busy["message"]
    assert (await ask()).status_code == 200  # 493 of 500 came back
    error = error_of(await ask(700), 413, "invalid_request_error")
    assert (error["param"], "600 a minute" in error["message"]) == ("max_tokens", True)
    bench.front.script = lambda work: [started(), BadRequest("no")]
    for _ in range(3):
        assert (await ask()).status_code == 400  # and what failed cost its prompt
    bench.front.script = lambda work: [started(), finished(590)]
    assert (await ask()).status_code == 200
    late = await ask()
    assert "tokens a minute" in error_of(late, 429, "rate_limit_error")["message"]
    await trio.sleep(float(late.headers["retry-after"]))
    assert (await bench.ask("POST", "/v1/chat/completions", body=body, x_api_key=text)).status_code == 200
    assert bench.drops["limited_concurrent"] == bench.drops["limited_tokens"] == bench.drops["tokens_over_limit"] == 1


async def test_vectors_cost_tokens_too(tmp_path: Path) -> None:
    key, text = made(tokens_per_min=20)
    bench = Bench(tmp_path, key)

    async def ask(words: int) -> int:
        body = json.dumps({"input": "ab " * words}).encode()
        return (await bench.ask("POST", "/v1/embeddings", body=body, x_api_key=text)).status_code

    assert [await ask(words) for words in (18, 18, 5, 50)] == [200, 429, 200, 413]


async def test_what_is_sealed_costs_by_its_size(tmp_path: Path) -> None:
    key, text = made(tokens_per_min=200)
    bench = Bench(tmp_path, key)
    bench.front.frames = [bytes(33), b"", b"\1" + bytes(528), b"\1" + bytes(528), b"\2" + bytes(528)]

    async def ask(size: int) -> int:
        given = {"key": bytes(32), "request_id": bytes(16), "sealed": bytes(size)}
        body = {"peer": PEER, **{name: base64.b64encode(value).decode() for name, value in given.items()}}
        return (await bench.ask("POST", "/api/v1/sealed", body=json.dumps(body).encode(), x_api_key=text)).status_code

    assert [await ask(size) for size in (300, 300, 297, 240, 700)] == [200, 429, 429, 200, 413]  # 101 + 3, then 81 + 3
    (tmp_path / "other").mkdir()
    key, text = made(tokens_per_min=200)
    bench = Bench(tmp_path / "other", key)
    bench.front.frames = [bytes(33), b"\2" + bytes(2 * 512 + 16)]
    assert [await ask(size) for size in (90, 90)] == [200, 429]  # a whole answer of 1,041 bytes: 347 tokens


async def test_open_to_all_has_strangers_limits_by_address_and_network(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bench = Bench(tmp_path, required=False)
    answers = [(await bench.chat(host="8.8.8.8")).status_code for _ in range(7)]
    assert answers == [200] * 5 + [429] * 2
    answers = [(await bench.chat(host=f"8.8.8.{n}")).status_code for n in range(10, 40)]
    assert answers == [200] * 15 + [429] * 15  # of the /24, 20 at once
    assert (await bench.chat(host="9.9.9.9")).status_code == 200
    assert (await bench.chat()).status_code == 200
    looks = [(await bench.ask("GET", "/api/v1/status", host="8.8.4.4")).status_code for _ in range(21)]
    assert looks == [200] * 20 + [429]
    await trio.sleep(5)
    assert [(await bench.chat(host="8.8.8.8")).status_code for _ in range(6)] == [200] * 5 + [429]
    assert bench.drops["limited_subnet"] == 15


async def test_who_guesses_keys_is_slowed_and_the_key_beside_it_is_not(tmp_path: Path) -> None:
    key, text = made()
    bench = Bench(tmp_path, key)
    guesses = [(await bench.chat(x_api_key=f"oa_{n:012x}.x", host=ELSEWHERE)).status_code for n in range(30)]
    assert guesses[:20] == [401] * 20
    assert set(guesses[25:]) == {429}
    assert (await bench.chat(x_api_key=text, host=ELSEWHERE)).status_code == 200


async def test_a_signed_request_is_answered_once_and_only_as_it_was_signed(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bench = Bench(tmp_path)
    key = Ed25519PrivateKey.generate()
    headers = signed(key)
    assert (await bench.chat(**headers)).status_code == 200
    assert bench.front.hints[-1].account == f"stranger:ed25519:{key.public_key().public_bytes_raw().hex()}"
    now = time.time()
    cases = {
        "signature_replayed": bench.chat(**headers),
        "signature_for_another_peer": bench.chat(**signed(key, audience="12D3KooWElse")),
        "signature_expired": bench.chat(**signed(key, now=now - 40)),
        "signature_from_the_future": bench.chat(**signed(key, now=now + 20)),
        "signature_malformed": bench.chat(**{**signed(key), "signature": "x"}),
        "signature_body_altered": bench.ask("POST", "/v1/chat/completions", body=b"not json", **signed(key)),
    }
    sentences = set()
    for code, asked in cases.items():
        error = error_of(await asked, 401, "authentication_error")
        assert error["code"] == code
        sentences.add(error["message"])
    assert len(sentences) == len(cases)
    for asked in (
        bench.ask("POST", "/v1/completions", body=json.dumps(CHAT).encode(), **signed(key)),
        bench.ask("POST", "/v1/chat/completions?x=1", body=json.dumps(CHAT).encode(), **signed(key)),
        bench.ask("PUT", "/v1/chat/completions", body=json.dumps(CHAT).encode(), **signed(key)),
    ):
        assert error_of(await asked, 401, "authentication_error")["code"] == "signature_wrong"
    assert len(bench.front.works) == 1
    assert all(bench.drops[code] == 1 for code in cases)
    error = error_of(
        await bench.ask("GET", "/metrics", **signed(key, "/metrics", b"", method="GET")), 403, "permission_error"
    )
    assert error["code"] == "lacks_scope"
    both = await bench.chat(x_api_key=made()[1], **signed(key))
    assert "send one of the two" in error_of(both, 400, "invalid_request_error")["message"]


async def test_signers_have_limits_and_their_address_pays_before_any_arithmetic(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bench = Bench(tmp_path)
    key = Ed25519PrivateKey.generate()
    answers = [(await bench.chat(**signed(key))).status_code for _ in range(30)]
    assert answers[:20] == [200] * 20
    assert set(answers[25:]) == {429}
    rest = [(await bench.chat(signature="x")).json()["error"]["code"] for _ in range(30)]
    assert rest[:5] == ["signature_malformed"] * 5
    assert rest[-1] == "rate_limited"
    assert bench.drops["limited_signed"] > 0
    assert (await bench.chat(host="8.8.8.8", **signed(Ed25519PrivateKey.generate()))).status_code == 200


async def test_to_be_many_signers_gives_no_more_than_two_of_them_have(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    bench = Bench(tmp_path)
    bench.front.script = lambda work: tale(["x"] * 4, step_s=1.0)
    statuses: list[int] = []

    async def ask(host: str) -> None:
        body = json.dumps({**CHAT, "max_tokens": 14_000}).encode()
        headers = signed(Ed25519PrivateKey.generate(), body=body)
        answer = await bench.ask("POST", "/v1/chat/completions", host=host, body=body, **headers)
        statuses.append(answer.status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(ask, "8.8.8.8")
        nursery.start_soon(ask, "8.8.8.9")
    assert Counter(statuses) == {429: 8, 200: 5}
    assert bench.drops["limited_concurrent"] == 8
    bench.front.script = lambda work: [started(), finished(14_000)]
    statuses.clear()
    for _ in range(6):
        await ask("8.8.8.8")
    assert statuses == [200] * 4 + [429] * 2
    assert bench.drops["limited_tokens"] == 2


async def test_a_peer_that_lies_of_a_prompt_does_not_lock_out_who_asked(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    key, text = made(tokens_per_min=6_000)
    bench = Bench(tmp_path, key)
    lie = 1 << 53
    opening, end = (msgspec.structs.replace(one, prompt_tokens=lie) for one in (started(), finished(0)))
    for told in ([opening, end], [opening, NoRoom("full")]):
        bench.front.script = lambda work, told=told: told
        assert (await bench.chat(x_api_key=text)).status_code == (200 if told[-1] is end else 503)
        await trio.sleep(60)
    bench.front.script = lambda work: [started(), finished(0)]
    assert (await bench.chat(x_api_key=text)).status_code == 200


async def test_functions_are_charged_as_part_of_the_prompt(tmp_path: Path) -> None:
    key, text = made(tokens_per_min=1_000)
    bench = Bench(tmp_path, key)
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 6_000}}
    call = {"id": "c1", "function": {"name": "f", "arguments": json.dumps({"x": "x" * 6_000})}}
    made_call = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}, *CHAT["messages"]]
    for more in ({"tools": [tool]}, {"messages": made_call}):
        body = json.dumps({**CHAT, "max_tokens": 1, **more}).encode()
        answer = await bench.ask("POST", "/v1/chat/completions", body=body, x_api_key=text)
        assert error_of(answer, 413, "invalid_request_error")["param"] == "max_tokens"
    assert bench.front.works == []


async def test_no_strangers(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path, strangers=False)
    error = error_of(await bench.chat(**signed(Ed25519PrivateKey.generate())), 401, "authentication_error")
    assert error["code"] == "unknown_signer"


async def sign_in(bench: Bench, public_key: str, wallet: PrivateKey = WALLET, **more: str) -> httpx.Response:
    """The two requests of a wallet; the answer to the last."""
    body = json.dumps({"address": address_of(wallet), "session_key": public_key}).encode()
    challenge = await bench.ask("POST", "/api/v1/session/challenge", body=body, **more)
    if challenge.status_code != 200:
        return challenge
    message = challenge.json()["message"]
    answer = {"message": message, "signature": personal_sign(message, wallet)}
    return await bench.ask("POST", "/api/v1/session", body=json.dumps(answer).encode(), **more)


async def test_a_wallet_cannot_take_the_session_key_of_another(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path)
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    assert (await sign_in(bench, public)).status_code == 200
    taken = error_of(await sign_in(bench, public, wallet=OTHER_WALLET), 401, "authentication_error")
    assert (taken["code"], taken["param"]) == ("session_key_taken", "session_key")
    await trio.sleep(5)
    assert (await sign_in(bench, public)).status_code == 200, "its own wallet may, again"
    assert (await bench.chat(**signed(key))).status_code == 200
    assert bench.front.hints[-1].account == f"stranger:wallet:{ADDRESS}"


async def test_a_wallet_signs_in_and_its_session_key_asks(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path, strangers=False, wallets=frozenset({ADDRESS}))
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    told = await sign_in(bench, public)
    assert told.status_code == 200, told.text
    assert told.json()["scopes"] == ["infer"]
    assert (await bench.chat(**signed(key))).status_code == 200
    assert bench.front.hints[-1].account == f"wallet:{ADDRESS}"
    unlisted = Bench(tmp_path, wallets=frozenset({WalletAddress("0x" + "0" * 40)}))
    error = error_of(await sign_in(unlisted, public), 403, "permission_error")
    assert error["code"] == "wallet_not_listed"
    replay = {"message": "x", "signature": "0x"}
    again = await bench.ask("POST", "/api/v1/session", body=json.dumps(replay).encode())
    assert error_of(again, 401, "authentication_error")["code"] == "challenge_unknown"
    statuses = [(await sign_in(bench, public, host="8.8.8.8")).status_code for _ in range(4)]
    assert statuses == [200, 200, 429, 429]  # two requests each, five at once
    for body in (b"", b"[]", b'{"address": 1}', b'{"address": "0x", "session_key": "", "x": 1}', b"\xff"):
        answer = await bench.ask("POST", "/api/v1/session/challenge", body=body, host="9.9.9.9")
        error_of(answer, 400, "invalid_request_error")


PAGE = "https://chat.example"


async def test_pages_of_named_origins_may_ask_and_no_others(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path, door=DoorConfig(origins=frozenset({PAGE}), hosts=frozenset({"node.example"})))
    preflight = await bench.ask(
        "OPTIONS",
        "/v1/chat/completions",
        origin=PAGE,
        access_control_request_method="POST",
        access_control_request_headers="authorization, x-stainless-os",
        access_control_request_private_network="true",
    )
    assert (preflight.status_code, preflight.content) == (204, b"")
    for name, value in {
        "origin": PAGE,
        "headers": "authorization, x-stainless-os",
        "methods": "GET, POST, DELETE",
        "private-network": "true",
    }.items():
        assert preflight.headers[f"access-control-allow-{name}"] == value
    assert "access-control-allow-credentials" not in preflight.headers
    refused = await bench.chat(origin=PAGE)  # a page must be able to read why
    error_of(refused, 401, "authentication_error")
    assert refused.headers["access-control-allow-origin"] == PAGE
    assert refused.headers["vary"] == "origin"
    assert (await bench.ask("GET", "/healthz", host="127.0.0.1")).headers.get("access-control-allow-origin") is None
    for origin in ("https://evil.example", "null", "https://chat.example.evil", "http://chat.example"):
        foreign = await bench.ask("OPTIONS", "/healthz", origin=origin, access_control_request_method="GET")
        error_of(foreign, 403, "permission_error")
        assert "access-control-allow-origin" not in foreign.headers
    odd = await bench.ask(
        "OPTIONS", "/", origin=PAGE, access_control_request_method="GET", access_control_request_headers="a" * 3000
    )
    assert "access-control-allow-headers" not in odd.headers
    transport = httpx.ASGITransport(app=bench.app)
    for name, status in (("node.example", 200), ("other.example", 403)):
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{name}:8765") as http:
            assert (await http.get("/healthz")).status_code == status


async def test_a_body_that_is_too_large_is_refused_when_signed_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    bench = Bench(tmp_path)
    headers = {**signed(Ed25519PrivateKey.generate()), "content-length": str(BODY_BYTES_MAX + 1)}
    error_of(await bench.chat(**headers), 413, "invalid_request_error")
    assert bench.drops == {"body_too_large": 1}


def settings(tmp_path: Path, **given: object) -> NodeConfig:
    return load_config({"data_dir": tmp_path, **given}, environment={})


def test_settings_of_the_door(tmp_path: Path) -> None:
    file = tmp_path / "wallets"
    file.write_text(f"# who may\n{ADDRESS.lower()}  # me\n\n")
    config = settings(
        tmp_path,
        hosts=("Node.Example",),
        origins=(PAGE,),
        wallets=(str(file), "0x" + "1" * 40),
        api_keys=True,
        strangers=False,
    )
    assert door_config(config) == DoorConfig(hosts=frozenset({"node.example"}), origins=frozenset({PAGE}))
    gate = gate_config(config, PEER)
    assert (gate.required, gate.strangers, gate.audience) == (True, False, PEER)
    assert gate.wallets == {ADDRESS, "0x" + "1" * 40}
    file.write_text("# nobody\n")
    for given, wanted in (
        ({"hosts": ("http://a",)}, "--hosts 'http://a'"),
        ({"origins": ("*",)}, "--origins '*'"),
        ({"origins": ("https://a/",)}, "--origins"),
        ({"origins": ("https://A",)}, "--origins"),
        ({"origins": ("chat.example",)}, "--origins"),
        ({"origins": ("https://a:x",)}, "--origins"),
        ({"wallets": ("0x12",)}, "--wallets: "),
        ({"wallets": (str(tmp_path / "absent"),)}, "cannot read the wallets"),
        ({"wallets": (str(file),)}, "name none"),
    ):
        config = settings(tmp_path, **given)
        with pytest.raises(ConfigError, match=wanted.replace("*", r"\*")):
            (door_config(config), gate_config(config, PEER))


def test_a_bind_beyond_loopback_names_both_ways(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"add --api-keys .* --open"):
        settings(tmp_path, http="0.0.0.0:8765")
    assert settings(tmp_path, http="0.0.0.0:8765", api_keys=True).api_keys
    environment = {"OPENAGI_API_KEYS": "true", "OPENAGI_ORIGINS": f"{PAGE},http://b", "OPENAGI_API_KEY": "oa_x"}
    config = load_config({}, environment=environment)
    assert (config.api_keys, config.origins) == (True, (PAGE, "http://b"))


@pytest.mark.slow
class Talk:
    """One connection to a real socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def ask(self, raw: bytes) -> tuple[int, set[bytes], dict[str, Any]]:
        """Status, names of the headers and body of the answer."""
        await self._stream.send_all(raw)
        told = b""
        while b"\r\n\r\n" not in told:
            told += await self._stream.receive_some(1)
        head = told.removesuffix(b"\r\n\r\n").split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in head[1:])
        body = b""
        while len(body) < int(fields[b"content-length"]):
            body += await self._stream.receive_some(1)
        return int(head[0].split(b" ")[1]), set(fields), json.loads(body)


async def test_the_same_refused_request_again_is_answered_as_the_first_until_it_is_due(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    receive_data = h11.Connection.receive_data

    def noted(connection: h11.Connection, data: bytes) -> None:
        parsed.append(data)
        receive_data(connection, data)

    monkeypatch.setattr(h11.Connection, "receive_data", noted)
    key, text = made(requests_per_s=0.1, burst=1.0)
    bench = Bench(tmp_path, key)
    body = json.dumps(CHAT).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-api-key: {text}\r\n"
    raw = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve, bench.app, "127.0.0.1", 0)
        talk = Talk(await trio.open_tcp_stream("127.0.0.1", port))
        assert (await talk.ask(raw))[0] == 200
        first = await talk.ask(raw)
        assert first[0] == 429
        count = len(parsed)
        for _ in range(5):
            again = await talk.ask(raw)
            assert again[:2] == first[:2]
            assert {**again[2]["error"], "request_id": ""} == {**first[2]["error"], "request_id": ""}
            assert again[2]["error"]["request_id"] != first[2]["error"]["request_id"]
        assert len(parsed) == count, "the same bytes were parsed anew"
        assert bench.drops["limited_account"] == 6
        other = raw.replace(b"hello", b"hallo")
        assert (await talk.ask(other))[0] == 429
        assert len(parsed) == count + 1
        await trio.sleep(AGAIN_S)
        assert (await talk.ask(other))[0] == 429
        assert len(parsed) == count + 2, "now and then it is parsed"
        await trio.sleep(9.0)  # below the time that an idle connection has
        assert (await talk.ask(other))[0] == 200
        assert (await talk.ask(other))[0] == 429
        nursery.cancel_scope.cancel()
    assert len(bench.front.works) == 2


async def test_a_flood_over_a_socket_is_answered_early_and_as_it_would_be_late(tmp_path: Path) -> None:
    """What serve.py answers by the head alone is what the routes' own way answers."""
    key, text = made(requests_per_s=0.001, burst=1.0)
    bench = Bench(tmp_path, key)
    body = json.dumps(CHAT).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-api-key: {text}\r\n"
    small = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(serve, bench.app, "127.0.0.1", 0)
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            late = await bench.chat(x_api_key=text)
            assert late.status_code == 200
            late = await bench.chat(x_api_key=text)
            for _ in range(3):
                await stream.send_all(small + small)  # also two at once
                for _ in range(2):
                    raw = b""
                    while b"rate_limited" not in raw:
                        raw += await stream.receive_some(1)
                    while not raw.endswith(b"}}"):
                        raw += await stream.receive_some(1)
                    told, _, answer = raw.partition(b"\r\n\r\n")
                    names = {line.partition(b":")[0].decode() for line in told.split(b"\r\n")[1:]} - {"date"}
                    assert told.startswith(b"HTTP/1.1 429")
                    assert names == set(late.headers)
                    told_error, late_error = json.loads(answer)["error"], late.json()["error"]
                    assert {**told_error, "request_id": ""} == {**late_error, "request_id": ""}
            parted = await trio.open_tcp_stream("127.0.0.1", port)
            await parted.send_all(small[:-5])  # not early: it may be slow, and that has its own bound
            assert b" 429 " in await parted.receive_some()
            for line, wanted in ((b"HEAD /v1/models", b" 429 "), (b"GET /healthz", b" 200 "), (b"GET /chat", b" 200 ")):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(small.replace(b"POST /v1/chat/completions", line))
                assert wanted in await stream.receive_some(), line
            for other in (
                f"{head}origin: https://evil.example\r\ncontent-length: 0\r\n\r\n",
                head.replace("localhost", "evil.example") + "content-length: 0\r\n\r\n",
            ):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(other.encode())
                assert b" 403 " in await stream.receive_some()
            nursery.cancel_scope.cancel()
    assert bench.drops["limited_account"] == 9
    assert bench.app.counts.requests == 14
    assert len(bench.front.works) == 1
