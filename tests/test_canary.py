"""Prompts, outputs and keys are in no log, file, metric or status: a whole node, with canaries on every route."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.api_key_file import KEYS_FILE, changing_keys
from node.api_keys import KeyScope
from tests.fake_runtime import FakeRuntime
from tests.test_api_keys import made
from tests.test_run import running
from tests.test_signed import client as signing
from tests.test_wallets import ADDRESS, personal_sign

pytestmark = pytest.mark.slow
CANARY = "canary-7f3a91"
LOOKS = ("/metrics", "/api/v1/status", "/api/v1/peers", "/api/v1/training", "/v1/models", "/healthz", "/readyz")
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": CANARY, "user": CANARY},
        {"prompt": CANARY, "stream": True},
        {"prompt": [CANARY, 1]},
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": CANARY}]},
        {"messages": [{"role": "user", "content": CANARY}], "stream": True, "stop": CANARY},
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": [{"role": "user", "content": CANARY}], CANARY: 1},
    ],
    "/v1/embeddings": [{"input": CANARY}, {"input": [CANARY, None]}],
    "/api/v1/model/inference": [{"text": CANARY}, {"text": CANARY, "n": 3}],
    "/v1/messages": [{"max_tokens": 9, "messages": [{"role": "user", "content": CANARY}]}, {"system": CANARY}],
    "/v1/responses": [{"input": CANARY}, {"input": CANARY, "stream": True}, {"input": [{"type": CANARY}]}],
    "/api/chat": [{"model": "tale", "messages": [{"role": "user", "content": CANARY}]}],
    "/api/generate": [{"model": "tale", "prompt": CANARY}, {"prompt": CANARY, CANARY: CANARY}],
    "/api/v1/sealed": [{CANARY: CANARY}],
    "/api/v1/training/start": [{"name": CANARY, CANARY: CANARY}],
    "/api/v1/session/challenge": [{"address": CANARY, "session_key": CANARY}],
    "/api/v1/session": [{"message": CANARY, "signature": CANARY}],
}


class Asked:
    """A client that keeps all that may be in no log: what it sent in secret, and what was made for it."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.secrets = {CANARY}
        self.statuses: list[int] = []

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> httpx.Response:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.http.request(method, path, content=body, headers=told)
        self.statuses.append(response.status_code)
        if response.status_code == 200 and path.startswith("/v1/c"):
            self.secrets.update(text for text in texts(response) if len(text) > 8)
        return response


def contents(folder: Path) -> dict[Path, bytes]:
    """All files there."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def texts(response: httpx.Response) -> list[str]:
    """What was made, whole or in pieces."""
    lines = response.text.split("\n\n") if response.text.startswith((":", "data")) else [f"data: {response.text}"]
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    made = [each.get("text") or (each.get("message") or each.get("delta") or {}).get("content") for each in choices]
    return ["".join(filter(None, made)), *filter(None, made)]


async def every_way(asked: Asked, key: str, other: str, peer: str) -> None:
    """All routes, well and badly, by all ways to say who asks."""
    signer = Ed25519PrivateKey.generate()
    for path, bodies in BODIES.items():
        for body in map(json.dumps, bodies):
            await asked.ask("POST", path, body.encode(), authorization=f"Bearer {key}")
            await asked.ask("POST", path, body[:-1].encode(), x_api_key=key)  # no JSON any more
        raw = json.dumps(bodies[0]).encode()
        signed = signing().signed_headers(signer, "POST", f"http://127.0.0.1{path}", raw, peer)
        asked.secrets |= {signed["signature"]}
        for headers in (
            signed,
            {"authorization": f"Bearer {other}"},
            {"authorization": f"Bearer {CANARY}"},
            {"authorization": f"Basic {CANARY}"},
            {**signed, "signature": CANARY},
            {**signed, "signature-input": f'sig1=("{CANARY}")'},
            {"x-api-key": key, "x-route": CANARY, "x-private": CANARY, "x-timeout-s": CANARY},
            {"x-api-key": key, "content-encoding": CANARY},
        ):
            await asked.ask("POST", path, raw, **headers)
    public = signer.public_key().public_bytes_raw().hex()
    body = json.dumps({"address": ADDRESS, "session_key": public})
    message = (await asked.ask("POST", "/api/v1/session/challenge", body.encode(), x_api_key=key)).json()["message"]
    answer = {"message": message, "signature": personal_sign(message)}
    asked.secrets.add(answer["signature"])
    assert (await asked.ask("POST", "/api/v1/session", json.dumps(answer).encode(), x_api_key=key)).status_code == 200


async def test_a_canary_is_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    admin, key = made(scopes=(KeyScope.ADMIN,), requests_per_s=1000.0, burst=1000.0)
    data_dir = tmp_path / "data"
    with changing_keys(data_dir / KEYS_FILE) as keys:
        keys.append(admin)
    other = made("b" * 12)[1]
    async with running(data_dir, lambda _config: FakeRuntime(ends_at=12), http="127.0.0.1:0", api_keys=True) as here:
        await here.ready()
        async with httpx.AsyncClient(base_url=f"http://{here.node.state.http}", trust_env=False, timeout=60) as http:
            asked = Asked(http)
            asked.secrets |= {text.partition(".")[2] for text in (key, other)}
            await every_way(asked, key, other, here.transport.peer_id)
            told = [(await asked.ask("GET", path, x_api_key=key)).text for path in LOOKS]
    assert {200, 400, 401, 403} <= set(asked.statuses)
    assert any(text.startswith("w") for text in asked.secrets), "nothing was made"
    own = [record for record in caplog.records if record.name.partition(".")[0] not in ("httpx", "httpcore")]  # ours
    logs = "\n".join(f"{record.getMessage()} {record.exc_text or ''} {record.args}" for record in own)
    assert "POST /v1/completions" in logs, "the log was not caught"
    files = contents(tmp_path)
    assert files
    for secret in asked.secrets:
        assert secret not in logs
        assert not [text for text in told if secret in text]
        assert not [file for file, content in files.items() if secret.encode() in content]
