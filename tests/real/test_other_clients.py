"""The clients that people have, asking a real node that serves nothing itself: all get the one greedy answer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from node.commands.processes import Cluster
from tests.real.conftest import PATIENCE_S, sees

anthropic = pytest.importorskip("anthropic", reason="pip install -e '.[clients]'")
ollama = pytest.importorskip("ollama", reason="pip install -e '.[clients]'")
openai = pytest.importorskip("openai", reason="pip install -e '.[test]'")

pytestmark = [pytest.mark.real, pytest.mark.slow]
TOKENS = 24
CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Tell me of a king who had three daughters."}]


def test_every_client_gets_the_one_answer_through_a_node_without_a_model(cluster: Cluster) -> None:
    server = cluster.start("server").wait_ready()
    door = cluster.start("door", "--model", "none", join=[server]).wait_ready()
    sees(door, 1)
    body = {"model": "default", "messages": CHAT, "max_tokens": TOKENS, "temperature": 0}
    plain = httpx.post(f"{door.url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    text, usage = plain.json()["choices"][0]["message"]["content"], plain.json()["usage"]
    assert plain.headers["x-served-by"] == server.peer_id
    assert text
    _anthropic(door.url, server.peer_id, text, usage)
    _responses(door.url, text, usage)
    _ollama(door.url, text, usage)


def _anthropic(url: str, server: str, text: str, usage: dict[str, int]) -> None:
    greedy = {"temperature": 0}  # this client's version 2 has no word of its own for it
    asked: dict[str, Any] = {"model": "default", "messages": CHAT, "max_tokens": TOKENS, "extra_body": greedy}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        raw = client.messages.with_raw_response.create(**asked)
        message = raw.parse()
        assert raw.headers["x-served-by"] == server
        assert raw.headers["x-model-revision"].startswith("sha256-")
        assert "".join(block.text for block in message.content) == text
        assert message.usage.input_tokens == usage["prompt_tokens"]
        assert message.usage.output_tokens == usage["completion_tokens"]
        with client.messages.stream(**asked, extra_headers={"cache-control": "no-store"}) as stream:
            assert "".join(stream.text_stream) == text
        counted = client.messages.count_tokens(model="default", messages=CHAT)
        assert counted.input_tokens == usage["prompt_tokens"]


def _responses(url: str, text: str, usage: dict[str, int]) -> None:
    asked: dict[str, Any] = {"model": "default", "input": CHAT, "max_output_tokens": TOKENS, "temperature": 0}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        response = client.responses.create(**asked)
        assert response.output_text == text
        assert response.usage.total_tokens == usage["total_tokens"]
        events = list(client.responses.create(**asked, stream=True, extra_headers={"cache-control": "no-store"}))
        assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == text
        assert events[-1].response.output_text == text


def _ollama(url: str, text: str, usage: dict[str, int]) -> None:
    options = {"temperature": 0, "num_predict": TOKENS}
    with ollama.Client(host=url, timeout=PATIENCE_S) as client:
        [model] = client.list().models
        whole = client.chat(f"{model.model}:latest", messages=CHAT, options=options)
        assert whole.message.content == text
        assert (whole.prompt_eval_count, whole.eval_count) == (usage["prompt_tokens"], usage["completion_tokens"])
        parts = list(client.generate(model.model, CHAT[0]["content"], stream=True, options=options))
        assert "".join(part.response for part in parts) == text
        shown = client.show(model.model)
        assert "completion" in shown.capabilities
        assert shown.modelinfo["causal.context_length"] > 0
        if "embedding" in shown.capabilities:
            [vector] = client.embed(model.model, "a king").embeddings
            assert vector
